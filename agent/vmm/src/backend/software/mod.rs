//! The software backend: vCPU threads with TLBs of their own walk the Common MMU's tables. Any
//! format on any host.
//!
//! | file | what |
//! |---|---|
//! | `tables` | memory for page tables, bounded by what the slots need |
//! | `frames` | made-up host frames: what entries point to |
//! | `shootdown` | how a flush reaches the vCPUs, and the check that it did |
//! | `tlb` | a vCPU's TLB |
//! | `vcpu` | a vCPU's thread: memstress through the TLB |
//! | `gate` | run, pause, end, failure |
//! | `port` | what may stand between these, given from outside |
//! | `shared` | what the vCPUs and their owner share of the above |
//! | `state` | saved vCPU state |
//!
//! # Locking
//! The MMU serialises its own operations and flushes before they return, so there is little left to
//! lock here. `slots` guards the list of slots and keeps a slot's host frames in step with the
//! slot; no vCPU takes it, and it is not held while the dirty log is taken. Below it come the MMU's
//! locks, and below those the shoot-down's (`Shootdown` is the MMU's [`Host`]) and the table
//! memory's. The frames' locks are taken with no other below. [`Backend::run`], [`Backend::pause`]
//! and [`Backend::stats`] take none of these for long.
//!
//! vCPUs fault in parallel: see `vcpu` for what they take.
//!
//! # Invariants
//! * An operation returns when its flush is complete.
//! * A slot's memory is in `frames` from before its first translation until after its last. Its
//!   host frames are congruent to its guest frames up to 1 GiB, so that it can be mapped hugely; a
//!   slot that is moved elsewhere keeps its host frames, and with them only the sizes that still
//!   fit, as in KVM.
//! * TLBs hold leaves only, no intermediate entries, so removed tables need no pin while they are
//!   flushed.
//!
//! [`Host`]: slat_mmu::Host

mod frames;
mod gate;
#[cfg(test)]
mod kernel_oracles;
mod port;
mod shared;
mod shootdown;
mod state;
mod tables;
#[cfg(test)]
mod tests;
mod tlb;
mod vcpu;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    thread::{self, JoinHandle},
};

use slat_arch::GuestStage;
use slat_mmu::{
    DEFAULT_MAX_SLOTS, FlushStats, Gfn, GfnRange, Level, MmuConfig, Pfn, SlotError, SlotFlags,
    SlotId, SlotSpec,
};
use slat_proto::{
    model::{BackendKind, DirtyEngine, Format, GuestSpec, VmSpec},
    v1,
};

use self::{
    port::{Direct, Port},
    shared::VmCore,
    tables::{Budget, TableHeap},
    vcpu::Vcpu,
};
use super::{Backend, BackendError, CpuFact, EngineInUse, EventSink, PagedGuest};
use crate::{
    confine,
    memory::{DirtyError, DirtySource, SlotBitmaps, SlotMemory},
};

/// A slot as this backend keeps it.
#[derive(Clone, Copy, Debug)]
struct BackedSlot {
    id: SlotId,
    base_gfn: u64,
    pages: u64,
    read_only: bool,
    logging: bool,
    /// First of its made-up host frames.
    frames: u64,
}

/// Runs memstress over the Common MMU. See the module.
#[derive(Debug)]
pub(crate) struct SoftwareBackend {
    vm: Arc<VmCore>,
    format: Format,
    vcpus: u32,
    budget: Arc<Budget>,
    slots: Mutex<BTreeMap<u32, BackedSlot>>,
    threads: Vec<JoinHandle<()>>,
}

impl BackedSlot {
    /// As the MMU makes it.
    fn created(&self) -> SlotSpec {
        SlotSpec::new(self.id, Gfn(self.base_gfn), self.pages, Pfn(self.frames))
            .with_flags(flags(self, self.logging))
    }
}

