//! Memory slots and invalidation. Their dirty log is in [`logging`].
//!
//! # Protocol
//! A slot's memory stays mapped until the kernel has let go of the slot, or for good where the
//! kernel does not let go.
//!
//! A slot cannot become read-only, or writable, while it exists: the kernel answers EINVAL. So it
//! is taken away and put back, which is not one step for a vCPU; whoever asks has stopped them.
//!
//! Writes to a read-only slot leave the guest as if they were for a device. They change nothing.

mod log;
mod logging;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use slat_proto::model::{PAGE_SIZE, SlotSpec};

pub(super) use self::log::Log;
use self::log::clear_all;
use super::{super::BackendError, device::uninterrupted, ring::Rings, slot_error::refused};
use crate::memory::{GuestMemory, SlotMemory};

#[derive(Debug)]
struct KvmSlot {
    memory: Arc<SlotMemory>,
    logging: bool,
}

#[derive(Debug)]
pub(super) struct Slots {
    // Before the memory, which the kernel must have let go of by then.
    log: Log,
    table: Mutex<BTreeMap<u32, KvmSlot>>,
    memory: GuestMemory,
    read_only: bool,
    most: usize,
    end_gfn: u64,
    harvested: AtomicU64,
    read_only_writes: AtomicU64,
}

impl Slots {
    /// None yet. `end_gfn` is where the guest's physical addresses end.
    pub(super) fn new(vm: &VmFd, end_gfn: u64, log: Log) -> Self {
        Self {
            log,
            table: Mutex::default(),
            memory: GuestMemory::new(),
            read_only: vm.check_extension(Cap::ReadonlyMem),
            most: usize::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(32),
            end_gfn,
            harvested: AtomicU64::new(0),
            read_only_writes: AtomicU64::new(0),
        }
    }

    /// The vCPUs' dirty rings, where the VM has them.
    pub(super) fn rings(&self) -> Option<&Rings> {
        match &self.log {
            Log::Rings(rings) => Some(rings),
            Log::Bitmap { .. } => None,
        }
    }

    /// Makes room in the dirty rings, on the thread of a vCPU whose ring is full.
    pub(super) fn relieve(&self) -> io::Result<()> {
        self.rings().map_or(Ok(()), Rings::relieve)
    }

    /// What the guest sees, for readers that must not wait for a harvest.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Dirty pages taken so far.
    pub(super) fn harvested(&self) -> u64 {
        self.harvested.load(Ordering::Relaxed)
    }

    /// Most slots, and the first number that is too high.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Whether this kernel has read-only slots.
    pub(super) fn has_read_only(&self) -> bool {
        self.read_only
    }

    /// A write of the guest that the kernel could not carry out: true, and counted, when it was for
    /// a read-only slot.
    pub(super) fn drops_write(&self, gpa: u64) -> bool {
        let table = self.memory.table();
        let slot = table.find(gpa / PAGE_SIZE);
        let drops = slot.is_some_and(|(slot, _)| slot.spec().read_only);
        if drops {
            self.read_only_writes.fetch_add(1, Ordering::Relaxed);
        }
        drops
    }

