//! Memory for page tables: the process's heap, counted against a bound.
//!
//! A table's frame number is its address divided by the page size, so no table has to be looked up. The bound follows the
//! slots ([`Budget::needed_for`]): a guest cannot make the process take more than twice what its memory mapped by 4 KiB pages
//! costs, half a per cent of it.
//!
//! *Locking*: none; the count is atomic. *Invariant*: `used` is never above `limit` by an allocation, though `limit` may be
//! set below `used`; then nothing is given out until enough came back.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ptr::{NonNull, with_exposed_provenance_mut},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use slat_mmu::{PAGE_SHIFT, PAGE_SIZE, Pfn, TableMemory};

/// Frame numbers that every format can hold are below this.
const PFN_LIMIT: u64 = 1 << 40;
/// Entries of a table, and so pages under a last-level one.
const ENTRIES: u64 = 512;
/// Frames of the largest root.
const ROOT_FRAMES: u64 = 4;
/// On top of it all: tables that were removed and wait for readers.
const SLACK: u64 = 64;

/// How many frames tables take and may take.
#[derive(Debug, Default)]
pub(super) struct Budget {
    limit: AtomicU64,
    used: AtomicU64,
}

impl Budget {
    /// Frames that tables for slots of these lengths (pages) need at most, wherever the slots are.
    pub(super) fn needed_for(slots: impl Iterator<Item = u64>) -> u64 {
        slots.fold(ROOT_FRAMES, |sum, pages| {
            // Four levels below a root of five; a slot may begin in the middle of a table.
            let levels = (1..=4).map(|level| pages.div_ceil(ENTRIES.pow(level)) + 1);
            sum + levels.sum::<u64>()
        })
    }

    /// Allows what the slots need on top of as much that slots elsewhere left behind.
    pub(super) fn allow(&self, needed: u64) {
        self.limit.store(2 * needed + SLACK, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn limit_for_test(&self, frames: u64) {
        self.limit.store(frames, Relaxed);
    }

    /// Frames in use.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    fn take(&self, frames: u64) -> bool {
        let limit = self.limit.load(Relaxed);
        self.used
            .fetch_update(Relaxed, Relaxed, |used| {
                used.checked_add(frames).filter(|sum| *sum <= limit)
            })
            .is_ok()
    }

    fn give_back(&self, frames: u64) {
        self.used.fetch_sub(frames, Relaxed);
    }
}

/// Table memory on the heap, within a budget.
#[derive(Debug)]
pub(super) struct TableHeap(pub(super) Arc<Budget>);

fn layout(bytes: usize) -> Option<Layout> {
    let whole = bytes.is_power_of_two() && bytes as u64 >= PAGE_SIZE;
    whole
        .then(|| Layout::from_size_align(bytes, bytes).ok())
        .flatten()
}

fn address(pfn: Pfn) -> *mut u8 {
    with_exposed_provenance_mut((pfn.0 << PAGE_SHIFT) as usize)
}

// SAFETY: (1) the allocator hands out disjoint blocks, aligned to their size by their layout, until they are deallocated.
// (2) `entries` is the block's address, the same each time, with the provenance exposed in `allocate`; it was zeroed whole.
// (3) The pointer is given to nobody else.
unsafe impl TableMemory for TableHeap {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        let layout = layout(bytes)?;
        let frames = bytes as u64 >> PAGE_SHIFT;
        if !self.0.take(frames) {
            return None;
        }
        // SAFETY: the layout's size is not 0.
        let block = unsafe { alloc_zeroed(layout) };
        let pfn = Pfn(block.expose_provenance() as u64 >> PAGE_SHIFT);
        if block.is_null() || pfn.0 >= PFN_LIMIT {
            if !block.is_null() {
                // SAFETY: allocated above with this layout, and given to nobody.
                unsafe { dealloc(block, layout) };
            }
            self.0.give_back(frames);
            return None;
        }
        Some(pfn)
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        if let Some(layout) = layout(bytes) {
            // SAFETY: the caller says that it came from `allocate` with these bytes and is used no more.
            unsafe { dealloc(address(pfn), layout) };
            self.0.give_back(bytes as u64 >> PAGE_SHIFT);
        }
    }

    fn entries(&self, pfn: Pfn) -> NonNull<AtomicU64> {
        NonNull::new(address(pfn).cast()).unwrap_or(NonNull::dangling())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_a_percent_and_no_more() {
        let budget = Budget::needed_for([1 << 18].into_iter());
        assert!((512..=524).contains(&budget), "{budget}");
        let heap = TableHeap(Arc::default());
        assert_eq!(heap.allocate(4096), None);
        heap.0.allow(0);
        let blocks: Vec<Pfn> = std::iter::from_fn(|| heap.allocate(16384)).collect();
        assert_eq!(blocks.len() as u64, SLACK / 4);
        assert_eq!(heap.0.used(), SLACK);
        for block in blocks {
            assert!(block.0.is_multiple_of(4));
            // SAFETY: allocated above with this size.
            unsafe { heap.free(block, 16384) };
        }
        assert_eq!(heap.0.used(), 0);
    }
}
