//! A slot's dirty bitmap.
//!
//! One bit a page in 64-bit words, bit *n* of word *w* for page `64 w + n`, as `KVM_GET_DIRTY_LOG`
//! delivers it. Bits after the last page are never set. Above it a *summary*: one bit for 64 words
//! (4096 pages, 16 MiB), set if one of them may be set; a harvest of a large and mostly clean slot
//! looks at little else.
//!
//! *Locking*: none; words are atomic. Setting is a release and taking an acquire-release, so who
//! takes a bit also sees the table change that went before it.
//!
//! *Invariant*: a page's bit is never set for long while its summary bit is clear. The setter sets
//! the page's bit, then looks at the summary; the taker clears the summary bit, then looks at the
//! words. Whichever comes second sees the other, so at worst the summary says dirty where nothing
//! is.

use alloc::{boxed::Box, vec::Vec};

use crate::sync::{Acquire, AtomicU64, Relaxed, SeqCst, fence, fence_after_exchange};

/// Words under one bit of the summary.
const GROUP: usize = 64;

#[derive(Debug)]
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
    npages: u64,
}

fn zeroes(count: usize) -> Option<Box<[AtomicU64]>> {
    let mut words = Vec::new();
    words.try_reserve_exact(count).ok()?;
    words.resize_with(count, || AtomicU64::new(0));
    Some(words.into_boxed_slice())
}

impl DirtyBitmap {
    /// A bitmap for `npages` pages with all bits `set` or clear; `None` if there is no memory.
    pub(crate) fn new(npages: u64, set: bool) -> Option<Self> {
        let count = usize::try_from(npages.div_ceil(64)).ok()?;
        let bitmap = Self {
            words: zeroes(count)?,
            summary: zeroes(count.div_ceil(GROUP * 64))?,
            npages,
        };
        if set {
            for word in 0..count {
                bitmap.words[word].store(bitmap.valid(word), Relaxed);
            }
            for summary in &bitmap.summary {
                summary.store(u64::MAX, Relaxed);
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

    #[inline(always)]
    pub(crate) fn set(&self, page: u64) {
        if page < self.npages {
            self.set_word((page / 64) as usize, 1 << (page % 64));
        }
    }

    /// Sets the pages `first..end`.
    pub(crate) fn set_range(&self, first: u64, end: u64) {
        let end = end.min(self.npages);
        let mut page = first;
        while page < end {
            let upto = end.min((page / 64 + 1) * 64);
            let bits = u64::MAX >> (64 - (upto - page)) << (page % 64);
            self.set_word((page / 64) as usize, bits);
            page = upto;
        }
    }

    #[inline(always)]
    fn set_word(&self, word: usize, bits: u64) {
        // The caller has just changed the entry by an exchange, and a harvest takes the bit before
        // it looks at the entry: one of the two must see the other, also when neither finds
        // anything to store.
        fence_after_exchange();
        // Many faults hit pages that are marked already; a load spares the cache line's ownership.
        if self.words[word].load(Relaxed) & bits == bits {
            return;
        }
        self.words[word].fetch_or(bits, SeqCst);
        let (group, bit) = (word / GROUP / 64, 1 << (word / GROUP % 64));
        fence(SeqCst);
        if self.summary[group].load(Relaxed) & bit == 0 {
            self.summary[group].fetch_or(bit, SeqCst);
        }
    }

    pub(crate) fn get(&self, word: usize) -> u64 {
        self.words[word].load(Acquire)
    }

    /// Clears the bits of `mask` and returns those that were set. The summary stays as it is.
    #[inline(always)]
    pub(crate) fn take(&self, word: usize, mask: u64) -> u64 {
        if self.get(word) & mask == 0 {
            return 0;
        }
        self.words[word].fetch_and(!mask, SeqCst) & mask
    }

    /// The first word at or after `from` that may hold a bit, by the summary.
    pub(crate) fn next_candidate(&self, from: usize) -> Option<usize> {
        let mut group = from / GROUP;
        // Inside a group that is marked, every word is a candidate.
        while group < self.words.len().div_ceil(GROUP) {
            let bits = self.summary[group / 64].load(Acquire) >> (group % 64);
            if bits != 0 {
                let group = group + bits.trailing_zeros() as usize;
                let word = (group * GROUP).max(from);
                return (word < self.words.len()).then_some(word);
            }
            group = (group / 64 + 1) * 64;
        }
        None
    }

    /// Before the words of the group that `word` is in are taken, all of them: clears its summary
    /// bit.
    pub(crate) fn begin_group(&self, word: usize) {
        if word.is_multiple_of(GROUP) {
            let (group, bit) = (word / GROUP / 64, 1u64 << (word / GROUP % 64));
            self.summary[group].fetch_and(!bit, SeqCst);
            fence(SeqCst);
        }
    }

    /// First word after the group of `word`.
    pub(crate) fn group_end(&self, word: usize) -> usize {
        ((word / GROUP + 1) * GROUP).min(self.words.len())
    }

    pub(crate) fn count(&self) -> u64 {
        let mut count = 0;
        let mut from = 0;
        while let Some(word) = self.next_candidate(from) {
            let end = self.group_end(word);
            count += self.words[word..end]
                .iter()
                .map(|word| u64::from(word.load(Relaxed).count_ones()))
                .sum::<u64>();
            from = end;
        }
        count
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn no_bit_after_the_last_page() {
        let bitmap = DirtyBitmap::new(70, true).unwrap();
        assert_eq!(bitmap.len(), 2);
        assert_eq!(bitmap.count(), 70);
        bitmap.take(1, u64::MAX);
        bitmap.set(70);
        bitmap.set_range(64, 200);
        assert_eq!(bitmap.get(1), 0b11_1111);
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

    #[test]
    fn a_range_is_every_page_of_it() {
        let bitmap = DirtyBitmap::new(1 << 20, false).unwrap();
        bitmap.set_range(60, 200);
        assert_eq!(bitmap.count(), 140);
        assert_eq!(bitmap.get(0), 0xf << 60);
        assert_eq!(bitmap.get(3), 0xff);
    }

    #[test]
    fn the_summary_leads_to_every_set_word_and_past_the_clean() {
        let bitmap = DirtyBitmap::new(1 << 24, false).unwrap();
        let pages = [0, 4095, 4096, 1 << 20, (1 << 24) - 1];
        for page in pages {
            bitmap.set(page);
        }
        let (mut from, mut found, mut looked) = (0, Vec::new(), 0);
        while let Some(word) = bitmap.next_candidate(from) {
            bitmap.begin_group(word);
            let end = bitmap.group_end(word);
            for word in word..end {
                looked += 1;
                let bits = bitmap.take(word, u64::MAX);
                if bits != 0 {
                    found.push(word as u64 * 64 + u64::from(bits.trailing_zeros()));
                }
            }
            from = end;
        }
        assert_eq!(found, pages);
        assert_eq!(looked, 4 * GROUP);
        assert_eq!(bitmap.next_candidate(0), None);
    }
}