    /// Writes that were dropped so far.
    pub(super) fn read_only_writes(&self) -> u64 {
        self.read_only_writes.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, KvmSlot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the kernel about a slot; `pages` 0 takes it away.
    fn set(
        &self,
        vm: &VmFd,
        memory: &SlotMemory,
        pages: u64,
        logging: bool,
    ) -> Result<(), BackendError> {
        let spec = memory.spec();
        let region = kvm_userspace_memory_region {
            slot: spec.slot,
            flags: if spec.read_only { KVM_MEM_READONLY } else { 0 }
                | if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: spec.base_gfn * PAGE_SIZE,
            memory_size: pages * PAGE_SIZE,
            userspace_addr: memory.guest().address(),
        };
        // SAFETY: the range is a mapping of the slot's length, which the table's Arc keeps until
        // the kernel has let go of it; nothing in this process holds references into it.
        let set = || unsafe { vm.set_user_memory_region(region) };
        uninterrupted(set).map_err(refused(spec, pages))
    }

    fn check(&self, spec: SlotSpec) -> Result<(), BackendError> {
        if spec.end_gfn() > self.end_gfn {
            return Err(bad(
                spec,
                format!(
                    "ends at frame {:#x}; guest-physical space ends at {:#x}",
                    spec.end_gfn(),
                    self.end_gfn
                ),
            ));
        }
        if spec.read_only && !self.read_only {
            return Err(bad(spec, "this kernel has no read-only slots"));
        }
        Ok(())
    }

    pub(super) fn add(&self, vm: &VmFd, memory: &Arc<SlotMemory>) -> Result<(), BackendError> {
        let spec = memory.spec();
        self.check(spec)?;
        let mut table = self.lock();
        if table.len() >= self.most || spec.slot as usize >= self.most {
            return Err(bad(spec, format!("at most {} slots", self.most)));
        }
        // The kernel would take a known number for a change of that slot.
        let Entry::Vacant(place) = table.entry(spec.slot) else {
            return Err(bad(spec, "the number is taken"));
        };
        self.set(vm, memory, spec.pages, false)?;
        place.insert(KvmSlot {
            memory: Arc::clone(memory),
            logging: false,
        });
        self.memory.insert(Arc::clone(memory));
        Ok(())
    }

    pub(super) fn remove(&self, vm: &VmFd, number: u32) -> Result<(), BackendError> {
        let mut table = self.lock();
        let slot = table
            .get(&number)
            .ok_or(BackendError::NoSuchSlot { slot: number })?;
        self.set(vm, &slot.memory, 0, false)?;
        let base_gfn = slot.memory.spec().base_gfn;
        table.remove(&number);
        if let Some(rings) = self.rings() {
            rings.end(number);
        }
        self.memory.remove(base_gfn);
        Ok(())
    }

    pub(super) fn shift(&self, vm: &VmFd, number: u32, base_gfn: u64) -> Result<(), BackendError> {
        let mut table = self.lock();
        let slot = find(&mut table, number)?;
        let old = slot.memory.spec();
        let spec = SlotSpec::new(number, base_gfn, old.pages, old.read_only).map_err(|error| {
            BackendError::BadSlot {
                slot: number,
                message: error.message,
            }
        })?;
        self.check(spec)?;
        let memory = Arc::new(slot.memory.moved(spec));
        self.set(vm, &memory, spec.pages, slot.logging)?;
        slot.memory = Arc::clone(&memory);
        self.memory.replace(old.base_gfn, memory);
        Ok(())
    }

    /// Takes the slot away and puts it back with the other flag, as it logged, with an empty log,
    /// or with what rings still hold of it; or as it was, when that fails.
    pub(super) fn set_read_only(
        &self,
        vm: &VmFd,
        number: u32,
        read_only: bool,
    ) -> Result<(), BackendError> {
        let mut table = self.lock();
        let slot = find(&mut table, number)?;
        let old = Arc::clone(&slot.memory);
        if old.spec().read_only == read_only {
            return Ok(());
        }
        let spec = SlotSpec {
            read_only,
            ..old.spec()
        };
        self.check(spec)?;
        let (new, logging) = (Arc::new(old.moved(spec)), slot.logging);
        self.set(vm, &old, 0, false)?;
        let error = match self.put_back(vm, &new, logging) {
            Ok(()) => {
                slot.memory = Arc::clone(&new);
                self.memory.replace(spec.base_gfn, new);
                return Ok(());
            }
            Err(error) => error,
        };
        // It may be there: only emptying its log failed.
        let again = if self.is_gone(vm, &new) {
            match self.put_back(vm, &old, logging) {
                Ok(()) => return Err(error),
                Err(again) => again.to_string(),
            }
        } else {
            "the kernel does not let go of it".to_owned()
        };
        // What the kernel may still have stays in the table, and its memory mapped: another mapping
        // at the same address would be the guest's.
        if self.is_gone(vm, &old) {
            table.remove(&number);
        } else {
            tracing::error!(
                slot = number,
                "the kernel keeps a slot that is lost to its VM"
            );
        }
        if let Some(rings) = self.rings() {
            rings.end(number);
        }
        self.memory.remove(spec.base_gfn);
        Err(BackendError::SlotLost {
            slot: number,
            message: format!("{error}; as it was: {again}"),
        })
    }

    /// Takes a slot away that may be there. Whether the kernel has none of this number now: of one
    /// that it does not have it says EINVAL.
    fn is_gone(&self, vm: &VmFd, memory: &SlotMemory) -> bool {
        match self.set(vm, memory, 0, false) {
            Ok(()) | Err(BackendError::BadSlot { .. }) => true,
            Err(error) => {
                tracing::error!(%error, "a slot that should go");
                false
            }
        }
    }

    /// Adds a slot that the kernel does not have, with an empty log where it logs.
    fn put_back(&self, vm: &VmFd, memory: &SlotMemory, logging: bool) -> Result<(), BackendError> {
        let spec = memory.spec();
        self.set(vm, memory, spec.pages, logging)?;
        if logging && matches!(self.log, Log::Bitmap { full: true, .. }) {
            clear_all(vm, spec.slot, 0, spec.pages)?;
        }
        Ok(())
    }

    /// Drops the mappings of `[gfn, gfn + pages)`. The kernel's notifier zaps the second stage and
    /// flushes before the call returns.
    pub(super) fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError> {
        let end = gfn.saturating_add(pages);
        for slot in self.memory.table().slots() {
            let spec = slot.spec();
            let (from, to) = (gfn.max(spec.base_gfn), end.min(spec.end_gfn()));
            if from < to {
                slot.guest()
                    .drop_mappings(from - spec.base_gfn, to - from)
                    .map_err(|source: io::Error| BackendError::Ioctl {
                        op: "madvise(MADV_DONTNEED)",
                        source,
                    })?;
            }
        }
        Ok(())
    }
}

fn find(table: &mut BTreeMap<u32, KvmSlot>, number: u32) -> Result<&mut KvmSlot, BackendError> {
    table
        .get_mut(&number)
        .ok_or(BackendError::NoSuchSlot { slot: number })
}

fn bad(spec: SlotSpec, message: impl Into<String>) -> BackendError {
    BackendError::BadSlot {
        slot: spec.slot,
        message: message.into(),
    }
}
