//! Memory for page tables: 2 MiB extents out of one reserved range of addresses, counted against a
//! bound.
//!
//! A table's frame number is its address divided by the page size, so no table has to be looked up.
//! The first frames of an extent hold the headers of all its frames: a header is found from the
//! frame number by arithmetic, and a number that is not of an extent in use gets a spare header.
//! The range is reserved without memory; an extent gets memory when the ones before are full, page
//! by page as the kernel sees it touched, and gives it back when no table is left in it.
//!
//! The bound follows the slots ([`Budget::needed_for`]): a guest cannot make the process take more
//! than twice what its memory mapped by 4 KiB pages costs, 0.5 % of it, and what its
//! vCPUs keep in stock.
//!
//! *Locking*: the lists of free frames are behind one lock, held for a push or a pop (and once in
//! 508 frames for a system call). vCPUs fetch tables by the dozen, outside the MMU's lock. The
//! count and the number of extents are atomic. *Invariants*: a frame is in exactly one of: an
//! allocation, a free list, the untouched rest, an extent's headers. `used` is never above `limit`
//! by an allocation, though `limit` may be set below `used`; then nothing is given out until enough
//! came back.

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap,
};
use slat_mmu::{EntryCell, Header, PAGE_SHIFT, PAGE_SIZE, Pfn, TableMemory};

/// Frame numbers that every format can hold are below this.
const PFN_LIMIT: u64 = 1 << 40;
/// Entries of a table, and so pages under a last-level one.
const ENTRIES: u64 = 512;
/// Frames of the largest root.
const ROOT_FRAMES: u64 = 4;
/// On top of it all: tables that were removed and wait for readers, what a harvest keeps ready, and
/// what it leaves for faults ([`slat_mmu::MmuConfig::fault_reserve`]).
const SLACK: u64 = 128;
/// Tables that a vCPU keeps ready for its next faults, at most.
const VCPU_STOCK: u64 = 32;

/// Frames of an extent.
const EXTENT: usize = 512;
const EXTENT_BYTES: usize = EXTENT << PAGE_SHIFT;
/// Extents that the range holds: 16 GiB of tables, which map 8 TiB by 4 KiB pages.
const EXTENTS: usize = 1 << 13;
/// Frames of an extent that hold headers.
const HEADER_FRAMES: usize = EXTENT * size_of::<Header>() / PAGE_SIZE as usize;
/// Free lists: runs of 1, 2 and 4 frames.
const ORDERS: usize = 3;
const LONGEST: usize = 1 << (ORDERS - 1);

const _: () = assert!(HEADER_FRAMES.is_multiple_of(LONGEST) && HEADER_FRAMES < EXTENT);

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

    /// What is kept ready for vCPUs, on top of what slots need.
    pub(super) fn stock_of(vcpus: u32) -> u64 {
        u64::from(vcpus) * VCPU_STOCK
    }

    /// Allows what the slots need on top of as much that slots elsewhere left behind.
    pub(super) fn allow(&self, needed: u64) {
        self.limit_to(2 * needed + SLACK);
    }

    /// Allows so many frames in all.
    pub(super) fn limit_to(&self, frames: u64) {
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

/// Table memory within a budget.
#[derive(Debug)]
pub(super) struct TableHeap {
    budget: Arc<Budget>,
    range: Range,
    /// Extents in use; their headers are initialised.
    extents: AtomicUsize,
    /// For frames that are not in them.
    spare: Header,
    free: Mutex<Free>,
}

/// The reserved addresses.
#[derive(Debug)]
struct Range {
    mapped: NonNull<u8>,
    len: usize,
    /// First address in it that is a multiple of an extent's size.
    base: NonNull<u8>,
}

// SAFETY: the pointers are to a mapping that lives as long as the value; what is in it is atomics
// only.
unsafe impl Send for Range {}
// SAFETY: as above.
unsafe impl Sync for Range {}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: mapped by `reserve` with this length. Pointers into it live no longer than the
        // heap, by the contract of `TableMemory`.
        if let Err(error) = unsafe { munmap(self.mapped.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "table memory cannot be unmapped");
        }
    }
}

