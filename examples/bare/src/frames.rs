//! First of the two things a hypervisor implements: where page tables live ([`TableMemory`]).
//!
//! Reserved RAM, a header for each of its frames, and two stacks of free runs: single frames, and
//! 16 KiB blocks for the roots of RISC-V. Both are O(1), and a block of 16 KiB aligned to 16 KiB is
//! never broken up, so a new root is always to be had.
//!
//! A frame's number is its physical address / 4096. Here the RAM is a static array that claims to
//! stand at [`BASE`]; a real hypervisor takes what its memory map says and finds a frame's entries
//! through its own direct mapping.
//!
//! *Locking*: the stacks are behind one lock, held for a push or a pop; entries and headers are
//! atomic. *Invariant*: a frame is in one stack or the MMU's, never both.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::{
    fmt,
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use slat_mmu::{EntryCell, Header, PAGE_SIZE, Pfn, TableMemory};

use crate::lock::Lock;

/// First frame; a multiple of 4.
pub(crate) const BASE: Pfn = Pfn(0x8_0000);

const BLOCK_FRAMES: usize = 4;
const BLOCK_BYTES: usize = BLOCK_FRAMES * PAGE_SIZE as usize;
const BLOCK_WORDS: usize = BLOCK_BYTES / 8;
const BLOCKS: usize = 32;
/// Of these, kept whole.
const ROOT_BLOCKS: usize = 4;

#[repr(align(16384))]
struct Block([AtomicU64; BLOCK_WORDS]);

static RAM: [Block; BLOCKS] = [const { Block([const { AtomicU64::new(0) }; BLOCK_WORDS]) }; BLOCKS];
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The reserved frames.
pub(crate) struct Frames {
    headers: Box<[Header]>,
    /// For frames that are not ours.
    nowhere: Header,
    free: Lock<Free>,
}

struct Free {
    pages: Vec<Pfn>,
    blocks: Vec<Pfn>,
}

impl Frames {
    /// Takes the reserved RAM, once, at boot.
    ///
    /// # Panics
    /// The second time: two owners would give the same frame to two tables.
    pub(crate) fn take() -> Arc<Self> {
        assert!(!TAKEN.swap(true, Ordering::Relaxed), "table RAM is taken");
        let frame = |index: usize| Pfn(BASE.0 + index as u64);
        let count = BLOCKS * BLOCK_FRAMES;
        Arc::new(Self {
            headers: (0..count).map(|_| Header::default()).collect(),
            nowhere: Header::default(),
            free: Lock::new(Free {
                blocks: (0..ROOT_BLOCKS)
                    .map(|block| frame(block * BLOCK_FRAMES))
                    .collect(),
                pages: (ROOT_BLOCKS * BLOCK_FRAMES..count).map(frame).collect(),
            }),
        })
    }

    /// Frames that tables occupy now.
    pub(crate) fn used(&self) -> usize {
        let free = self
            .free
            .with(|free| free.pages.len() + free.blocks.len() * BLOCK_FRAMES);
        self.headers.len() - free
    }

    /// The word at a physical address, as the page-table walker of a processor reaches it.
    pub(crate) fn word(&self, hpa: u64) -> Option<&'static AtomicU64> {
        let offset = usize::try_from(hpa.checked_sub(BASE.hpa())?).ok()?;
        RAM.get(offset / BLOCK_BYTES)?
            .0
            .get(offset % BLOCK_BYTES / 8)
    }
}

fn index(pfn: Pfn) -> usize {
    pfn.0.wrapping_sub(BASE.0) as usize
}

// SAFETY: a run is popped from a stack, so it has one owner until it is pushed back; single frames
// and blocks are disjoint and aligned to their size, because BASE and RAM are to a block's. The
// entries of a frame are always at the same place in RAM, which is static, made of atomic words,
// and written by nobody else but the walker in `hardware`, which sets Accessed and Dirty.
unsafe impl TableMemory for Frames {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        self.free.with(|free| match bytes as u64 {
            PAGE_SIZE => free.pages.pop(),
            // 8 KiB is a root of arm64 with 40-bit addresses.
            _ if bytes <= BLOCK_BYTES => free.blocks.pop(),
            _ => None,
        })
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        // The stacks were made for all frames: a push does not allocate.
        self.free.with(|free| match bytes as u64 {
            PAGE_SIZE => free.pages.push(pfn),
            _ => free.blocks.push(pfn),
        });
    }

    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        let (block, frame) = (index(pfn) / BLOCK_FRAMES, index(pfn) % BLOCK_FRAMES);
        // The rest of the block, so that the pointer reaches all of a root.
        let words = &RAM[block].0[frame * (PAGE_SIZE as usize / 8)..];
        // An `EntryCell` is an `AtomicU64` by another name.
        NonNull::from(words).cast()
    }

    fn header(&self, pfn: Pfn) -> &Header {
        self.headers.get(index(pfn)).unwrap_or(&self.nowhere)
    }
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames")
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}
