//! What KVM itself costs, for `cargo xtask bench kvm`: a VM in the benchmark's own process, whose
//! slots and dirty log are used by plain kernel calls, with nothing of Slat between.
//!
//! The guest, its memory and its vCPU are those of every VM on KVM, so that the kernel has the same
//! to do in both; what is compared is what stands above. One thread calls.
//!
//! # Invariants
//! Logging is by bitmaps with manual protection, as a VM's is. A spare slot's memory is a part of
//! one mapping, which lives until the VM's descriptor is closed.

use std::{
    fmt, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use slat_proto::{
    ApiError, Reason,
    model::{
        BackendKind, DirtyEngine, GuestSpec, MemoryBacking, MemstressSpec, PAGE_SIZE, SlotSpec,
        VmSpec, slots_for_memory,
    },
};

use super::{
    super::{Backend as _, BackendError, EventSink},
    ioctl::{clear_dirty_log, get_dirty_log},
    vm::KvmBackend,
};
use crate::{
    guest::{self, memstress::counters},
    memory::{DirtySource as _, GuestMemory, SlotMemory},
};

/// Bound on a guest's pass over its memory.
const PASS_LIMIT: Duration = Duration::from_secs(120);
/// Numbers of spare slots begin here.
const SPARE: u32 = 8;

/// See the module.
pub struct RawVm {
    // Before the memory, which the kernel must have let go of by then.
    backend: KvmBackend,
    memory: GuestMemory,
    bitmaps: Vec<Vec<u64>>,
    spare: SlotMemory,
    spares: u32,
}

impl fmt::Debug for RawVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawVm").finish_non_exhaustive()
    }
}

/// A slot beside the VM's own.
#[derive(Clone, Copy, Debug)]
pub struct SpareSlot {
    /// Which of them, from 0.
    pub index: u32,
    /// Where its first frame is.
    pub base_gfn: u64,
    /// Whether the guest's writes change nothing.
    pub read_only: bool,
}

impl RawVm {
    /// A stopped VM of one vCPU, whose guest writes its memory page by page as fast as it can.
    /// `spares` slots of `spare_pages` can be added to it.
    ///
    /// # Errors
    /// What the kernel refuses, or that its log has no manual protection.
    pub fn new(memory_bytes: u64, spares: u32, spare_pages: u64) -> Result<Self, ApiError> {
        let spec = VmSpec {
            memory_bytes,
            vcpus: 1,
            backend: Some(BackendKind::Kvm),
            format: None,
            dirty_engine: Some(DirtyEngine::Bitmap),
            backing: MemoryBacking::Auto,
            numa_node: None,
            prefault: false,
            paging: slat_proto::model::Paging::Kernel,
            guest: GuestSpec::Memstress(MemstressSpec::default()),
            labels: Default::default(),
        };
        let events: EventSink = Arc::new(|_| {});
        let backend = KvmBackend::new(&spec, events, None)?;
        let memory = GuestMemory::new();
        let mut slots = Vec::new();
        for slot in slots_for_memory(memory_bytes)? {
            let slot = Arc::new(SlotMemory::new(slot).map_err(no_memory)?);
            backend.add_slot(&slot)?;
            slots.push(slot);
        }
        let words = |slot: &Arc<SlotMemory>| vec![0; slot.spec().pages.div_ceil(64) as usize];
        let bitmaps = slots.iter().map(words).collect();
        memory.publish(slots);
        guest::install(&memory.table(), &spec)?;
        let spares = spares.max(1);
        let spare = SlotSpec::new(SPARE, 0, spare_pages * u64::from(spares), false)?;
        let spare = SlotMemory::new(spare).map_err(no_memory)?;
        Ok(Self {
            backend,
            memory,
            bitmaps,
            spare,
            spares,
        })
    }

