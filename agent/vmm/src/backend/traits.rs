//! What a backend is: the trait, and the events that its vCPUs report.
//!
//! # Protocol
//! A backend is built stopped. Slots are added before the first [`Backend::run`];
//! [`Backend::load_state`] only while stopped and before the first run. `run` and `pause`
//! alternate; `pause` returns when no vCPU executes guest code and every store of the guest is
//! visible in guest memory. A backend never resumes by itself. The calls are made by one owner (the
//! VM's machine) in order, except [`Backend::stats`], [`Backend::invalidate`] and those of
//! [`DirtySource`], which may come from another thread while vCPUs run.
//!
//! # Invariants
//! What a backend cannot do it refuses with [`BackendError::Unsupported`]. The guest
//! reaches a slot's memory through the guest view alone. A guest's write to a read-only slot
//! changes nothing, is counted ([`v1::MmuStats::read_only_writes`]), and the guest goes on.

use std::sync::Arc;

use slat_proto::{model::DirtyEngine, v1};

use super::{cpu::CpuFact, error::BackendError, run_failure::RunFailure};
use crate::memory::{DirtySource, SlotMemory};

/// What a vCPU reports on its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestEvent {
    /// The guest ended by itself; the vCPUs are stopped.
    Stopped,
    /// The guest or the backend failed (triple fault, internal error, a stale translation used);
    /// the vCPUs are stopped.
    Failed(RunFailure),
}

/// Where a backend reports [`GuestEvent`]s. Called on a vCPU thread; must not block and must not
/// call the backend.
pub(crate) type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// How a backend tells which pages were written, and why in that way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EngineInUse {
    pub(crate) engine: DirtyEngine,
    /// For people.
    pub(crate) reason: String,
}

/// What a pager has to know of a guest whose memory is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PagedGuest {
    /// The name of its mirror's format.
    pub(crate) format: String,
    /// Thread ids of its vCPUs, by index.
    pub(crate) vcpus: Vec<i32>,
}

/// Runs vCPUs and walks the second stage of one VM. See the module for the protocol.
pub(crate) trait Backend: DirtySource {
    /// What it can do here.
    fn capabilities(&self) -> Vec<v1::Capability>;

    /// How it tells which pages were written.
    fn dirty_engine(&self) -> EngineInUse;

    /// What its vCPUs were told of their CPU, whatever this host could tell them: a VM that came
    /// from a lesser host can go back there. Empty where that is nothing.
    fn cpu_facts(&self) -> Vec<CpuFact>;

    /// What a pager has to know; `None` where a guest cannot wait for one.
    fn paged(&self) -> Option<PagedGuest>;

    /// Most slots that a VM can have, and the first number that no slot can have.
    fn most_slots(&self) -> u32;

    /// Makes a slot's memory visible to the guest at its `base_gfn`. Keeps the memory mapped as
    /// long as the slot exists.
    ///
    /// # Errors
    /// `BadSlot` when it overlaps, is out of the format's range or there are too many.
    fn add_slot(&self, memory: &Arc<SlotMemory>) -> Result<(), BackendError>;
    /// Takes a slot away. Returns when nothing maps it any more.
    ///
    /// # Errors
    /// `NoSuchSlot`.
    fn remove_slot(&self, slot: u32) -> Result<(), BackendError>;
    /// Moves a slot; not atomic for the guest.
    ///
    /// # Errors
    /// `NoSuchSlot`, `BadSlot`.
    fn move_slot(&self, slot: u32, base_gfn: u64) -> Result<(), BackendError>;

    /// Lets the guest write to a slot, or not. Only while stopped: the slot is made anew, and the
    /// log of its writes begins empty. Dirty logging stays on where it was.
    ///
    /// # Errors
    /// `NoSuchSlot`, `BadSlot`, `Ioctl`: the slot is as it was. `SlotLost`: it is gone.
    fn set_read_only(&self, slot: u32, read_only: bool) -> Result<(), BackendError>;

    /// Drops second-stage mappings of guest frames `[gfn, gfn + pages)`; contents stay. Returns
    /// when no vCPU can use a dropped translation.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError>;

    /// Lets the vCPUs run. Returns at once.
    ///
    /// # Errors
    /// `Vcpu` when a vCPU thread is gone.
    fn run(&self) -> Result<(), BackendError>;
    /// Stops the vCPUs. No effect when stopped.
    ///
    /// # Errors
    /// `Vcpu` when a vCPU does not stop within some seconds.
    fn pause(&self) -> Result<(), BackendError>;
    /// State of all vCPUs, versioned, for [`Backend::load_state`] of the same kind elsewhere. Only
    /// while stopped.
    ///
    /// # Errors
    /// `Ioctl`.
    fn save_state(&self) -> Result<Vec<u8>, BackendError>;
    /// Sets the state of all vCPUs. `state` comes from another host: every length in it is checked.
    ///
    /// # Errors
    /// `State` when it is malformed, of another kind, version or number of vCPUs; `Ioctl`.
    fn load_state(&self, state: &[u8]) -> Result<(), BackendError>;

    /// Counters now. Reads only; never stops a vCPU. What is not offered stays unset.
    fn stats(&self) -> v1::MmuStats;
}
