//! A fixed block of ordinary memory that plays physical memory for tables.
//!
//! Frames are numbered from a base of the caller's choice, so a dump of the arena, loaded at that address, is a page
//! table that a hardware walker follows: this is how tables reach the emulated walkers that check them.
//!
//! *Locking*: the map of free frames is behind one spin lock; the memory itself is atomics, shared freely.
//! *Invariant*: a frame is marked used exactly while an allocation covers it.

use alloc::{boxed::Box, vec, vec::Vec};
use core::{
    fmt,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use spin::mutex::SpinMutex;

use super::memory::TableMemory;
use crate::addr::{PAGE_SIZE, Pfn};

/// The largest node of any format, 16 KiB; blocks of this size and alignment make up the arena.
const BLOCK_FRAMES: usize = 4;
const FRAME_ENTRIES: usize = PAGE_SIZE as usize / size_of::<u64>();

#[repr(align(16384))]
struct Block([AtomicU64; BLOCK_FRAMES * FRAME_ENTRIES]);

/// Table memory on the heap.
pub struct Arena {
    base: Pfn,
    blocks: Box<[Block]>,
    /// One bit mask of used frames for each block.
    used: SpinMutex<Vec<u8>>,
}

impl Arena {
    /// An arena of at least `frames` 4 KiB frames, the first of which is `base` (rounded up to 16 KiB). Memory is
    /// reserved at once.
    pub fn new(base: Pfn, frames: usize) -> Self {
        let count = frames.div_ceil(BLOCK_FRAMES);
        Self {
            base: Pfn(base.0.next_multiple_of(BLOCK_FRAMES as u64)),
            blocks: (0..count)
                .map(|_| Block([const { AtomicU64::new(0) }; _]))
                .collect(),
            used: SpinMutex::new(vec![0; count]),
        }
    }

    /// First frame of the arena.
    pub fn base(&self) -> Pfn {
        self.base
    }

    /// Frames that tables occupy now.
    pub fn used_frames(&self) -> usize {
        self.used
            .lock()
            .iter()
            .map(|mask| mask.count_ones() as usize)
            .sum()
    }

    /// All frames, used or not.
    pub fn frames(&self) -> usize {
        self.blocks.len() * BLOCK_FRAMES
    }

    /// Reads the 64-bit word at host physical address `hpa` (bytes), or `None` if it is unaligned or outside: what a
    /// hardware walker would see.
    pub fn read(&self, hpa: u64) -> Option<u64> {
        let offset = hpa.checked_sub(self.base.hpa())?;
        if !offset.is_multiple_of(8) {
            return None;
        }
        let word = usize::try_from(offset / 8).ok()?;
        let block = self.blocks.get(word / (BLOCK_FRAMES * FRAME_ENTRIES))?;
        Some(block.0[word % (BLOCK_FRAMES * FRAME_ENTRIES)].load(Ordering::Acquire))
    }

    fn position(&self, pfn: Pfn) -> (usize, usize) {
        let frame = (pfn.0 - self.base.0) as usize;
        (frame / BLOCK_FRAMES, frame % BLOCK_FRAMES)
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

// SAFETY: (1) a mask bit is set while its frame is allocated, and only clear bits are handed out; a run of `n` frames
// starts at a multiple of `n` inside a block that is aligned to 16 KiB in the arena's numbering. (2) The pointer is
// derived from the whole block, whose memory never moves and is nothing but atomics. (3) Nothing here writes entries.
unsafe impl TableMemory for Arena {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        let frames = bytes.div_ceil(PAGE_SIZE as usize).next_power_of_two();
        if frames > BLOCK_FRAMES {
            return None;
        }
        let run = (1u8 << frames) - 1;
        let mut used = self.used.lock();
        for (block, mask) in used.iter_mut().enumerate() {
            for first in (0..BLOCK_FRAMES).step_by(frames) {
                if *mask & (run << first) == 0 {
                    *mask |= run << first;
                    return Some(Pfn(self.base.0 + (block * BLOCK_FRAMES + first) as u64));
                }
            }
        }
        None
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        let frames = bytes.div_ceil(PAGE_SIZE as usize).next_power_of_two();
        let (block, first) = self.position(pfn);
        let run = ((1u8 << frames) - 1) << first;
        let mut used = self.used.lock();
        debug_assert_eq!(used[block] & run, run, "freed twice: {pfn}");
        used[block] &= !run;
    }

    fn entries(&self, pfn: Pfn) -> NonNull<AtomicU64> {
        let (block, first) = self.position(pfn);
        NonNull::from(&self.blocks[block].0[first * FRAME_ENTRIES..]).cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_aligned_to_their_size_and_disjoint() {
        let arena = Arena::new(Pfn(0x101), 12);
        assert_eq!(arena.base(), Pfn(0x104));
        let small = arena.allocate(4096).unwrap();
        let large = arena.allocate(16384).unwrap();
        assert!(large.0.is_multiple_of(4));
        assert!(arena.entries(large).as_ptr().addr().is_multiple_of(16384));
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
    fn read_is_bounded() {
        let arena = Arena::new(Pfn(4), 4);
        assert_eq!(arena.read(4 << 12), Some(0));
        assert_eq!(arena.read((4 << 12) + 1), None);
        assert_eq!(arena.read((4 << 12) - 8), None);
        assert_eq!(arena.read(8 << 12), None);
    }
}