impl Range {
    fn reserve() -> io::Result<Self> {
        let len = (EXTENTS + 1) * EXTENT_BYTES;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address the kernel chooses; nothing refers to it.
        let mapped =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), flags)? };
        let mapped = NonNull::new(mapped.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let skip = mapped.as_ptr().align_offset(EXTENT_BYTES);
        // SAFETY: one extent more was mapped than is used, so the first whole one and all after it
        // are inside.
        let base = unsafe { mapped.add(skip) };
        let range = Self { mapped, len, base };
        if range.first() + (EXTENTS * EXTENT) as u64 > PFN_LIMIT {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(range)
    }

    /// Number of the first frame.
    fn first(&self) -> u64 {
        self.base.addr().get() as u64 >> PAGE_SHIFT
    }

    /// The address of a frame counted from the first, which is below `EXTENTS * EXTENT`.
    fn frame(&self, position: usize) -> NonNull<u8> {
        debug_assert!(position < EXTENTS * EXTENT);
        // SAFETY: inside the mapping, as the caller says.
        unsafe { self.base.add(position << PAGE_SHIFT) }
    }

    /// The place of a frame's header.
    fn header(&self, position: usize) -> NonNull<Header> {
        let headers = self.frame(position - position % EXTENT).cast::<Header>();
        // SAFETY: the first frames of an extent hold a header of each of its frames.
        unsafe { headers.add(position % EXTENT) }
    }

    /// Gives an extent memory, and its frames headers.
    fn begin(&self, extent: usize) -> io::Result<()> {
        let first = extent * EXTENT;
        let (start, access) = (
            self.frame(first),
            MprotectFlags::READ | MprotectFlags::WRITE,
        );
        // SAFETY: the extent is inside our mapping, and nobody uses it yet.
        unsafe { mprotect(start.as_ptr().cast(), EXTENT_BYTES, access)? };
        for position in first..first + EXTENT {
            // SAFETY: inside the extent's header frames, aligned to the header's size, and written
            // by nobody else yet.
            unsafe { self.header(position).write(Header::default()) };
        }
        Ok(())
    }

    /// Gives the memory of an extent's tables back; they read as zeroes from here on.
    fn end(&self, extent: usize) {
        let start = self.frame(extent * EXTENT + HEADER_FRAMES);
        let bytes = (EXTENT - HEADER_FRAMES) << PAGE_SHIFT;
        // SAFETY: no table is in these frames, and no reference into them exists.
        if let Err(error) = unsafe { madvise(start.as_ptr().cast(), bytes, Advice::LinuxDontNeed) }
        {
            tracing::warn!(%error, "table memory cannot be given back");
        }
    }
}

#[derive(Debug, Default)]
struct Free {
    /// First frames of free runs, counted from the range's first, by order.
    runs: [Vec<u32>; ORDERS],
    /// First frame that was never given out, and the end of its extent.
    next: usize,
    end: usize,
    /// Frames in allocations, of each extent.
    used: Vec<u32>,
}

impl Free {
    /// A run of `1 << order` frames that starts at a multiple of its length. `more` makes the next
    /// extent usable.
    fn take(&mut self, order: usize, more: impl FnOnce(usize) -> bool) -> Option<usize> {
        let found = (order..ORDERS).find_map(|longer| Some((self.runs[longer].pop()?, longer)));
        let (run, longer) = match found {
            Some(found) => found,
            None => {
                if self.next == self.end {
                    let extent = self.used.len();
                    if extent == EXTENTS || !more(extent) {
                        return None;
                    }
                    self.used.push(0);
                    self.next = extent * EXTENT + HEADER_FRAMES;
                    self.end = (extent + 1) * EXTENT;
                }
                let run = self.next as u32;
                self.next += LONGEST;
                (run, ORDERS - 1)
            }
        };
        for part in order..longer {
            self.runs[part].push(run + (1 << part));
        }
        let run = run as usize;
        self.used[run / EXTENT] += 1 << order;
        Some(run)
    }

