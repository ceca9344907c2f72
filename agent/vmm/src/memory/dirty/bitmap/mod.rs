//! Which pages of a slot are dirty: a bitmap with a summary.
//!
//! Bit `i % 64` of word `i / 64` is page `i` of the slot, as in KVM's dirty log. A bit of the
//! summary stands for a group of 64 words (4096 pages, 16 MiB of memory), so that what is clean
//! costs one bit in 4096 to skip: of a slot of 4 TiB, whose bitmap is 128 MiB, the summary is
//! 32 KiB. Words of clean groups are neither read nor written, and as they come zeroed from the
//! kernel they take no memory until they are.
//!
//! Bitmaps are moved, swapped and united, never cloned.
//!
//! # Invariants
//! A bit of the summary is set exactly when a word of its group is not zero. Bits at and above the
//! slot's number of pages are clear.

#[cfg(test)]
pub(super) mod tests;

use std::fmt;

/// Words that one bit of the summary stands for.
const GROUP: usize = 64;
/// Pages of a word.
const WORD: u64 = 64;

/// See the module.
pub(crate) struct DirtyBitmap {
    pages: u64,
    words: Vec<u64>,
    summary: Vec<u64>,
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("pages", &self.pages)
            .field("dirty", &self.count())
            .finish_non_exhaustive()
    }
}

impl DirtyBitmap {
    /// Of a slot of that many clean pages.
    #[must_use]
    pub(crate) fn new(pages: u64) -> Self {
        let words = pages.div_ceil(WORD) as usize;
        Self {
            pages,
            words: vec![0; words],
            summary: vec![0; words.div_ceil(GROUP).div_ceil(64)],
        }
    }

    /// Of a slot of that many dirty pages.
    #[must_use]
    pub(crate) fn full(pages: u64) -> Self {
        let mut bitmap = Self::new(pages);
        bitmap.set(0, pages);
        bitmap
    }

