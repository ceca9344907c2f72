//! Pages that were aged and not touched since. A fault maps its neighbours, but none of these: so
//! what is mapped again after an ageing is what the guest touched, page by page.
//!
//! *Locking*: bits. Whoever ages sets them, waits for faults that are being resolved (by the
//! layout's write lock), and then takes mappings away. Memory for them is made by the first ageing.

use std::{
    ops::Range,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Aged(OnceLock<Box<[AtomicU64]>>);

impl Aged {
    /// These of `all` pages are aged.
    pub(crate) fn set(&self, pages: Range<u64>, all: u64) {
        let made = || (0..all.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let words = self.0.get_or_init(made);
        for page in pages {
            if let Some(word) = words.get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Relaxed);
            }
        }
    }

    /// The guest touches a page.
    pub(crate) fn touched(&self, page: u64) {
        if let Some(word) = self.word(page) {
            word.fetch_and(!(1 << (page % 64)), Relaxed);
        }
    }

    /// Those around `page` up to the next aged ones.
    pub(crate) fn trim(&self, page: u64, around: Range<u64>) -> Range<u64> {
        if self.0.get().is_none() {
            return around;
        }
        let young = |page: &u64| !self.has(*page);
        let before = (around.start..page).rev().take_while(young).count() as u64;
        let after = (page + 1..around.end).take_while(young).count() as u64;
        page - before..page + 1 + after
    }

    fn has(&self, page: u64) -> bool {
        let word = self.word(page);
        word.is_some_and(|word| word.load(Relaxed) & (1 << (page % 64)) != 0)
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get()?.get((page / 64) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_a_touched_page_are_young_ones() {
        let aged = Aged::default();
        assert_eq!(aged.trim(10, 0..16), 0..16);
        aged.set(4..12, 100);
        aged.touched(10);
        aged.touched(9);
        assert_eq!(aged.trim(10, 0..16), 9..11);
        assert_eq!(aged.trim(13, 0..16), 12..16);
        assert_eq!(aged.trim(2, 0..16), 0..4);
        aged.touched(1000);
    }
}
