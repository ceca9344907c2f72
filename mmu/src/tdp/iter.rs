//! Pre-order iteration over the entries that cover a range of guest frames.
//!
//! An entry is visited before the entries of the table that it points to, so a visitor may link, split or zap and the
//! iterator follows what it finds *then*: it reads the entry again before it steps down. The snapshot in
//! [`old`](TdpIter::old) may be stale; every write goes through a compare-exchange against it or takes what is there.
//!
//! *Locking*: a [`Guard`] for the whole life. *Yielding*: who gives up its locks in the middle calls
//! [`yielded`](TdpIter::yielded); the next step restarts from the root, without advancing, at the frame that was due.
//! It is refused if nothing was visited since the last time, so a loop that yields whenever it is asked still ends.

use crate::{
    addr::{Gfn, GfnRange, Level, MAX_LEVELS},
    format::Format,
    table::{
        memory::TableMemory,
        node::{Detached, Guard, Node},
    },
};

pub(crate) struct TdpIter<'g, F: Format, H: TableMemory> {
    guard: &'g Guard<'g, F, H>,
    /// The tables on the path, by level; those from `level` up to the root's are valid.
    path: [Node<'g, F>; MAX_LEVELS],
    root_level: Level,
    min_level: Level,
    level: Level,
    /// First frame that the entry at hand covers.
    gfn: Gfn,
    /// The frame the iteration has come to; never less than `gfn`.
    next_last_level_gfn: Gfn,
    /// Where the last yield happened.
    yielded_gfn: Option<Gfn>,
    end: Gfn,
    old: u64,
    position: Position,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    /// Must begin at the root before the next visit.
    Restart,
    /// At an entry.
    Entry,
    /// Past the end.
    Done,
}

impl<'g, F: Format, H: TableMemory> TdpIter<'g, F, H> {
    /// Visits, in the tree under `root` (a table of the format's root level), the entries of levels ≥ `min_level` that
    /// cover a frame of `range`.
    pub(crate) fn new(
        guard: &'g Guard<'g, F, H>,
        root: Node<'g, F>,
        range: GfnRange,
        min_level: Level,
    ) -> Self {
        Self {
            guard,
            path: [root; MAX_LEVELS],
            root_level: F::ROOT_LEVEL,
            min_level,
            level: F::ROOT_LEVEL,
            gfn: range.start,
            next_last_level_gfn: range.start,
            yielded_gfn: None,
            end: range.end.min(F::MAX_GFN),
            old: F::EMPTY,
            position: Position::Restart,
        }
    }

    /// Goes to the next entry; false at the end.
    pub(crate) fn advance(&mut self) -> bool {
        match self.position {
            Position::Done => return false,
            Position::Restart => {
                self.level = self.root_level;
                self.gfn = F::align_down(self.next_last_level_gfn, self.level);
                self.position = Position::Entry;
                self.reread();
            }
            Position::Entry => self.step(),
        }
        // The entry at hand may begin before the range, but the frame that is due must lie in it.
        if self.position == Position::Entry && self.next_last_level_gfn >= self.end {
            self.position = Position::Done;
        }
        self.position == Position::Entry
    }

    fn step(&mut self) {
        if self.try_step_down() {
            return;
        }
        while !self.try_step_side() {
            match self.level.parent() {
                Some(parent) if self.level < self.root_level => {
                    self.level = parent;
                    self.gfn = F::align_down(self.gfn, parent);
                }
                _ => {
                    self.position = Position::Done;
                    return;
                }
            }
        }
    }

    fn try_step_down(&mut self) -> bool {
        if self.level <= self.min_level {
            return false;
        }
        let (Some(level), Some(child)) = (
            self.level.child(),
            self.guard.child(self.node(), self.index()),
        ) else {
            return false;
        };
        self.level = level;
        self.path[level.slot()] = child;
        self.gfn = F::align_down(self.next_last_level_gfn, level);
        self.reread();
        true
    }

    fn try_step_side(&mut self) -> bool {
        if self.index() + 1 >= self.node().len() {
            return false;
        }
        self.gfn = Gfn(self.gfn.0 + F::span(self.level));
        self.next_last_level_gfn = self.gfn;
        self.reread();
        true
    }

    /// Takes a new snapshot of the entry at hand.
    pub(crate) fn reread(&mut self) {
        self.old = self.node().load(self.index());
    }

    /// Notes that locks were given up; false, and nothing noted, if the iteration has made no progress since the last
    /// time. The caller goes straight to [`advance`](Self::advance).
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "long operations do not yield yet")
    )]
    pub(crate) fn yielded(&mut self) -> bool {
        if self.position != Position::Entry || self.yielded_gfn == Some(self.next_last_level_gfn) {
            return false;
        }
        self.yielded_gfn = Some(self.next_last_level_gfn);
        self.position = Position::Restart;
        true
    }

    pub(crate) fn node(&self) -> Node<'g, F> {
        self.path[self.level.slot()]
    }

    pub(crate) fn index(&self) -> usize {
        F::index(self.gfn, self.level)
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    pub(crate) fn gfn(&self) -> Gfn {
        self.gfn
    }

    /// The frames that the entry at hand covers.
    pub(crate) fn span(&self) -> GfnRange {
        GfnRange::new(self.gfn, F::span(self.level))
    }

    /// The entry as last read.
    pub(crate) fn old(&self) -> u64 {
        self.old
    }

    /// Stores `new`, which is not a table, if the entry is still [`old`](Self::old); if not, takes a new snapshot. A
    /// table that the entry pointed to comes back and must be torn down.
    pub(crate) fn replace(&mut self, new: u64) -> Result<Option<Detached>, Stale> {
        match self.node().replace(self.index(), self.old, new) {
            Ok(detached) => {
                self.old = new;
                Ok(detached)
            }
            Err(current) => {
                self.old = current;
                Err(Stale)
            }
        }
    }
}

/// The entry changed since it was read; the snapshot is new.
#[derive(Debug)]
pub(crate) struct Stale;
