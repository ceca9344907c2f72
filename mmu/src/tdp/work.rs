//! A batch of changes of a mirror, and the entries that are frozen for it.
//!
//! For each page it has what its entry was and what it becomes. Neighbours become one change of the
//! owner's even if their entries differ: in what the owner does not see, such as Accessed.
//!
//! Whose it is carries it out before it lets go of it (`batch`): dropped with frozen entries it
//! would leave them so. It is emptied and used again, for its memory.
//!
//! *Locking*: none; it is one thread's.

use alloc::vec::Vec;

use super::root::RootPage;
use crate::{
    addr::{Gfn, Pfn},
    external::{Batch, Change, ChangeKind},
    refused::Refused,
};

/// An entry that is frozen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) old: u64,
    pub(super) new: u64,
}

/// A batch, and the entries that are frozen for it.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) batch: Batch,
    /// One a page, in the order of the batch's changes.
    pub(super) entries: Vec<Pending>,
}

/// What is to become of an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pub(super) kind: ChangeKind,
    pub(super) pfn: Pfn,
    pub(super) old: u64,
    pub(super) new: u64,
}

impl Work {
    /// Empties it, for changes under `root`.
    pub(super) fn begin(&mut self, root: &RootPage) {
        self.batch.begin(root.as_id, root.generation);
        self.entries.clear();
    }

    pub(super) fn pages(&self) -> usize {
        self.entries.len()
    }

    /// Adds the entry of `gfn`, which the caller has frozen.
    #[inline(always)]
    pub(super) fn push(&mut self, gfn: Gfn, wish: Wish) {
        self.batch.push(wish.kind, gfn, wish.pfn);
        self.entries.push(Pending {
            old: wish.old,
            new: wish.new,
        });
    }

    pub(super) fn changes(&self) -> &[Change] {
        self.batch.changes()
    }

    /// The first reason for which something was refused.
    pub(super) fn refused(&self) -> Option<Refused> {
        self.changes().iter().find_map(Change::refused)
    }
}
