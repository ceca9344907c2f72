//! The tables that the NX-huge-page mitigation keeps.
//!
//! *Locking*: a lock of its own (`locks`), held for one change or one look.

use alloc::collections::BTreeSet;

use crate::{addr::Pfn, sync::Mutex};

/// The tables that the mitigation keeps.
#[derive(Debug)]
pub(super) struct NxTables(pub(super) Mutex<BTreeSet<Pfn>>);

impl NxTables {
    pub(super) fn new() -> Self {
        Self(Mutex::new(BTreeSet::new()))
    }

    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn all(&self) -> alloc::vec::Vec<Pfn> {
        self.0.lock().iter().copied().collect()
    }
}