    /// Takes a run back; the extent, if nothing is left in it.
    fn put(&mut self, run: usize, order: usize) -> Option<usize> {
        self.runs[order].push(run as u32);
        let used = &mut self.used[run / EXTENT];
        *used -= 1 << order;
        (*used == 0).then_some(run / EXTENT)
    }
}

impl TableHeap {
    /// # Errors
    /// When the addresses are not to be had.
    pub(super) fn new(budget: Arc<Budget>) -> io::Result<Self> {
        Ok(Self {
            budget,
            range: Range::reserve()?,
            extents: AtomicUsize::new(0),
            spare: Header::default(),
            free: Mutex::default(),
        })
    }

    fn lists(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The frame counted from the first, if it is in an extent in use.
    fn position(&self, pfn: Pfn) -> Option<usize> {
        let position = usize::try_from(pfn.0.checked_sub(self.range.first())?).ok()?;
        (position / EXTENT < self.extents.load(Acquire)).then_some(position)
    }

    fn more(&self, extent: usize) -> bool {
        let begun = self.range.begin(extent);
        if let Err(error) = &begun {
            tracing::warn!(%error, "no memory for page tables");
        } else {
            self.extents.store(extent + 1, Release);
        }
        begun.is_ok()
    }
}

/// The free list for tables of so many bytes.
fn order(bytes: usize) -> Option<usize> {
    let frames = bytes >> PAGE_SHIFT;
    let whole = bytes.is_power_of_two() && (1..=LONGEST).contains(&frames);
    whole.then(|| frames.trailing_zeros() as usize)
}

// SAFETY: (1) a run of frames is given out once until it comes back, by the lists' invariant; runs
// start at multiples of their length, since extents and their header frames do. (2) `entries` is
// arithmetic on the range's base, the same each time; the frames are readable and writable since
// `begin`, and zeroed by the kernel. (3) Nothing here writes entries: giving memory back zeroes
// frames in no allocation.
unsafe impl TableMemory for TableHeap {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        let order = order(bytes)?;
        if !self.budget.take(1 << order) {
            return None;
        }
        let run = self.lists().take(order, |extent| self.more(extent));
        if run.is_none() {
            self.budget.give_back(1 << order);
        }
        Some(Pfn(self.range.first() + run? as u64))
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        let (Some(order), Some(run)) = (order(bytes), self.position(pfn)) else {
            return;
        };
        let mut lists = self.lists();
        if let Some(empty) = lists.put(run, order).filter(|extent| *extent > 0) {
            // Under the lock, so that nobody is given a frame of it meanwhile. The first extent is
            // never given back: a VM that maps and unmaps a little would do nothing else.
            self.range.end(empty);
        }
        drop(lists);
        self.budget.give_back(1 << order);
    }

