//! The guests' memory: the first word of each page, which is enough to tell one page from another.
//!
//! Frames are those that slots name. What a guest writes through its translations is read back here
//! by frame number, so a translation that leads to a wrong frame is seen in the data as well.

use core::sync::atomic::{AtomicU64, Ordering};

use slat_mmu::Pfn;

/// First frame, at 4 GiB: aligned to the largest page in use.
pub(crate) const BASE: Pfn = Pfn(0x10_0000);
/// Frames.
pub(crate) const PAGES: u64 = 1088;

static WORDS: [AtomicU64; PAGES as usize] = [const { AtomicU64::new(0) }; PAGES as usize];

/// The first word of a page; `None` if no guest has memory there.
pub(crate) fn word(pfn: Pfn) -> Option<&'static AtomicU64> {
    WORDS.get(usize::try_from(pfn.0.checked_sub(BASE.0)?).ok()?)
}

/// Empties all memory.
pub(crate) fn clear() {
    for word in &WORDS {
        word.store(0, Ordering::Relaxed);
    }
}
