//! The owner of the tables that mirror roots stand for, and the changes that it is asked for.
//!
//! The owner is firmware that keeps a confidential guest's tables, or a kernel whose mappings a
//! process steers (userfaultfd). The MMU keeps a tree of its own, the *mirror*, which it can read,
//! and has each change of a leaf carried out by the owner. A leaf of the mirror stands for a
//! mapping of the owner's, with its leave to write, and absence for none.
//!
//! # Protocol
//!
//! 1. Under the MMU lock the entries that are to change are *frozen*, and the changes are put in a
//!    [`Batch`], neighbours in one [`Change`].
//! 2. With no lock of the MMU held, [`ExternalTables::apply`] carries the batch out.
//! 3. Under the lock again, each entry becomes what was asked for if the owner did it, or what it
//!    was.
//!
//! While an entry is frozen nobody else asks the owner about its frame. A fault that meets one is
//! told to try again; whoever unmaps, protects or ages waits, without the MMU lock, until the batch
//! is over, and looks again. So the changes of one frame reach the owner one after another, in the
//! order in which the mirror has them.
//!
//! At the end of the MMU everything that is mapped is unmapped. An owner whose view goes anyway is
//! spared that by [`withdraw_mirrors`](crate::AddressSpace::withdraw_mirrors) before.
//!
//! # Locking
//!
//! `apply` is called without the MMU lock and outside any read section. The slots lock may be held:
//! deleting or moving a slot unmaps it. `link_table` and `free_table` are called with the MMU lock
//! held, shared or exclusive. None of the three may call into the MMU, but to read statistics, nor
//! wait for a thread that may be in there.

use alloc::vec::Vec;

use crate::{
    addr::{Gfn, GfnRange, Level, Pfn},
    refused::Refused,
};

/// The owner of the tables that mirror roots stand for. The module's page has the protocol.
pub trait ExternalTables: Send + Sync {
    /// Carries out the changes of `batch`, in any order, and says of each how far it came
    /// ([`Change::accept`], [`Change::refuse`]). What is not said to be done counts as refused for
    /// being [`Busy`](Refused::Busy).
    ///
    /// When it returns, what was unmapped or protected is so for every vCPU: no translation that
    /// allows more is left, and no access that used one is under way.
    ///
    /// It may take its time: nothing is held but the frames of the batch (and the slots lock, where
    /// a slot is going). It is called by several threads at once, for frames that differ. If it
    /// panics, what it has not answered counts as refused.
    fn apply(&self, batch: &mut Batch);

    /// Makes a table of `level` for the frames from `gfn` on. `table` is the mirror's own table:
    /// the two stand for each other. For owners whose tables are made one by one; others have
    /// nothing to do.
    ///
    /// Called with the MMU lock held, shared.
    ///
    /// # Errors
    /// The table is not made, and the fault ends with the reason.
    fn link_table(&self, gfn: Gfn, level: Level, table: Pfn) -> Result<(), Refused> {
        let _ = (gfn, level, table);
        Ok(())
    }

    /// Gives back the table made for `table`, at the end of the MMU. It is empty but for frames
    /// whose unmapping was refused.
    ///
    /// Called with the MMU lock held, exclusive.
    ///
    /// # Errors
    /// The owner keeps it; so does the MMU, which leaks its own.
    fn free_table(&self, gfn: Gfn, level: Level, table: Pfn) -> Result<(), Refused> {
        let _ = (gfn, level, table);
        Ok(())
    }
}

/// What is to be done with a run of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// Frames that are not mapped become mapped, the first to [`Change::pfn`] and each to the next.
    Map {
        /// Whether the guest may write to them.
        writable: bool,
        /// Someone said that the owner lost the mapping of a frame that the mirror has
        /// ([`Fault::again`](crate::Fault::again)). That may be old news: a frame that is mapped
        /// after all is no failure, but becomes writable or not as said here.
        again: bool,
    },
    /// Mapped frames get or lose the leave to write. Where the owner lost a mapping there is
    /// nothing to do, which counts as done: it is said anew when the frame is mapped again.
    Protect {
        /// Whether the guest may write to them from now on.
        writable: bool,
    },
    /// Frames that are mapped are so no more. One whose mapping the owner lost is done.
    Unmap,
}

impl ChangeKind {
    /// How many kinds there are in statistics.
    pub(crate) const COUNT: usize = 3;

    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Map { .. } => 0,
            Self::Protect { .. } => 1,
            Self::Unmap => 2,
        }
    }
}

/// One change: a run of neighbouring frames, and how far the owner came with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    kind: ChangeKind,
    gfns: GfnRange,
    pfn: Pfn,
    done: u64,
    refused: Refused,
}

impl Change {
    /// What is to be done.
    pub fn kind(&self) -> ChangeKind {
        self.kind
    }

    /// The frames, at least one. Those to be mapped lie in one slot. Others may lie in two that
    /// touch, on both sides alike, and an unmapping's in none any more.
    pub fn gfns(&self) -> GfnRange {
        self.gfns
    }

    /// The host frame of the first one; the others follow as the guest's do.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The whole of it is done.
    pub fn accept(&mut self) {
        self.done = self.gfns.pages();
    }

    /// The first `done` pages are done, and the rest is not, for the reason `why`.
    pub fn refuse(&mut self, done: u64, why: Refused) {
        self.done = done.min(self.gfns.pages());
        self.refused = why;
    }

    /// Pages from the start that are done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Why the rest is not done, if there is a rest.
    pub fn refused(&self) -> Option<Refused> {
        (self.done < self.gfns.pages()).then_some(self.refused)
    }

    /// Whether `gfn` is among the frames that are done.
    pub(crate) fn did(&self, gfn: Gfn) -> bool {
        GfnRange::new(self.gfns.start, self.done).contains(gfn)
    }
}

/// Changes that the owner is asked for at once, of one mirror root.
#[derive(Debug, Default)]
pub struct Batch {
    as_id: u8,
    generation: u64,
    changes: Vec<Change>,
}

impl Batch {
    /// The address space that the frames are of.
    pub fn as_id(&self) -> u8 {
        self.as_id
    }

    /// The generation of the mirror root: compare it with what
    /// [`withdraw_mirrors`](crate::AddressSpace::withdraw_mirrors) returned. A batch of a root that
    /// was withdrawn meanwhile must not be carried out on what took the old view's place.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The changes. Those that touch are in the order of their frames.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// The changes, to be answered.
    pub fn changes_mut(&mut self) -> &mut [Change] {
        &mut self.changes
    }

    /// Answers each change in the same way: `Ok` accepts, an error refuses it whole.
    pub fn answer(&mut self, all: Result<(), Refused>) {
        for change in &mut self.changes {
            match all {
                Ok(()) => change.accept(),
                Err(why) => change.refuse(0, why),
            }
        }
    }

    /// Empties it, for changes of another root or another time.
    pub(crate) fn begin(&mut self, as_id: u8, generation: u64) {
        self.as_id = as_id;
        self.generation = generation;
        self.changes.clear();
    }

    /// Adds a frame: to the last change, if it goes on there.
    #[inline(always)]
    pub(crate) fn push(&mut self, kind: ChangeKind, gfn: Gfn, pfn: Pfn) {
        if let Some(last) = self.changes.last_mut()
            && last.kind == kind
            && last.gfns.end == gfn
            && last.pfn.0 + last.gfns.pages() == pfn.0
        {
            last.gfns.end.0 += 1;
            return;
        }
        self.changes.push(Change {
            kind,
            gfns: GfnRange::new(gfn, 1),
            pfn,
            done: 0,
            refused: Refused::Busy,
        });
    }
}