    /// Gives all memory its pages, of 2 MiB where they are to be had.
    ///
    /// # Errors
    /// When memory is short.
    pub fn populate(&self) -> Result<(), ApiError> {
        let table = self.memory.table();
        let mut slots = table.slots().iter();
        slots.try_for_each(|slot| slot.populate(0, slot.spec().pages).map_err(no_memory))
    }

    /// Turns dirty logging on, with an empty log.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn log(&self) -> Result<(), ApiError> {
        for slot in self.memory.table().slots() {
            self.backend.set_dirty_logging(slot.spec().slot, true)?;
        }
        Ok(())
    }

    /// Lets the guest write every page it works on, and stops it.
    ///
    /// # Errors
    /// When it does not within two minutes.
    pub fn write_all(&self) -> Result<(), ApiError> {
        let table = self.memory.table();
        let now = || {
            counters(&table, 1)
                .ok_or_else(|| ApiError::new(Reason::Internal, "the guest has no counters"))
        };
        let before = now()?;
        self.backend.run()?;
        let begun = Instant::now();
        while now()?.pages_written < before.pages_written + before.pages {
            if begun.elapsed() > PASS_LIMIT {
                return Err(ApiError::new(Reason::Internal, "the guest does not write"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.backend.pause()?;
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG of each slot, and KVM_CLEAR_DIRTY_LOG of what it told, a call each.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn get_and_clear(&mut self) -> Result<(), ApiError> {
        let table = self.memory.table();
        for (slot, bitmap) in table.slots().iter().zip(&mut self.bitmaps) {
            let spec = slot.spec();
            get_dirty_log(&*self.backend.vm, spec.slot, spec.pages, bitmap)
                .map_err(call("KVM_GET_DIRTY_LOG"))?;
            let pages = u32::try_from(spec.pages).unwrap_or(u32::MAX);
            clear_dirty_log(&*self.backend.vm, spec.slot, 0, pages, bitmap)
                .map_err(call("KVM_CLEAR_DIRTY_LOG"))?;
        }
        Ok(())
    }

    /// Pages that the last [`RawVm::get_and_clear`] found dirty.
    #[must_use]
    pub fn found(&self) -> u64 {
        let words = self.bitmaps.iter().flatten();
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds or moves a spare slot: KVM_SET_USER_MEMORY_REGION and nothing else.
    ///
    /// # Errors
    /// What the kernel refuses.
    ///
    /// # Panics
    /// When there is no such spare.
    pub fn set(&self, slot: SpareSlot) -> Result<(), ApiError> {
        self.region(slot, true)
    }

    /// Takes a spare slot away, likewise.
    ///
    /// # Errors
    /// What the kernel refuses.
    ///
    /// # Panics
    /// When there is no such spare.
    pub fn delete(&self, slot: SpareSlot) -> Result<(), ApiError> {
        self.region(slot, false)
    }

    fn region(&self, slot: SpareSlot, there: bool) -> Result<(), ApiError> {
        assert!(slot.index < self.spares, "no spare slot {}", slot.index);
        let pages = self.spare.spec().pages / u64::from(self.spares);
        let first = u64::from(slot.index) * pages;
        let region = kvm_userspace_memory_region {
            slot: SPARE + slot.index,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.base_gfn * PAGE_SIZE,
            memory_size: if there { pages * PAGE_SIZE } else { 0 },
            userspace_addr: self.spare.guest().address() + first * PAGE_SIZE,
        };
        // SAFETY: a part of the spare memory's mapping, as just asserted, which outlives the VM's
        // descriptor; nothing in this process holds references into it.
        let set = unsafe { self.backend.vm.set_user_memory_region(region) };
        set.map_err(|error| call("KVM_SET_USER_MEMORY_REGION")(error.into()))
    }
}

fn call(op: &'static str) -> impl Fn(io::Error) -> ApiError {
    move |source| BackendError::Ioctl { op, source }.into()
}

fn no_memory(error: io::Error) -> ApiError {
    ApiError::new(Reason::NoMemory, error.to_string())
}
