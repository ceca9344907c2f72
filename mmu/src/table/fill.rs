//! Blank memory becomes a table.
//!
//! *Locking*: none: the memory is the caller's alone until an entry links it.

use core::ptr::NonNull;

use super::{
    memory::{EntryCell, TableMemory},
    tables::Tables,
    ticket::{Blank, Unlinked},
};
#[cfg(any(feature = "loom", feature = "shuttle"))]
use crate::sync::Relaxed;
use crate::{addr::Level, format::Format};

impl Blank {
    /// Writes all entries of a table of `level`; a value that would be a table becomes empty.
    #[inline(always)]
    pub(crate) fn fill<F: Format, H: TableMemory>(
        self,
        tables: &Tables<F, H>,
        level: Level,
        value: impl Fn(usize) -> u64,
    ) -> Unlinked {
        assert!(
            F::index_bits(level) <= F::INDEX_BITS[0],
            "a wide root does not fit into this memory"
        );
        let (pfn, bottom) = (self.pfn, level == Level::SIZE_4K);
        // SAFETY: the ticket exists, so the memory is allocated.
        let first = unsafe { tables.memory().entries(pfn) };
        for index in 0..F::entries(level) {
            let raw = value(index);
            let raw = if !bottom && F::as_table(raw, level).is_some() {
                F::EMPTY
            } else {
                raw
            };
            // SAFETY: the ticket exists, so the memory is ours alone, and as long as every table's
            // that is not a root; nobody reads it before it is linked.
            unsafe { init(first.add(index), raw) };
        }
        Unlinked { pfn, level }
    }
}

/// Makes an entry that nobody else knows hold `raw`.
///
/// # Safety
///
/// `entry` is valid, and used by nobody else.
#[inline(always)]
unsafe fn init(entry: NonNull<EntryCell>, raw: u64) {
    // A plain write, so that a loop of them is as fast as memory.
    #[cfg(not(any(feature = "loom", feature = "shuttle")))]
    // SAFETY: the caller's promise.
    unsafe {
        entry.write(EntryCell::new(raw));
    }
    // Model checkers keep their own record of each atomic, which a plain write would lose.
    #[cfg(any(feature = "loom", feature = "shuttle"))]
    // SAFETY: the caller's promise.
    unsafe {
        entry.as_ref().0.store(raw, Relaxed);
    }
}
