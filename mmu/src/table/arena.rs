//! A fixed block of ordinary memory that plays physical memory for tables.
//!
//! Frames are numbered from a base of the caller's choice, so a dump of the arena, loaded at that
//! address, is a page table that a hardware walker follows: this is how tables reach the emulated
//! walkers that check them.
//!
//! *Locking*: the lists of free frames are behind one lock, held for a push or a pop; the memory
//! itself is atomics, shared freely. *Invariant*: a frame is in exactly one of: an allocation, a
//! free list, the untouched rest.

use alloc::{boxed::Box, vec::Vec};
use core::{fmt, ptr::NonNull};

use super::{
    header::Header,
    memory::{EntryCell, TableMemory},
};
use crate::{
    addr::{PAGE_SIZE, Pfn},
    sync::Mutex,
};

/// The largest node of any format is 16 KiB (RISC-V's roots); blocks of this size and alignment
/// make up the arena.
const BLOCK_FRAMES: usize = 4;
const FRAME_ENTRIES: usize = PAGE_SIZE as usize / 8;
/// Free lists: runs of 1, 2 and 4 frames.
const ORDERS: usize = 3;

#[repr(align(16384))]
struct Block([EntryCell; BLOCK_FRAMES * FRAME_ENTRIES]);

/// Table memory on the heap.
pub struct Arena {
    base: Pfn,
    origin: Origin,
    /// Never grows. Not a box: to move one claims what it points to anew, and the origin would
    /// point to memory of another owner.
    blocks: Vec<Block>,
    headers: Box<[Header]>,
    /// For frames that are not the arena's.
    nowhere: Header,
    free: Mutex<Free>,
}

/// Where frame 0's entries would be, so that a frame's are one addition away: every walk asks once
/// a level.
struct Origin(*mut EntryCell);

// SAFETY: a pointer to atomics that is only ever followed within the blocks, which live as long as
// the arena.
unsafe impl Send for Origin {}
// SAFETY: as above.
unsafe impl Sync for Origin {}

struct Free {
    /// First frames of free runs, counted from the base, by order.
    runs: [Vec<u32>; ORDERS],
    /// First frame that was never given out.
    next: usize,
    used: usize,
}

impl Arena {
    /// An arena of at least `frames` 4 KiB frames, the first of which is `base` (rounded up to 16
    /// KiB). Memory is reserved at once.
    pub fn new(base: Pfn, frames: usize) -> Self {
        let count = frames.div_ceil(BLOCK_FRAMES);
        let base = Pfn(base.0.next_multiple_of(BLOCK_FRAMES as u64));
        let mut blocks: Vec<Block> = (0..count)
            .map(|_| Block(core::array::from_fn(|_| EntryCell::new(0))))
            .collect();
        // The pointer is to all of them, so it may be used for a run that crosses into the next
        // frame.
        let first = blocks.as_mut_ptr().cast::<EntryCell>();
        let origin = first.wrapping_byte_sub(base.hpa() as usize);
        Self {
            base,
            origin: Origin(origin),
            blocks,
            headers: (0..count * BLOCK_FRAMES)
                .map(|_| Header::default())
                .collect(),
            nowhere: Header::default(),
            free: Mutex::new(Free {
                runs: Default::default(),
                next: 0,
                used: 0,
            }),
        }
    }

    /// First frame of the arena.
    pub fn base(&self) -> Pfn {
        self.base
    }

    /// Frames that tables occupy now.
    pub fn used_frames(&self) -> usize {
        self.free.lock().used
    }

    /// All frames, used or not.
    pub fn frames(&self) -> usize {
        self.blocks.len() * BLOCK_FRAMES
    }

    /// Reads the 64-bit word at host physical address `hpa` (bytes), or `None` if it is unaligned
    /// or outside: what a hardware walker would see.
    ///
    /// # Safety
    ///
    /// No table is made meanwhile: memory that is to become one is written like any other.
    pub unsafe fn read(&self, hpa: u64) -> Option<u64> {
        let offset = hpa.checked_sub(self.base.hpa())?;
        if !offset.is_multiple_of(8) {
            return None;
        }
        let word = usize::try_from(offset / 8).ok()?;
        let block = self.blocks.get(word / (BLOCK_FRAMES * FRAME_ENTRIES))?;
        Some(block.0[word % (BLOCK_FRAMES * FRAME_ENTRIES)].load())
    }

    #[inline(always)]
    fn position(&self, pfn: Pfn) -> usize {
        pfn.0.wrapping_sub(self.base.0) as usize
    }
}

impl Free {
    /// A run of `1 << order` frames that starts at a multiple of its length.
    fn take(&mut self, order: usize, frames: usize) -> Option<u32> {
        if let Some(run) = self.runs[order].pop() {
            return Some(run);
        }
        // Break up a longer run.
        if order + 1 < ORDERS
            && let Some(run) = self.runs[order + 1].pop()
        {
            self.runs[order].push(run + (1 << order));
            return Some(run);
        }
        let length = 1 << order;
        let start = self.next.next_multiple_of(length);
        if start + length > frames {
            return self.take_from_longest(order);
        }
        while self.next < start {
            let order = self.next.trailing_zeros() as usize;
            self.runs[order.min(ORDERS - 1)].push(self.next as u32);
            self.next += 1 << order;
        }
        self.next = start + length;
        Some(start as u32)
    }

