//! A slot's dirty bitmap.
//!
//! One bit a page in 64-bit words, bit *n* of word *w* for page `64 w + n`, as `KVM_GET_DIRTY_LOG` delivers it. Bits
//! after the last page are never set.
//!
//! *Locking*: none; words are atomic. Setting is a release and taking an acquire-release, so who takes a bit also sees
//! the table change that went before it.

use alloc::{boxed::Box, vec::Vec};
use core::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    npages: u64,
}

impl DirtyBitmap {
    /// A bitmap for `npages` pages with all bits `set` or clear; `None` if there is no memory.
    pub(crate) fn new(npages: u64, set: bool) -> Option<Self> {
        let count = usize::try_from(npages.div_ceil(64)).ok()?;
        let mut words = Vec::new();
        words.try_reserve_exact(count).ok()?;
        words.resize_with(count, AtomicU64::default);
        let bitmap = Self {
            words: words.into_boxed_slice(),
            npages,
        };
        if set {
            for word in 0..count {
                bitmap.words[word].store(bitmap.valid(word), Ordering::Relaxed);
            }
        }
        Some(bitmap)
    }

    /// Words in the bitmap.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// The bits of `word` that stand for pages of the slot.
    pub(crate) fn valid(&self, word: usize) -> u64 {
        match self.npages.saturating_sub(word as u64 * 64) {
            0 => 0,
            pages @ 1..64 => (1 << pages) - 1,
            _ => u64::MAX,
        }
    }

    pub(crate) fn set(&self, page: u64) {
        if page < self.npages {
            let word = &self.words[(page / 64) as usize];
            let bit = 1 << (page % 64);
            // Many faults hit pages that are marked already; a load spares the cache line's ownership.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    pub(crate) fn get(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// Clears the bits of `mask` and returns those that were set.
    pub(crate) fn take(&self, word: usize, mask: u64) -> u64 {
        if self.get(word) & mask == 0 {
            return 0;
        }
        self.words[word].fetch_and(!mask, Ordering::AcqRel) & mask
    }

    pub(crate) fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bit_after_the_last_page() {
        let bitmap = DirtyBitmap::new(70, true).unwrap();
        assert_eq!(bitmap.len(), 2);
        assert_eq!(bitmap.count(), 70);
        bitmap.take(1, u64::MAX);
        bitmap.set(70);
        assert_eq!(bitmap.get(1), 0);
        assert_eq!(DirtyBitmap::new(128, true).unwrap().count(), 128);
    }

    #[test]
    fn take_returns_only_what_was_asked_and_set() {
        let bitmap = DirtyBitmap::new(64, false).unwrap();
        bitmap.set(3);
        bitmap.set(5);
        assert_eq!(bitmap.take(0, 0b1_1000), 0b1000);
        assert_eq!(bitmap.get(0), 0b10_0000);
    }
}
