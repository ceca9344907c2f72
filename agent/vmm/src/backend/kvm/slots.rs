//! Memory slots, their dirty log and invalidation.
//!
//! # Protocol
//! A slot's memory stays mapped until the kernel has let go of the slot. With manual protection
//! (the kernel's KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, without INITIALLY_SET so that a log starts
//! empty) a harvest has the kernel write the log into the reader's bitmap and then clears exactly
//! what it wrote: a page written in between keeps its bit. Without it the kernel clears as it
//! copies.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use slat_proto::model::{PAGE_SIZE, SlotSpec};

use super::{
    super::BackendError,
    ioctl::{clear_dirty_log, get_dirty_log},
    refuse::failed,
};
use crate::memory::{DirtyBitmap, DirtyError, GuestMemory, SlotBitmaps, SlotMemory};

/// Words of a bitmap cleared at once: 64 Ki pages, some 2 ms under the kernel's MMU lock when all
/// are dirty.
const CLEAR_WORDS: usize = 1024;

#[derive(Debug)]
struct KvmSlot {
    memory: Arc<SlotMemory>,
    logging: bool,
}

#[derive(Debug)]
pub(super) struct Slots {
    table: Mutex<BTreeMap<u32, KvmSlot>>,
    memory: GuestMemory,
    manual_protect: bool,
    read_only: bool,
    most: usize,
    end_gfn: u64,
    harvested: AtomicU64,
}

impl Slots {
    /// None yet. `end_gfn` is where the guest's physical addresses end; manual protection of the
    /// dirty log is used where the kernel has it and `manual` asks for it.
    pub(super) fn new(vm: &VmFd, end_gfn: u64, manual: bool) -> Result<Self, BackendError> {
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let manual_protect = manual && offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as i32 != 0;
        if manual_protect {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
            vm.enable_cap(&cap)
                .map_err(failed("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        }
        Ok(Self {
            table: Mutex::default(),
            memory: GuestMemory::new(),
            manual_protect,
            read_only: vm.check_extension(Cap::ReadonlyMem),
            most: usize::try_from(vm.check_extension_int(Cap::NrMemslots)).unwrap_or(32),
            end_gfn,
            harvested: AtomicU64::new(0),
        })
    }

    /// What the guest sees, for readers that must not wait for a harvest.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Dirty pages taken so far.
    pub(super) fn harvested(&self) -> u64 {
        self.harvested.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, KvmSlot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, table: &BTreeMap<u32, KvmSlot>) {
        self.memory.publish(
            table
                .values()
                .map(|slot| Arc::clone(&slot.memory))
                .collect(),
        );
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
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| match error.errno() {
            libc::EEXIST => bad(spec, "overlaps a slot that the kernel has"),
            libc::EINVAL => bad(spec, "the kernel refuses it"),
            _ => failed("KVM_SET_USER_MEMORY_REGION")(error),
        })
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
        if table.len() >= self.most {
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
        self.publish(&table);
        Ok(())
    }

    pub(super) fn remove(&self, vm: &VmFd, number: u32) -> Result<(), BackendError> {
        let mut table = self.lock();
        let slot = table
            .get(&number)
            .ok_or(BackendError::NoSuchSlot { slot: number })?;
        self.set(vm, &slot.memory, 0, false)?;
        table.remove(&number);
        self.publish(&table);
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
        slot.memory = memory;
        self.publish(&table);
        Ok(())
    }

    pub(super) fn set_logging(&self, vm: &VmFd, number: u32, on: bool) -> Result<(), DirtyError> {
        let mut table = self.lock();
        let slot = logged(&mut table, number)?;
        if slot.logging != on {
            self.set(vm, &slot.memory, slot.memory.spec().pages, on)
                .map_err(|error| of_slot(number, error))?;
            slot.logging = on;
        }
        Ok(())
    }

    pub(super) fn harvest(&self, vm: &VmFd, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
        let mut table = self.lock();
        for (number, bitmap) in into {
            self.harvest_slot(vm, logged(&mut table, *number)?, bitmap)?;
        }
        Ok(())
    }

    fn harvest_slot(
        &self,
        vm: &VmFd,
        slot: &KvmSlot,
        bitmap: &mut DirtyBitmap,
    ) -> Result<(), DirtyError> {
        let spec = slot.memory.spec();
        let (number, refused) = (spec.slot, |message: &str| DirtyError::Refused {
            slot: spec.slot,
            message: message.to_owned(),
        });
        if !slot.logging {
            return Err(refused("dirty logging is off"));
        }
        if bitmap.pages() != spec.pages {
            return Err(refused("a bitmap of another length"));
        }
        let kernel = |op| {
            move |source| DirtyError::Kernel {
                slot: number,
                op,
                source,
            }
        };
        // How many bits the kernel sets it does not say.
        let all = |()| u64::MAX;
        let taken = bitmap.load(|words| get_dirty_log(vm, number, spec.pages, words).map(all));
        // Without manual protection the log is taken by now: nothing below may fail then.
        let taken = taken.map_err(kernel("KVM_GET_DIRTY_LOG"))?;
        let mut from = 0;
        while self.manual_protect
            && let Some((word, words)) = bitmap.next_piece(from, CLEAR_WORDS)
        {
            let first = word as u64 * 64;
            // At most 64 Ki; shorter only where the slot ends.
            let pages = (spec.pages - first).min(words.len() as u64 * 64) as u32;
            // What is not cleared is told again by the next harvest.
            clear_dirty_log(vm, number, first, pages, words)
                .map_err(kernel("KVM_CLEAR_DIRTY_LOG"))?;
            from = word + CLEAR_WORDS;
        }
        self.harvested.fetch_add(taken, Ordering::Relaxed);
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

fn logged(table: &mut BTreeMap<u32, KvmSlot>, slot: u32) -> Result<&mut KvmSlot, DirtyError> {
    table.get_mut(&slot).ok_or(DirtyError::NoSuchSlot { slot })
}

/// A change of a slot's flags was refused.
fn of_slot(slot: u32, error: BackendError) -> DirtyError {
    match error {
        BackendError::Ioctl { op, source } => DirtyError::Kernel { slot, op, source },
        BackendError::BadSlot { message, .. } => DirtyError::Refused { slot, message },
        error => DirtyError::Refused {
            slot,
            message: error.to_string(),
        },
    }
}

fn bad(spec: SlotSpec, message: impl Into<String>) -> BackendError {
    BackendError::BadSlot {
        slot: spec.slot,
        message: message.into(),
    }
}
