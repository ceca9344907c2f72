//! The tables that the NX-huge-page mitigation keeps.
//!
//! *Locking*: a lock of its own (`locks`), held for one change or one look.

use alloc::collections::BTreeSet;
use core::ops::Bound;

use crate::{addr::Pfn, sync::Mutex};

/// The tables that the mitigation keeps.
#[derive(Debug)]
pub(super) struct NxTables(Mutex<BTreeSet<Pfn>>);

impl NxTables {
    pub(super) fn new() -> Self {
        Self(Mutex::new(BTreeSet::new()))
    }

    /// Notes a table; false if it was noted.
    pub(super) fn insert(&self, pfn: Pfn) -> bool {
        self.0.lock().insert(pfn)
    }

    /// Forgets a table; false if it was not noted.
    pub(super) fn remove(&self, pfn: Pfn) -> bool {
        self.0.lock().remove(&pfn)
    }

    /// The first table after `last`, of those noted now.
    pub(super) fn after(&self, last: Option<Pfn>) -> Option<Pfn> {
        let from = last.map_or(Bound::Unbounded, Bound::Excluded);
        self.0
            .lock()
            .range((from, Bound::Unbounded))
            .next()
            .copied()
    }

    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn all(&self) -> alloc::vec::Vec<Pfn> {
        self.0.lock().iter().copied().collect()
    }
}