impl SoftwareBackend {
    /// A stopped backend without slots; its vCPU threads exist and rest. The format is EPT4 unless
    /// the spec says otherwise.
    ///
    /// # Errors
    /// `Unsupported` for a raw image or a format that the MMU has not; `Vcpu` when a thread cannot
    /// be made.
    pub(crate) fn new(spec: &VmSpec, events: EventSink) -> Result<Self, BackendError> {
        Self::with_port(spec, events, Arc::new(Direct))
    }

    fn with_port(
        spec: &VmSpec,
        events: EventSink,
        port: Arc<dyn Port>,
    ) -> Result<Self, BackendError> {
        if matches!(spec.guest, GuestSpec::RawImage(_)) {
            return Err(BackendError::Unsupported {
                backend: BackendKind::Software,
                what: format!("run a {}", v1::Capability::RawImage.as_str_name()),
            });
        }
        let format = spec.format.unwrap_or(Format::Ept4);
        let budget = Arc::new(Budget::default());
        let tables = TableHeap::new(Arc::clone(&budget)).map_err(|error| BackendError::Vcpu {
            message: format!("no addresses for page tables: {error}"),
        })?;
        let vm = VmCore::new(
            stage(format)?,
            spec.vcpus,
            MmuConfig::default(),
            tables,
            events,
            port,
        );
        let mut backend = Self {
            vm,
            format,
            vcpus: spec.vcpus,
            budget,
            slots: Mutex::default(),
            threads: Vec::new(),
        };
        for number in 0..spec.vcpus {
            let vcpu = Vcpu::new(Arc::clone(&backend.vm), number);
            let thread = thread::Builder::new()
                .name(format!("vcpu{number}"))
                .spawn(move || {
                    confine::enter(confine::Role::Vcpu);
                    vcpu.live();
                })
                .map_err(|error| BackendError::Vcpu {
                    message: format!("no thread for vCPU {number}: {error}"),
                })?;
            backend.threads.push(thread);
        }
        Ok(backend)
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, BackedSlot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn logged(&self, slot: u32) -> Result<BackedSlot, DirtyError> {
        let found = self.slots().get(&slot).copied();
        found.ok_or(DirtyError::NoSuchSlot { slot })
    }

    /// Sets the bound for table memory. What slots that are gone left behind goes first when it is
    /// more than those that remain can need.
    fn settle_tables(&self, slots: &BTreeMap<u32, BackedSlot>) {
        let needed = Budget::needed_for(slots.values().map(|slot| slot.pages))
            + Budget::stock_of(self.vcpus);
        if self.budget.used() > needed {
            self.vm.mmu.zap_all();
        }
        self.budget.allow(needed);
    }

    fn refuse_unless_stopped(&self, what: &str) -> Result<(), BackendError> {
        if self.vm.gate.stopped() {
            Ok(())
        } else {
            Err(BackendError::Vcpu {
                message: format!("vCPU state is {what} only while the vCPUs are stopped"),
            })
        }
    }
}

impl Drop for SoftwareBackend {
    fn drop(&mut self) {
        self.vm.gate.end();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

impl DirtySource for SoftwareBackend {
    fn set_dirty_logging(&self, slot: u32, on: bool) -> Result<(), DirtyError> {
        let found = self.logged(slot)?;
        let unsplit = self
            .vm
            .mmu
            .space(0)
            .set_slot_flags(found.id, flags(&found, on))
            .map_err(|error| refused(slot, error))?;
        if let Some(found) = self.slots().get_mut(&slot) {
            found.logging = on;
        }
        if unsplit > 0 {
            tracing::warn!(
                slot,
                unsplit,
                "huge mappings are logged whole for want of table memory"
            );
        }
        Ok(())
    }

    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
        for (slot, bitmap) in into {
            let found = self.logged(*slot)?;
            let (mmu, pages) = (&self.vm.mmu, bitmap.pages());
            if found.pages != pages {
                return Err(refused(*slot, format!("a bitmap of {pages} pages")));
            }
            bitmap
                .load(|words| mmu.space(0).harvest_dirty_log(found.id, words))
                .map_err(|error| refused(*slot, error))?;
        }
        Ok(())
    }
}

impl Backend for SoftwareBackend {
    fn dirty_engine(&self) -> EngineInUse {
        EngineInUse {
            engine: DirtyEngine::Bitmap,
            reason: "the software backend has bitmaps alone".to_owned(),
        }
    }