    /// Pages of the slot.
    #[must_use]
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether no page is dirty.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.summary.iter().all(|word| *word == 0)
    }

    /// Dirty pages.
    #[must_use]
    pub(crate) fn count(&self) -> u64 {
        self.groups().map(|group| count(self.group(group))).sum()
    }

    /// Marks pages `[first, first + len)`.
    ///
    /// # Panics
    /// When they are not all in the slot.
    pub(crate) fn set(&mut self, first: u64, len: u64) {
        let end = first.checked_add(len).filter(|end| *end <= self.pages);
        let Some(end) = end else {
            panic!(
                "pages {first}+{len} are not all in the slot's {}",
                self.pages
            );
        };
        let mut page = first;
        while page < end {
            let (word, bit) = ((page / WORD) as usize, page % WORD);
            let here = (WORD - bit).min(end - page);
            self.words[word] |= u64::MAX >> (WORD - here) << bit;
            self.summary[word / GROUP / 64] |= 1 << (word / GROUP % 64);
            page += here;
        }
    }

    /// Adds the dirty pages of another bitmap of the slot.
    ///
    /// # Panics
    /// When that is of another length.
    pub(crate) fn unite(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "bitmaps of different slots");
        for group in other.groups() {
            let range = self.group_range(group);
            for (to, from) in self.words[range].iter_mut().zip(other.group(group)) {
                *to |= from;
            }
        }
        for (to, from) in self.summary.iter_mut().zip(&other.summary) {
            *to |= from;
        }
    }

    /// Makes every page clean.
    pub(crate) fn clear(&mut self) {
        for at in 0..self.summary.len() {
            let mut bits = std::mem::take(&mut self.summary[at]);
            while bits != 0 {
                let range = self.group_range(at * 64 + bits.trailing_zeros() as usize);
                self.words[range].fill(0);
                bits &= bits - 1;
            }
        }
    }

    /// Moves the dirty pages from `page` on into a bitmap of their own.
    #[must_use]
    pub(crate) fn split_off(&mut self, page: u64) -> Self {
        let mut rest = Self::new(self.pages);
        let (first, mask) = ((page / WORD) as usize, u64::MAX << (page % WORD));
        let mut group = first / GROUP;
        while let Some(found) = next(&self.summary, group as u64) {
            group = found as usize;
            let range = self.group_range(group);
            let begin = range.start;
            let (ours, theirs) = (&mut self.words[range.clone()], &mut rest.words[range]);
            for (at, (ours, theirs)) in ours.iter_mut().zip(theirs).enumerate() {
                let taken = match begin + at {
                    word if word < first => 0,
                    word if word == first => *ours & mask,
                    _ => *ours,
                };
                *theirs = taken;
                *ours ^= taken;
            }
            self.summarise(group);
            rest.summarise(group);
            group += 1;
        }
        rest
    }

    /// Lets `fill` set bits in the words of an empty bitmap, and brings the summary up to date.
    /// `fill` says how many bits it set at most (`u64::MAX` when it does not know): the look for
    /// them ends when so many were found. Returns how many there are. When `fill` fails, what it
    /// has set is kept.
    ///
    /// # Panics
    /// When the bitmap is not empty.
    ///
    /// # Errors
    /// Those of `fill`.
    pub(crate) fn load<E>(
        &mut self,
        fill: impl FnOnce(&mut [u64]) -> Result<u64, E>,
    ) -> Result<u64, E> {
        assert!(self.is_empty(), "only an empty bitmap is loaded");
        let filled = fill(&mut self.words);
        let most = filled.as_ref().map_or(u64::MAX, |most| *most);
        let mut found = 0;
        for group in 0..self.words.len().div_ceil(GROUP) {
            if found >= most {
                break;
            }
            let range = self.group_range(group);
            if range.end == self.words.len() && !self.pages.is_multiple_of(WORD) {
                self.words[range.end - 1] &= u64::MAX >> (WORD - self.pages % WORD);
            }
            // Most groups are clean, mostly: those are looked at once.
            if self.summarise(group) {
                found += count(&self.words[range]);
            }
        }
        filled.map(|_| found)
    }

    /// Runs of dirty pages as (first, length), ascending. Adjacent pages are in one run.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next_dirty(at)?;
            at = self.next_clean(first);
            Some((first, at - first))
        })
    }

    /// The first piece of `words` words, counted from the bitmap's beginning, that has a dirty page
    /// and begins at word `from` or later: its first word's index, and its words, fewer than asked
    /// for only at the slot's end.
    ///
    /// # Panics
    /// When `from` is not a multiple of `words`.
    #[must_use]
    pub(crate) fn next_piece(&self, from: usize, words: usize) -> Option<(usize, &[u64])> {
        assert!(
            from.is_multiple_of(words),
            "pieces begin at multiples of their length"
        );
        let page = self.next_dirty(from as u64 * WORD)?;
        let word = (page / WORD) as usize;
        let first = word - word % words;
        let end = self.words.len().min(first + words);
        Some((first, &self.words[first..end]))
    }

    /// The first dirty page at or after `from`.
    fn next_dirty(&self, from: u64) -> Option<u64> {
        let word = (from / WORD) as usize;
        let group_end = self.words.len().min((word / GROUP + 1) * GROUP);
        if word < group_end && self.is_dirty(word / GROUP) {
            let found = next(&self.words[..group_end], from);
            if found.is_some() {
                return found;
            }
        }
        let group = next(&self.summary, (word / GROUP + 1) as u64)? as usize;
        next(&self.words, (group * GROUP) as u64 * WORD)
    }

    /// The first clean page after the dirty page `from`, or the slot's end.
    fn next_clean(&self, from: u64) -> u64 {
        let mut word = (from / WORD) as usize;
        let mut bits = !self.words[word] & (u64::MAX << (from % WORD));
        while bits == 0 {
            word += 1;
            match self.words.get(word) {
                Some(next) => bits = !next,
                None => return self.pages,
            }
        }
        word as u64 * WORD + u64::from(bits.trailing_zeros())
    }

    /// Groups with dirty pages, ascending.
    fn groups(&self) -> impl Iterator<Item = usize> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let group = next(&self.summary, at)?;
            at = group + 1;
            Some(group as usize)
        })
    }

    fn is_dirty(&self, group: usize) -> bool {
        self.summary[group / 64] >> (group % 64) & 1 == 1
    }

    fn group_range(&self, group: usize) -> std::ops::Range<usize> {
        let first = group * GROUP;
        first..self.words.len().min(first + GROUP)
    }

    fn group(&self, group: usize) -> &[u64] {
        &self.words[self.group_range(group)]
    }

    /// Brings the summary's bit of a group up to date, and returns it.
    fn summarise(&mut self, group: usize) -> bool {
        let any = self.group(group).iter().fold(0, |any, word| any | word) != 0;
        let word = &mut self.summary[group / 64];
        *word = *word & !(1 << (group % 64)) | u64::from(any) << (group % 64);
        any
    }
}

fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The first set bit at or after `from`.
fn next(words: &[u64], from: u64) -> Option<u64> {
    let mut index = (from / 64) as usize;
    let mut word = words.get(index)? & (u64::MAX << (from % 64));
    while word == 0 {
        index += 1;
        word = *words.get(index)?;
    }
    Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
}
