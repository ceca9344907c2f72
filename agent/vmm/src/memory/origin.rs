//! Memory whose pages come from elsewhere: a saved file, or a snapshot of another VM.
//!
//! It is empty at first. The pager brings pages, says so in a bitmap that both processes see, and
//! whoever reads memory of its own accord has them brought before. Once all are there nothing is
//! left of it.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use slat_paging::bits::SharedBits;

/// Where the pages of a memory come from.
#[derive(Debug)]
pub(crate) struct Origin {
    number: u32,
    pages: u64,
    /// Which are there; `None`: all.
    loaded: Mutex<Option<Arc<SharedBits>>>,
}

impl Origin {
    /// Memory `number` of the source, of so many pages, none of which is there.
    ///
    /// # Errors
    /// When the bitmap cannot be made.
    pub(crate) fn new(number: u32, pages: u64) -> io::Result<Self> {
        let loaded = Arc::new(SharedBits::new("slat-loaded", pages)?);
        Ok(Self {
            number,
            pages,
            loaded: Mutex::new(Some(loaded)),
        })
    }

    /// Its number in the source's first layer.
    #[must_use]
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Which pages are there; `None` once all are.
    #[must_use]
    pub(crate) fn loaded(&self) -> Option<Arc<SharedBits>> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.clone()
    }

    /// All are there.
    pub(crate) fn settle(&self) {
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Pages that are there, and all.
    #[must_use]
    pub(crate) fn progress(&self) -> (u64, u64) {
        let there = self.loaded().map_or(self.pages, |loaded| loaded.count());
        (there, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_until_all_are_there() {
        let origin = Origin::new(7, 100).unwrap();
        let bits = origin.loaded().unwrap();
        bits.set(3);
        bits.set(99);
        assert_eq!((origin.number(), origin.progress()), (7, (2, 100)));
        origin.settle();
        assert!(origin.loaded().is_none());
        assert_eq!(origin.progress(), (100, 100));
    }
}
