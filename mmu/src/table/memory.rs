//! The host's side of table memory.

use alloc::sync::Arc;
use core::ptr::NonNull;

use super::header::Header;
use crate::{addr::Pfn, sync::EntryWord};

/// One entry of a table: 64 bits that the MMU, and a hardware walker, change atomically.
///
/// An `AtomicU64`; under the features `loom` and `shuttle` that crate's. Hosts only provide memory
/// for entries and hand out pointers to them.
#[derive(Debug)]
#[repr(transparent)]
pub struct EntryCell(pub(crate) EntryWord);

impl EntryCell {
    /// An entry that holds `raw`.
    #[cfg(not(feature = "loom"))]
    pub const fn new(raw: u64) -> Self {
        Self(EntryWord::new(raw))
    }

    /// An entry that holds `raw`.
    #[cfg(feature = "loom")]
    pub fn new(raw: u64) -> Self {
        Self(EntryWord::new(raw))
    }

    /// Overwrites an entry that nobody may use any more, for models: loom fails if any use of it
    /// does not happen before this, and each use after it.
    #[cfg(feature = "loom")]
    pub fn poison(&mut self) {
        self.0.with_mut(|raw| *raw = u64::MAX);
    }

    /// What it holds now.
    pub fn load(&self) -> u64 {
        self.0.load(crate::sync::Acquire)
    }

    /// Makes it hold `raw`. A walker that sees `raw` sees what was stored before it.
    ///
    /// For memory that no MMU uses as a table: to lay tables by hand for a walker, or to clear
    /// frames before they are lent to [`TableMemory`] and after they have come back. From
    /// [`allocate`](TableMemory::allocate) until [`free`](TableMemory::free) entries are the MMU's
    /// alone; a store there breaks the promise that the implementing type has made (4).
    pub fn store(&self, raw: u64) {
        self.0.store(raw, crate::sync::Release);
    }
}

/// Where the MMU gets frames for its tables.
///
/// A bare-metal hypervisor answers with RAM that the hardware walker reads; tests and the software
/// backend with an [`Arena`](crate::Arena). [`allocate`](Self::allocate) is called without the MMU
/// lock where it can be (vCPUs fill their caches first, splits let go of it), so it may take its
/// time; none may call back into the MMU.
///
/// # Safety
///
/// For as long as the implementing value lives:
///
/// 1. a frame range returned by [`allocate`](Self::allocate) is owned by the caller until
///    [`free`](Self::free), starts at a physical address that is a multiple of its size, and is
///    disjoint from every other such range;
/// 2. for the first frame of such a range, [`entries`](Self::entries) always returns the same
///    pointer, aligned to 8 bytes and valid for atomic reads and writes of `bytes / 8` values,
///    initialised to anything;
/// 3. if tables are [`DIRECTLY_MAPPED`](Self::DIRECTLY_MAPPED), [`direct_map`](Self::direct_map)
///    always returns the same, and `entries(pfn)` is that `.wrapping_byte_add(pfn.hpa())`;
/// 4. no software but the MMU writes there. Hardware may set Accessed and Dirty bits.
pub unsafe trait TableMemory: Send + Sync {
    /// Takes `bytes` (a power of two) of memory aligned to `bytes`, or `None` if there is none.
    fn allocate(&self, bytes: usize) -> Option<Pfn>;

    /// Gives memory back.
    ///
    /// # Safety
    ///
    /// `pfn` came from [`allocate`](Self::allocate) with the same `bytes`, was not freed since, and
    /// neither the caller nor a hardware walker uses it any more.
    unsafe fn free(&self, pfn: Pfn, bytes: usize);

    /// Gives several pieces of `bytes` each back; for hosts that can do better than one by one.
    ///
    /// # Safety
    ///
    /// As for [`free`](Self::free), of each.
    unsafe fn free_all(&self, pfns: &[Pfn], bytes: usize) {
        for &pfn in pfns {
            // SAFETY: the caller's promise.
            unsafe { self.free(pfn, bytes) };
        }
    }

    /// The entries of a table whose first frame is `pfn`: arithmetic, please, because every walk
    /// asks once a level.
    ///
    /// # Safety
    ///
    /// [`allocate`](Self::allocate) returned `pfn`, and it was not freed since.
    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell>;

    /// Every table lies at its physical address plus one offset, which
    /// [`direct_map`](Self::direct_map) tells: a walk then needs an addition a level and no call.
    const DIRECTLY_MAPPED: bool = false;

    /// Where frame 0 would be, if tables are [`DIRECTLY_MAPPED`](Self::DIRECTLY_MAPPED); not asked
    /// for otherwise.
    fn direct_map(&self) -> *mut EntryCell {
        core::ptr::null_mut()
    }

    /// The header of a frame of table memory: always the same one for the same frame. For a frame
    /// that this memory has never given out it may be a header of its own that nobody describes, so
    /// that any number may be asked about.
    fn header(&self, pfn: Pfn) -> &Header;
}

// SAFETY: everything is the inner value's, which lives at least as long as the `Arc`.
unsafe impl<T: TableMemory> TableMemory for Arc<T> {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        (**self).allocate(bytes)
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        // SAFETY: the caller's promise is the inner value's condition.
        unsafe { (**self).free(pfn, bytes) }
    }

    unsafe fn free_all(&self, pfns: &[Pfn], bytes: usize) {
        // SAFETY: the caller's promise is the inner value's condition.
        unsafe { (**self).free_all(pfns, bytes) }
    }

    #[inline(always)]
    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        // SAFETY: the caller's promise is the inner value's condition.
        unsafe { (**self).entries(pfn) }
    }

    const DIRECTLY_MAPPED: bool = T::DIRECTLY_MAPPED;

    #[inline(always)]
    fn direct_map(&self) -> *mut EntryCell {
        (**self).direct_map()
    }

    #[inline(always)]
    fn header(&self, pfn: Pfn) -> &Header {
        (**self).header(pfn)
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use std::{sync::atomic::AtomicBool, thread};

    use super::*;

    #[test]
    fn a_store_replaces_all_that_was_there() {
        let entry = EntryCell::new(u64::MAX);
        for raw in [0x1234, 0, 1 << 63] {
            entry.store(raw);
            assert_eq!(entry.load(), raw);
        }
    }

    /// A table laid by hand, and a walker that sees the entry that links it.
    #[test]
    fn who_sees_a_stored_entry_sees_what_was_stored_before() {
        let (table, link) = ([const { EntryCell::new(0) }; 8], EntryCell::new(0));
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..2000 {
                    for entry in &table {
                        entry.store(round);
                    }
                    link.store(round);
                }
                stop.store(true, core::sync::atomic::Ordering::Relaxed);
            });
            while !stop.load(core::sync::atomic::Ordering::Relaxed) {
                let linked = link.load();
                assert!(table.iter().all(|entry| entry.load() >= linked));
            }
        });
        assert_eq!((link.load(), table[7].load()), (1999, 1999));
    }
}
