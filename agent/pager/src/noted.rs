//! Pages that became writable while a snapshot is armed.
//!
//! Each arming has a number of its own, and looks at what was noted for it alone: one that was
//! given up may still be at work when the next begins, of another snapshot or of the same.
//!
//! *Locking*: a page is noted under the layout's read lock, before the mirror makes it writable,
//! and what is noted is taken under the write lock. So whoever takes it knows that every page that
//! was noted is writable by now, or never will be by that fault; and that each later one is noted
//! anew.

use std::{
    ops::Range,
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{self, Relaxed},
    },
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Noted {
    /// Which is armed.
    pub(crate) snapshot: u64,
    /// By which arming.
    pub(crate) arming: u64,
    /// Its rounds are over: nothing is writable but what is noted here.
    over: AtomicBool,
    words: Vec<AtomicU64>,
}

impl Noted {
    pub(crate) fn new(snapshot: u64, arming: u64, pages: u64) -> Self {
        let words = pages.div_ceil(64);
        Self {
            snapshot,
            arming,
            over: AtomicBool::new(false),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(crate) fn set(&self, page: u64) {
        if let Some(word) = self.words.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Relaxed);
        }
    }

    /// The arming has made its rounds.
    pub(crate) fn set_over(&self) {
        self.over.store(true, Ordering::Release);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Relaxed).count_ones());
        self.words.iter().map(ones).sum()
    }

    /// Takes what was noted, as runs.
    pub(crate) fn take(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (word, first) in self.words.iter().zip((0..).step_by(64)) {
            if word.load(Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Relaxed);
            while bits != 0 {
                let page = first + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                match runs.last_mut() {
                    Some(run) if run.end == page => run.end = page + 1,
                    _ => runs.push(page..page + 1),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_taken_once() {
        let noted = Noted::new(1, 1, 200);
        for page in [3, 63, 64, 65, 199] {
            noted.set(page);
        }
        assert_eq!(noted.count(), 5);
        assert_eq!(noted.take(), [3..4, 63..66, 199..200]);
        assert_eq!(noted.take(), []);
    }
}