    fn take_from_longest(&mut self, order: usize) -> Option<u32> {
        let longest = ORDERS - 1;
        if order + 2 > longest {
            return None;
        }
        let run = self.runs[longest].pop()?;
        for part in order..longest {
            self.runs[part].push(run + (1 << part));
        }
        Some(run)
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("base", &self.base)
            .field("frames", &self.frames())
            .field("used_frames", &self.used_frames())
            .finish()
    }
}

fn order_of(bytes: usize) -> usize {
    let frames = bytes.div_ceil(PAGE_SIZE as usize).next_power_of_two();
    frames.trailing_zeros() as usize
}

// SAFETY: (1) a run is given out once until it comes back, by the lists' invariant, and starts at a
// multiple of its length in an arena whose base and blocks are aligned to the longest. (2) The
// pointer is derived from all blocks, whose memory never moves and is nothing but atomics. (3) The
// origin is fixed, and `entries` computes just that. (4) Nothing here writes entries.
unsafe impl TableMemory for Arena {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        let order = order_of(bytes);
        if order >= ORDERS {
            return None;
        }
        let mut free = self.free.lock();
        let run = free.take(order, self.frames())?;
        free.used += 1 << order;
        Some(Pfn(self.base.0 + u64::from(run)))
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        let order = order_of(bytes);
        let mut free = self.free.lock();
        free.used -= 1 << order;
        free.runs[order].push(self.position(pfn) as u32);
    }

    unsafe fn free_all(&self, pfns: &[Pfn], bytes: usize) {
        let order = order_of(bytes);
        let mut free = self.free.lock();
        free.used -= pfns.len() << order;
        // The first of them is the next to go out, so that neighbours stay neighbours.
        free.runs[order].extend(pfns.iter().rev().map(|&pfn| self.position(pfn) as u32));
    }

    #[inline(always)]
    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        debug_assert!(
            self.position(pfn) < self.headers.len(),
            "{pfn} is not the arena's"
        );
        // SAFETY: the caller's promise, so the frame lies inside the blocks, whose pointer this is.
        unsafe { NonNull::new_unchecked(self.origin.0.wrapping_byte_add(pfn.hpa() as usize)) }
    }

    const DIRECTLY_MAPPED: bool = true;

    #[inline(always)]
    fn direct_map(&self) -> *mut EntryCell {
        self.origin.0
    }

    #[inline(always)]
    fn header(&self, pfn: Pfn) -> &Header {
        self.headers
            .get(self.position(pfn))
            .unwrap_or(&self.nowhere)
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_aligned_to_their_size_and_disjoint() {
        let arena = Arena::new(Pfn(0x101), 12);
        assert_eq!(arena.base(), Pfn(0x104));
        let small = arena.allocate(4096).unwrap();
        let large = arena.allocate(16384).unwrap();
        assert!(large.0.is_multiple_of(4));
        // SAFETY: allocated above.
        let first = unsafe { arena.entries(large) };
        assert!(first.as_ptr().addr().is_multiple_of(16384));
        assert!(small.0 < large.0 || small.0 >= large.0 + 4);
        assert_eq!(arena.used_frames(), 5);
        let other = arena.allocate(16384).unwrap();
        assert_ne!(other, large);
        assert_eq!(arena.allocate(16384), None);
        // SAFETY: allocated above with this size, not used any more.
        unsafe { arena.free(large, 16384) };
        assert_eq!(arena.allocate(16384), Some(large));
    }

    #[test]
    fn every_frame_is_given_out_once() {
        let arena = Arena::new(Pfn(0), 32);
        let mut taken = std::collections::BTreeSet::new();
        let sizes = [4096, 8192, 4096, 16384, 4096];
        for bytes in sizes.into_iter().cycle().take(10) {
            if let Some(pfn) = arena.allocate(bytes) {
                let frames = bytes as u64 / PAGE_SIZE;
                assert!(pfn.0.is_multiple_of(frames));
                for frame in pfn.0..pfn.0 + frames {
                    assert!(taken.insert(frame), "{frame} twice");
                }
            }
        }
        while let Some(pfn) = arena.allocate(4096) {
            assert!(taken.insert(pfn.0), "{} twice", pfn.0);
        }
        assert_eq!((taken.len(), arena.used_frames()), (32, 32));
    }

    #[test]
    fn read_is_bounded() {
        let arena = Arena::new(Pfn(4), 4);
        // SAFETY: there is no table.
        let read = |hpa| unsafe { arena.read(hpa) };
        assert_eq!(read(4 << 12), Some(0));
        assert_eq!(read((4 << 12) + 1), None);
        assert_eq!(read((4 << 12) - 8), None);
        assert_eq!(read(8 << 12), None);
    }
}
