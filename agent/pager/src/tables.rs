//! Memory for the mirror's tables, which grows as the guest touches more.
//!
//! A mirror takes 0.2 % of what is mapped. It would be a waste to take that at once for a guest
//! that touches little, so there are chunks, each an arena, made one after the other as they are
//! needed. They stay until the mirror goes.
//!
//! *Locking*: a chunk is made under `grow`; who finds it there needs no lock. *Invariant*: chunk
//! `i` has the frames from `BASE + i * CHUNK` on and no others, so a frame's chunk is arithmetic.

use std::{
    ptr::NonNull,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use slat_mmu::{Arena, EntryCell, Header, PAGE_SIZE, Pfn, TableMemory};

use crate::sync::lock;

/// Frames of a chunk: 1 MiB, which maps half a gigabyte.
const CHUNK: u64 = 256;
/// The first frame of the first chunk.
const BASE: u64 = 4096;
/// Chunks: 16 GiB of tables, for 8 TiB of guest.
const MOST: usize = 1 << 14;

/// The first frame that is no table's.
pub(crate) const BEHIND: u64 = BASE + CHUNK * MOST as u64;

/// See the module.
pub(crate) struct Tables {
    chunks: Vec<OnceLock<Box<Arena>>>,
    /// How many there are.
    made: AtomicUsize,
    grow: Mutex<()>,
    nowhere: Header,
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self {
            chunks: (0..MOST).map(|_| OnceLock::new()).collect(),
            made: AtomicUsize::new(0),
            grow: Mutex::new(()),
            nowhere: Header::default(),
        }
    }

    /// Bytes taken: tables, used or not, and their headers.
    pub(crate) fn bytes(&self) -> u64 {
        let frames = self.made.load(Ordering::Relaxed) as u64 * CHUNK;
        frames * (PAGE_SIZE + size_of::<Header>() as u64)
    }

    fn chunk(&self, pfn: Pfn) -> Option<&Arena> {
        let chunk = pfn.0.checked_sub(BASE)? / CHUNK;
        Some(self.chunks.get(usize::try_from(chunk).ok()?)?.get()?)
    }

    fn take(&self, bytes: usize) -> Option<Pfn> {
        let made = self.made.load(Ordering::Acquire);
        // The youngest has room most of the time.
        let mut chunks = self.chunks[..made].iter().rev();
        chunks.find_map(|chunk| chunk.get()?.allocate(bytes))
    }
}

// SAFETY: (1) each arena keeps that for its own frames, and the chunks' frames are disjoint; all
// begin at multiples of a chunk's length, of which every table's is a divisor. (2) A chunk is never
// replaced, its arena keeps the promise. (3) Tables are not said to be directly mapped. (4) Nothing
// here writes entries.
unsafe impl TableMemory for Tables {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        if let Some(pfn) = self.take(bytes) {
            return Some(pfn);
        }
        let _growing = lock(&self.grow);
        if let Some(pfn) = self.take(bytes) {
            return Some(pfn);
        }
        let made = self.made.load(Ordering::Acquire);
        let base = Pfn(BASE + made as u64 * CHUNK);
        let chunk = self.chunks.get(made)?;
        let arena = chunk.get_or_init(|| Box::new(Arena::new(base, CHUNK as usize)));
        let pfn = arena.allocate(bytes);
        self.made.store(made + 1, Ordering::Release);
        pfn
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        if let Some(arena) = self.chunk(pfn) {
            // SAFETY: the caller's promise, of the chunk that gave it out.
            unsafe { arena.free(pfn, bytes) }
        }
    }

    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        match self.chunk(pfn) {
            // SAFETY: the caller's promise, of the chunk that gave it out.
            Some(arena) => unsafe { arena.entries(pfn) },
            None => unreachable!("{pfn} was never given out"),
        }
    }

    fn header(&self, pfn: Pfn) -> &Header {
        match self.chunk(pfn) {
            Some(arena) => arena.header(pfn),
            None => &self.nowhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn more_than_a_chunk_is_given_out_once_each_and_again_when_it_came_back() {
        let tables = Tables::new();
        let all: BTreeSet<u64> = (0..700).map(|_| tables.allocate(4096).unwrap().0).collect();
        assert_eq!((all.len(), tables.made.load(Ordering::Relaxed)), (700, 3));
        let wide = tables.allocate(16384).unwrap();
        assert!(wide.0.is_multiple_of(4) && (0..4).all(|i| !all.contains(&(wide.0 + i))));
        for &pfn in &all {
            // SAFETY: allocated above, and not used.
            unsafe {
                tables.entries(Pfn(pfn)).as_ref().store(pfn);
                tables.free(Pfn(pfn), 4096);
            }
        }
        let again = (0..700).all(|_| all.contains(&tables.allocate(4096).unwrap().0));
        assert!(again || tables.made.load(Ordering::Relaxed) == 3);
        assert!(std::ptr::eq(
            tables.header(Pfn(7)),
            &raw const tables.nowhere
        ));
    }
}
