//! Tickets: values that say what may be done with a table, and whose it is.
//!
//! A ticket cannot be copied, and each step of a table's life consumes one and yields the next:
//!
//! `Blank` (memory) → `Unlinked` (filled, nobody has seen it) → linked (no ticket: the entry is it)
//! → `Detached` (unlinked, readers may still be in it) → retired, and freed after a grace period.
//!
//! Only this folder makes tickets. The rules that they stand for are invariants 2 and 3 of `node`.

use core::ptr::NonNull;

use super::memory::EntryCell;
use crate::addr::{Level, Pfn};

/// Memory for a table that is not a root, with anything in it.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Blank {
    pub(super) pfn: Pfn,
}

/// A table that no entry has ever pointed to.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Unlinked {
    pub(super) pfn: Pfn,
    pub(super) level: Level,
}

/// A table that was linked once and is not any more; readers may still be in it.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Detached {
    pub(super) pfn: Pfn,
    pub(super) level: Level,
}

/// A root's table: live for as long as this is.
#[derive(Debug)]
pub(crate) struct RootTable {
    pub(super) pfn: Pfn,
    pub(super) entries: NonNull<EntryCell>,
}

// SAFETY: a pointer to atomics, which live as long as the table memory; who follows it shows that
// the root is live.
unsafe impl Send for RootTable {}
// SAFETY: as above.
unsafe impl Sync for RootTable {}

impl Unlinked {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Detached {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }
}

impl RootTable {
    pub(super) fn new(pfn: Pfn, entries: NonNull<EntryCell>) -> Self {
        Self { pfn, entries }
    }

    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }
}
