//! The memory of one vCPU's dirty ring, and how it is read.
//!
//! # Protocol
//! The kernel fills entries in order and publishes each by storing DIRTY into its flags, after slot
//! and offset. The reader goes in the same order, reads an entry whose flags say DIRTY, and hands
//! it back by storing RESET. The kernel frees what was handed back when it is told to
//! (KVM_RESET_DIRTY_RINGS), again in order, by storing 0: only then is the page protected again.
//! So flags go 0, DIRTY, RESET, 0, and each change has one author. Flags are loaded with acquire
//! and stored with release, as KVM_CAP_DIRTY_LOG_RING_ACQ_REL asks for; x86-64 needs no more than
//! that for the older KVM_CAP_DIRTY_LOG_RING.
//!
//! # Invariants
//! A reader never passes an entry that is not published, nor takes one twice. One call takes at
//! most as many entries as the ring has: the kernel makes no new ones of those it was not told to
//! free.

use std::{
    io,
    ops::Deref,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use kvm_bindings::kvm_dirty_gfn;
use slat_proto::model::PAGE_SIZE;

/// The kernel published the entry.
pub(super) const DIRTY: u32 = 1 << 0;
/// It was read: the kernel may free it.
pub(super) const RESET: u32 = 1 << 1;
/// Page offset of the ring in a vCPU's descriptor, KVM_DIRTY_LOG_PAGE_OFFSET: the same on every
/// architecture that has rings.
const PAGE_OFFSET: u64 = 64;

/// A written page, as the kernel lays it out (`struct kvm_dirty_gfn`).
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) flags: AtomicU32,
    /// Slot number; the address space, always 0 here, in the upper half.
    pub(super) slot: AtomicU32,
    /// Page in the slot.
    pub(super) offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
const _: () = assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());

/// Where the reader of a ring is.
#[derive(Debug, Default)]
pub(super) struct Reader {
    next: usize,
}

impl Reader {
    /// Gives every published entry, as slot and page, to `each` and hands it back to the kernel.
    /// Returns how many.
    pub(super) fn take(&mut self, entries: &[Entry], mut each: impl FnMut(u32, u64)) -> u64 {
        for taken in 0..entries.len() {
            let entry = &entries[self.next];
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return taken as u64;
            }
            each(
                entry.slot.load(Ordering::Relaxed),
                entry.offset.load(Ordering::Relaxed),
            );
            entry.flags.store(RESET, Ordering::Release);
            self.next = (self.next + 1) % entries.len();
        }
        entries.len() as u64
    }
}

/// The ring of a vCPU, shared with the kernel.
#[derive(Debug)]
pub(super) struct Mapping {
    entries: NonNull<Entry>,
    len: usize,
}

// SAFETY: the mapping is the value's own until it is dropped, and all access to it is by atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the ring of `len` entries of a vCPU whose VM has rings of that size.
    pub(super) fn map(vcpu: &impl AsRawFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new shared mapping of the vCPU's descriptor at an address the kernel chooses.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len * size_of::<Entry>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                (PAGE_OFFSET * PAGE_SIZE) as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { entries, len })
    }
}

