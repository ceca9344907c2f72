//! The dirty ring: each vCPU logs the pages it writes in a ring of its own ([`entries`]).
//!
//! # Protocol
//! Rings are asked for before the VM has vCPUs, and mapped from each vCPU. A harvest makes every
//! vCPU leave the guest first ([`Threads::leave_guest`](super::vcpu::Threads::leave_guest)), for a
//! CPU that logs writes in a buffer of its own (PML) hands it over only then; then it takes what
//! the rings have, has the kernel free it (which protects the pages and flushes), and delivers it.
//!
//! A vCPU whose ring is full leaves the guest with KVM_EXIT_DIRTY_RING_FULL. Its own thread moves
//! what all rings have into bitmaps that are held back here, one a slot, has the entries freed and
//! goes on; the next harvest delivers those too. So nothing is lost however late a reader comes,
//! and a vCPU waits for at most one harvest of the rings, never for a reader.
//!
//! # Locking
//! One lock over readers and held-back bitmaps, held from the taking of entries to the end of the
//! call that frees them. A page must not be delivered between the two: what the guest writes there
//! is logged nowhere, so a page may only be read after the call. The lock is taken after the slot
//! table's; nothing else is taken under it.
//!
//! # Invariants
//! An entry of a slot that does not log is dropped. Turning logging on or off and taking a slot
//! away empties the rings, so what is left of one log is never taken for the next one's.
//! `unfreed` is the number of entries that were handed back and that the kernel has not freed.

mod entries;

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};

use self::entries::{Entry, Mapping, Reader};
use super::{super::BackendError, ioctl::reset_dirty_rings, refuse::failed};
use crate::memory::{DirtyBitmap, DirtyError, SlotBitmaps};

/// Entries of a vCPU's ring: 256 MiB of memory written before it is full, in 1 MiB of the kernel's.
/// The kernel's own most. A host that offers less gives less.
pub(super) const ENTRIES: usize = 1 << 16;

/// How often a freeing that a signal cut short is gone on with.
const ATTEMPTS: u32 = 1000;

/// What the kernel offers, asked of the VM: entries of a ring at most, and by which capability. The
/// one with the stricter order comes first; there may be only that.
fn offered(vm: &VmFd) -> Option<(usize, u32)> {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .find_map(|cap| {
            let bytes = usize::try_from(vm.check_extension_raw(cap.into())).ok()?;
            (bytes > 0).then_some((bytes / size_of::<Entry>(), cap))
        })
}

/// Whether a VM can have rings.
pub(super) fn is_offered(vm: &VmFd) -> bool {
    offered(vm).is_some()
}

#[derive(Debug)]
struct Ring {
    entries: Mapping,
    reader: Reader,
}

#[derive(Debug, Default)]
struct State {
    rings: Vec<Ring>,
    /// Of the slots that log: what was taken and not yet delivered.
    held: SlotBitmaps,
    unfreed: u64,
}

/// The rings of a VM's vCPUs. See the module.
#[derive(Debug)]
pub(super) struct Rings {
    vm: Arc<VmFd>,
    entries: usize,
    state: Mutex<State>,
    /// How often a vCPU stopped because its ring was full.
    full: AtomicU64,
}

impl Rings {
    /// Gives a VM without vCPUs rings of at most `entries` each; `None` where the kernel has none.
    pub(super) fn enable(vm: &Arc<VmFd>, entries: usize) -> Result<Option<Self>, BackendError> {
        let Some((most, cap)) = offered(vm) else {
            return Ok(None);
        };
        let entries = entries.min(most);
        let mut enable = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        enable.args[0] = (entries * size_of::<Entry>()) as u64;
        vm.enable_cap(&enable)
            .map_err(failed("KVM_CAP_DIRTY_LOG_RING"))?;
        Ok(Some(Self {
            vm: Arc::clone(vm),
            entries,
            state: Mutex::default(),
            full: AtomicU64::new(0),
        }))
    }

    /// Maps the ring of the next vCPU.
    pub(super) fn map(&self, vcpu: &VcpuFd) -> Result<(), BackendError> {
        let entries = Mapping::map(vcpu, self.entries).map_err(|source| BackendError::Ioctl {
            op: "mmap of a dirty ring",
            source,
        })?;
        self.lock().rings.push(Ring {
            entries,
            reader: Reader::default(),
        });
        Ok(())
    }

    /// Entries of each ring.
    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// How often a vCPU stopped because its ring was full.
    #[cfg(test)]
    pub(super) fn times_full(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a slot's logging goes on: what the rings have is of another log.
    pub(super) fn begin(&self, slot: u32, pages: u64) -> Result<(), DirtyError> {
        let mut state = self.lock();
        state.held.remove(&slot);
        self.drain(&mut state).map_err(of(slot))?;
        state.held.insert(slot, DirtyBitmap::new(pages));
        Ok(())
    }

    /// After a slot's logging went off, or the slot itself: nobody wants what is left of it. An
    /// error leaves entries that are dropped later.
    pub(super) fn end(&self, slot: u32) {
        let mut state = self.lock();
        state.held.remove(&slot);
        if let Err(error) = self.drain(&mut state) {
            tracing::warn!(%error, slot, "dirty rings are not emptied");
        }
    }

    /// Takes everything and delivers it to `into`, which has an empty bitmap for every slot that
    /// logs. Returns how many pages.
    pub(super) fn harvest(&self, into: &mut SlotBitmaps) -> Result<u64, DirtyError> {
        let mut state = self.lock();
        for (slot, bitmap) in into.iter() {
            let refused = |message: &str| DirtyError::Refused {
                slot: *slot,
                message: message.to_owned(),
            };
            match state.held.get(slot) {
                None => return Err(refused("dirty logging is off")),
                Some(held) if held.pages() != bitmap.pages() => {
                    return Err(refused("a bitmap of another length"));
                }
                Some(_) => {}
            }
        }
        let first = into.keys().next().copied().unwrap_or(0);
        self.drain(&mut state).map_err(of(first))?;
        let mut taken = 0;
        for (slot, bitmap) in into {
            if let Some(held) = state.held.get_mut(slot) {
                std::mem::swap(held, bitmap);
                taken += bitmap.count();
            }
        }
        Ok(taken)
    }

    /// Makes room, on the thread of a vCPU whose ring is full.
    pub(super) fn relieve(&self) -> io::Result<()> {
        self.full.fetch_add(1, Ordering::Relaxed);
        self.drain(&mut self.lock())
    }

    /// Moves what all rings have into the held-back bitmaps, and has the entries freed. When that
    /// fails, what was taken is held all the same, and the next call goes on with the freeing.
    fn drain(&self, state: &mut State) -> io::Result<()> {
        let State {
            rings,
            held,
            unfreed,
        } = state;
        for ring in rings {
            *unfreed += ring.reader.take(&ring.entries, |slot, page| {
                if let Some(bitmap) = held.get_mut(&slot)
                    && page < bitmap.pages()
                {
                    bitmap.set(page, 1);
                }
            });
        }
        // A signal, such as the one that stops vCPUs, ends the call early.
        for _ in 0..ATTEMPTS {
            if *unfreed == 0 {
                return Ok(());
            }
            match reset_dirty_rings(&*self.vm) {
                Ok(freed) => *unfreed = unfreed.saturating_sub(freed),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }
}

fn of(slot: u32) -> impl Fn(io::Error) -> DirtyError {
    move |source| DirtyError::Kernel {
        slot,
        op: "KVM_RESET_DIRTY_RINGS",
        source,
    }
}
