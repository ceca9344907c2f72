//! What the vCPUs of a VM and its owner share. Each part has its own locking.

use std::sync::{Arc, atomic::AtomicU64};

use slat_arch::GuestStage;
use slat_mmu::{MmuConfig, SecondStage};

use super::{
    super::EventSink, frames::Frames, gate::Gate, port::Port, shootdown::Shootdown,
    tables::TableHeap,
};

/// What vCPUs and owner share.
#[derive(Debug)]
pub(super) struct VmCore {
    pub(super) mmu: Box<dyn SecondStage>,
    pub(super) frames: Frames,
    pub(super) shootdown: Arc<Shootdown>,
    pub(super) gate: Gate,
    pub(super) port: Arc<dyn Port>,
    /// Writes to read-only slots, which changed nothing.
    pub(super) read_only_writes: AtomicU64,
}

impl VmCore {
    pub(super) fn new(
        stage: GuestStage,
        vcpus: u32,
        config: MmuConfig,
        tables: TableHeap,
        events: EventSink,
        port: Arc<dyn Port>,
    ) -> Arc<Self> {
        let shootdown = Arc::new(Shootdown::new(vcpus, Arc::clone(&port)));
        Arc::new(Self {
            mmu: stage.build(tables, Arc::clone(&shootdown), config),
            frames: Frames::new(vcpus),
            shootdown,
            gate: Gate::new(vcpus, events),
            port,
            read_only_writes: AtomicU64::new(0),
        })
    }
}