impl Deref for Mapping {
    type Target = [Entry];
    fn deref(&self) -> &[Entry] {
        // SAFETY: the mapping has `len` entries, is aligned to a page and lives as long as `self`;
        // an entry is atomics, so that the kernel's writes are no data race.
        unsafe { slice::from_raw_parts(self.entries.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.len * size_of::<Entry>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        thread,
    };

    use super::*;

    /// A kernel that publishes and frees as KVM does.
    struct Kernel<'a> {
        entries: &'a [Entry],
        pushed: usize,
        freed: usize,
    }

    impl<'a> Kernel<'a> {
        fn new(entries: &'a [Entry]) -> Self {
            Self {
                entries,
                pushed: 0,
                freed: 0,
            }
        }

        fn is_full(&self) -> bool {
            self.pushed - self.freed == self.entries.len()
        }

        /// Slot and offset first, the flags after them.
        fn push(&mut self, slot: u32, offset: u64) {
            assert!(!self.is_full(), "pushed into a full ring");
            let entry = &self.entries[self.pushed % self.entries.len()];
            assert_eq!(entry.flags.load(Ordering::Acquire), 0);
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.pushed += 1;
        }

        /// Frees what was handed back, in order; calls `protect` with each.
        fn reset(&mut self, mut protect: impl FnMut(u32, u64)) -> usize {
            let before = self.freed;
            while self.freed < self.pushed {
                let entry = &self.entries[self.freed % self.entries.len()];
                if entry.flags.load(Ordering::Acquire) & RESET == 0 {
                    break;
                }
                let page = (
                    entry.slot.load(Ordering::Relaxed),
                    entry.offset.load(Ordering::Relaxed),
                );
                entry.flags.store(0, Ordering::Release);
                self.freed += 1;
                protect(page.0, page.1);
            }
            self.freed - before
        }
    }

    fn ring(len: usize) -> Vec<Entry> {
        std::iter::repeat_with(Entry::default).take(len).collect()
    }

    fn taken(reader: &mut Reader, entries: &[Entry]) -> Vec<(u32, u64)> {
        let mut all = Vec::new();
        let count = reader.take(entries, |slot, page| all.push((slot, page)));
        assert_eq!(count, all.len() as u64);
        all
    }

    #[test]
    fn what_is_published_is_taken_once_and_in_order_round_and_round() {
        let entries = ring(8);
        let (mut kernel, mut reader) = (Kernel::new(&entries), Reader::default());
        let mut number = 0;
        for burst in [1, 8, 3, 8, 8, 5, 7] {
            let pushed: Vec<_> = (0..burst).map(|at| (at, number + u64::from(at))).collect();
            number += 100;
            for (slot, offset) in &pushed {
                kernel.push(*slot, *offset);
            }
            assert_eq!(taken(&mut reader, &entries), pushed);
            // Not told to free, the kernel has made no new ones: nothing comes twice.
            assert_eq!(taken(&mut reader, &entries), []);
            assert_eq!(kernel.reset(|_, _| {}), burst as usize);
        }
    }

    #[test]
    fn an_entry_that_is_not_published_ends_the_look() {
        let entries = ring(4);
        let (mut kernel, mut reader) = (Kernel::new(&entries), Reader::default());
        kernel.push(0, 1);
        // Filled in, but not published.
        entries[1].slot.store(9, Ordering::Relaxed);
        entries[1].offset.store(9, Ordering::Relaxed);
        assert_eq!(taken(&mut reader, &entries), [(0, 1)]);
        assert_eq!(taken(&mut reader, &entries), []);
        kernel.push(0, 2);
        assert_eq!(taken(&mut reader, &entries), [(0, 2)]);
    }

    /// Every order of the steps "guest writes", "reader takes" and "kernel frees" up to a depth:
    /// what was written since a page was last told of is told of again.
    #[test]
    fn no_order_of_writing_taking_and_freeing_loses_a_write() {
        const DEPTH: u32 = 9;
        const PAGES: u64 = 2;
        for order in 0..4_u32.pow(DEPTH) {
            let entries = ring(2);
            let (mut kernel, mut reader) = (Kernel::new(&entries), Reader::default());
            // Contents, as version numbers: the guest's, and the last that a reader can have read.
            let mut memory: BTreeMap<u64, u32> = BTreeMap::new();
            let mut replica: BTreeMap<u64, u32> = BTreeMap::new();
            let mut writable = BTreeSet::new();
            let mut told = BTreeSet::new();
            let mut step = order;
            for version in 1..=DEPTH {
                match step % 4 {
                    page @ (0 | 1) => {
                        let page = u64::from(page);
                        if !writable.contains(&page) {
                            if kernel.is_full() {
                                // The vCPU stops with a full ring.
                                step /= 4;
                                continue;
                            }
                            kernel.push(0, page);
                            writable.insert(page);
                        }
                        memory.insert(page, version);
                    }
                    2 => {
                        reader.take(&entries, |_, page| {
                            told.insert(page);
                        });
                    }
                    _ => {
                        // A harvest: taken, freed, and only then read.
                        reader.take(&entries, |_, page| {
                            told.insert(page);
                        });
                        kernel.reset(|_, page| {
                            writable.remove(&page);
                        });
                        for page in std::mem::take(&mut told) {
                            replica.insert(page, memory[&page]);
                        }
                    }
                }
                step /= 4;
            }
            reader.take(&entries, |_, page| {
                told.insert(page);
            });
            kernel.reset(|_, _| {});
            for page in told {
                replica.insert(page, memory[&page]);
            }
            for page in 0..PAGES {
                assert_eq!(memory.get(&page), replica.get(&page), "order {order:#x}");
            }
        }
    }

    #[test]
    fn a_kernel_on_another_thread_is_read_without_a_tear() {
        let entries = ring(64);
        const WRITES: u64 = 200_000;
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut kernel = Kernel::new(&entries);
                for number in 0..WRITES {
                    while kernel.is_full() {
                        kernel.reset(|_, _| {});
                        thread::yield_now();
                    }
                    // Slot and page belong together.
                    kernel.push(number as u32 ^ 0x5555_5555, number);
                }
            });
            let (mut reader, mut next) = (Reader::default(), 0);
            while next < WRITES {
                reader.take(&entries, |slot, page| {
                    assert_eq!((slot ^ 0x5555_5555, page), (next as u32, next));
                    next += 1;
                });
                thread::yield_now();
            }
        });
    }
}