    /// Checked all the same: a table entry that was damaged ends the VM here, not in somebody's
    /// memory.
    #[inline]
    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        let position = self.position(pfn);
        assert!(position.is_some(), "{pfn} is not table memory");
        self.range.frame(position.unwrap_or(0)).cast()
    }

    #[inline]
    fn header(&self, pfn: Pfn) -> &Header {
        match self.position(pfn) {
            // SAFETY: written by `begin` before the extent was counted; from there on only ever
            // shared, and mapped as long as `self`.
            Some(position) => unsafe { self.range.header(position).as_ref() },
            None => &self.spare,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn heap(frames: u64) -> TableHeap {
        let heap = TableHeap::new(Arc::default()).unwrap();
        heap.budget.limit_to(frames);
        heap
    }

    #[test]
    fn a_quarter_of_a_percent_and_no_more() {
        let budget = Budget::needed_for([1 << 18].into_iter());
        assert!((512..=524).contains(&budget), "{budget}");
        let heap = heap(0);
        assert_eq!(heap.allocate(4096), None);
        heap.budget.allow(0);
        let blocks: Vec<Pfn> = std::iter::from_fn(|| heap.allocate(16384)).collect();
        assert_eq!(blocks.len() as u64, SLACK / 4);
        assert_eq!(heap.budget.used(), SLACK);
        for block in blocks {
            assert!(block.0.is_multiple_of(4));
            // SAFETY: allocated above with this size.
            unsafe { heap.free(block, 16384) };
        }
        assert_eq!(heap.budget.used(), 0);
    }

    #[test]
    fn every_frame_is_given_out_once_is_aligned_and_has_a_header_of_its_own() {
        let heap = heap(2000);
        let (mut frames, mut headers, mut given) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for bytes in [4096, 16384, 4096, 8192].into_iter().cycle() {
            let Some(pfn) = heap.allocate(bytes) else {
                break;
            };
            given.push((pfn, bytes));
            // SAFETY: allocated just now.
            let entries = unsafe { heap.entries(pfn) };
            assert!(entries.addr().get().is_multiple_of(bytes));
            // SAFETY: allocated just now; a frame has 512 entries of 8 bytes.
            let last = unsafe { entries.add(bytes / 8 - 1).as_ref() };
            assert_eq!(last.load(), 0);
            for frame in pfn.0..pfn.0 + (bytes as u64 >> PAGE_SHIFT) {
                assert!(frames.insert(frame), "{frame} twice");
                let header = std::ptr::from_ref(heap.header(Pfn(frame))).addr();
                assert!(headers.insert(header), "one header for two frames");
                assert!(!frames.contains(&(header as u64 >> PAGE_SHIFT)));
            }
        }
        assert!(frames.len() > 3 * EXTENT && heap.extents.load(Relaxed) >= 4);
        for (pfn, bytes) in given {
            // SAFETY: allocated above with this size.
            unsafe { heap.free(pfn, bytes) };
        }
        assert_eq!(heap.budget.used(), 0);
        let extents = heap.extents.load(Relaxed);
        while heap.allocate(4096).is_some() {}
        assert!(
            heap.extents.load(Relaxed) <= extents + 1,
            "freed frames are used again"
        );
    }

    #[test]
    fn any_frame_number_may_be_asked_for_its_header() {
        let heap = heap(8);
        let own = heap.allocate(4096).unwrap();
        assert!(!std::ptr::eq(heap.header(own), &raw const heap.spare));
        let first = heap.range.first();
        let beyond = first + (EXTENTS * EXTENT) as u64;
        for pfn in [
            0,
            first - 1,
            first + EXTENT as u64,
            beyond,
            PFN_LIMIT,
            u64::MAX,
        ] {
            assert!(
                std::ptr::eq(heap.header(Pfn(pfn)), &raw const heap.spare),
                "{pfn:#x}"
            );
        }
    }

    #[test]
    fn what_has_no_table_left_gives_its_memory_back() {
        let heap = heap(3 * EXTENT as u64);
        let all: Vec<Pfn> = std::iter::from_fn(|| heap.allocate(4096)).collect();
        let resident = |pfn: &Pfn| {
            // SAFETY: a frame of an extent in use.
            unsafe { heap.entries(*pfn).as_ref() }.load()
        };
        let last = *all.last().unwrap();
        // SAFETY: as above; the test plays the MMU.
        unsafe { heap.entries(last).cast::<u64>().write(7) };
        assert_eq!(resident(&last), 7);
        for pfn in all {
            // SAFETY: allocated above with this size.
            unsafe { heap.free(pfn, 4096) };
        }
        assert_eq!(resident(&last), 0, "the page was dropped");
    }
}