    fn capabilities(&self) -> Vec<v1::Capability> {
        use v1::Capability::{
            DirtyBitmap, DirtyLog, FaultStatistics, FlushStatistics, Invalidate, ReadOnlySlots,
            VcpuState,
        };
        vec![
            DirtyLog,
            DirtyBitmap,
            VcpuState,
            FaultStatistics,
            FlushStatistics,
            Invalidate,
            ReadOnlySlots,
        ]
    }

    fn paged(&self) -> Option<PagedGuest> {
        // Its own MMU pages it.
        None
    }

    fn most_slots(&self) -> u32 {
        DEFAULT_MAX_SLOTS.into()
    }

    fn cpu_facts(&self) -> Vec<CpuFact> {
        Vec::new()
    }

    fn add_slot(&self, memory: &Arc<SlotMemory>) -> Result<(), BackendError> {
        let spec = memory.spec();
        let bad = |message: String| BackendError::BadSlot {
            slot: spec.slot,
            message,
        };
        let mut slots = self.slots();
        let id = SlotId::try_from(spec.slot).map_err(|_| bad("number too high".to_owned()))?;
        let frames = self
            .vm
            .frames
            .add(memory.guest(), spec.base_gfn)
            .ok_or_else(|| bad("no host frame numbers are left".to_owned()))?;
        let slot = BackedSlot {
            id,
            base_gfn: spec.base_gfn,
            pages: spec.pages,
            read_only: spec.read_only,
            logging: false,
            frames,
        };
        if let Err(error) = self.vm.mmu.create_slot(slot.created()) {
            self.vm.frames.remove(frames);
            return Err(slot_error(spec.slot, &error));
        }
        slots.insert(spec.slot, slot);
        self.settle_tables(&slots);
        Ok(())
    }

    fn remove_slot(&self, slot: u32) -> Result<(), BackendError> {
        let mut slots = self.slots();
        let found = find(&slots, slot)?;
        self.vm
            .mmu
            .space(0)
            .delete_slot(found.id)
            .map_err(|error| slot_error(slot, &error))?;
        self.vm.frames.remove(found.frames);
        slots.remove(&slot);
        self.settle_tables(&slots);
        Ok(())
    }

    fn move_slot(&self, slot: u32, base_gfn: u64) -> Result<(), BackendError> {
        let mut slots = self.slots();
        let found = find(&slots, slot)?;
        self.vm
            .mmu
            .space(0)
            .move_slot(found.id, Gfn(base_gfn))
            .map_err(|error| slot_error(slot, &error))?;
        slots.insert(slot, BackedSlot { base_gfn, ..found });
        self.settle_tables(&slots);
        Ok(())
    }

    /// The MMU, as KVM, has the flag of a slot fixed: it is made anew over the same host frames.
    fn set_read_only(&self, slot: u32, read_only: bool) -> Result<(), BackendError> {
        let mut slots = self.slots();
        let old = find(&slots, slot)?;
        let new = BackedSlot { read_only, ..old };
        if old.read_only == read_only {
            return Ok(());
        }
        self.vm
            .mmu
            .space(0)
            .delete_slot(old.id)
            .map_err(|error| slot_error(slot, &error))?;
        let Err(error) = self.vm.mmu.create_slot(new.created()) else {
            slots.insert(slot, new);
            return Ok(());
        };
        let Err(again) = self.vm.mmu.create_slot(old.created()) else {
            return Err(slot_error(slot, &error));
        };
        self.vm.frames.remove(old.frames);
        slots.remove(&slot);
        Err(BackendError::SlotLost {
            slot,
            message: format!("{error}; as it was: {again}"),
        })
    }

    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError> {
        let range = GfnRange::new(Gfn(gfn), pages);
        let begun = self.vm.mmu.space(0).invalidate_begin(range, true);
        // It was begun at the very MMU, so it ends there.
        let ended = self.vm.mmu.invalidate_end(begun);
        debug_assert!(ended.is_ok());
        Ok(())
    }

    fn run(&self) -> Result<(), BackendError> {
        self.vm.gate.run()
    }

    fn pause(&self) -> Result<(), BackendError> {
        self.vm.gate.pause()
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        self.refuse_unless_stopped("saved")?;
        Ok(state::save(self.vcpus, self.format))
    }

    fn load_state(&self, bytes: &[u8]) -> Result<(), BackendError> {
        self.refuse_unless_stopped("loaded")?;
        if self.vm.gate.started() {
            return Err(BackendError::Vcpu {
                message: "vCPU state is loaded only before the first run".to_owned(),
            });
        }
        state::check(bytes, self.vcpus, self.format)
    }

    fn stats(&self) -> v1::MmuStats {
        let mmu = self.vm.mmu.stats();
        let flushes = self.vm.shootdown.counts();
        let pages = |level| u64::try_from(mmu.pages_at(level)).ok();
        v1::MmuStats {
            faults_taken: Some(mmu.faults_taken),
            faults_fixed: Some(mmu.faults_fixed),
            faults_fast: Some(mmu.faults_fast),
            faults_spurious: Some(mmu.faults_spurious),
            faults_emulated: Some(mmu.faults_emulated),
            remote_tlb_flush_requests: Some(flushes.requests),
            remote_tlb_flushes: Some(flushes.reached),
            vcpu_tlb_flushes: Some(flushes.by_vcpus),
            pages_4k: pages(Level::SIZE_4K),
            pages_2m: pages(Level::SIZE_2M),
            pages_1g: pages(Level::SIZE_1G),
            table_pages: Some(self.budget.used()),
            huge_pages_split: Some(mmu.splits),
            huge_pages_recovered: Some(mmu.recovered),
            flushes: mmu.flushes.iter().map(flush_count).collect(),
            read_only_writes: Some(self.vm.read_only_writes.load(Ordering::Relaxed)),
            source: v1::CounterSource::SoftwareMmu.into(),
            faults_source: v1::CounterSource::SoftwareMmu.into(),
            ..v1::MmuStats::default()
        }
    }
}

fn flush_count(flush: &FlushStats) -> v1::TlbFlushCount {
    v1::TlbFlushCount {
        cause: flush.cause.name().to_owned(),
        ranges: flush.ranges,
        range_pages: flush.pages,
        alls: flush.alls,
    }
}

/// The MMU's format of the same name. A test holds both lists against each other.
fn stage(format: Format) -> Result<GuestStage, BackendError> {
    let known = format.to_string().parse::<GuestStage>();
    known.map_err(|error| BackendError::Unsupported {
        backend: BackendKind::Software,
        what: format!("walk tables of that format: {error}"),
    })
}

fn find(slots: &BTreeMap<u32, BackedSlot>, slot: u32) -> Result<BackedSlot, BackendError> {
    slots
        .get(&slot)
        .copied()
        .ok_or(BackendError::NoSuchSlot { slot })
}

fn flags(slot: &BackedSlot, logging: bool) -> SlotFlags {
    let mut flags = SlotFlags::empty();
    flags.set(SlotFlags::READONLY, slot.read_only);
    flags.set(SlotFlags::LOG_DIRTY, logging);
    flags
}

fn slot_error(slot: u32, error: &SlotError) -> BackendError {
    match error {
        SlotError::UnknownId { .. } => BackendError::NoSuchSlot { slot },
        error => BackendError::BadSlot {
            slot,
            message: error.to_string(),
        },
    }
}

fn refused(slot: u32, why: impl ToString) -> DirtyError {
    DirtyError::Refused {
        slot,
        message: why.to_string(),
    }
}
