//! Entries, and how each may be changed.
//!
//! # Protocol
//!
//! Any participant that is inside may read entries; they change only by atomic operations, so a
//! reader sees the old or the new value, and a table's contents before the entry that links it
//! (release on link, acquire on load).
//!
//! How an entry may be changed depends on what it holds and on the MMU lock:
//!
//! - *compare-exchange* ([`Node::replace`], [`Node::link`]): always allowed; fails if the entry
//!   changed.
//! - *exchange* ([`Node::take`]): for who may remove the entry whatever it holds (exclusive lock,
//!   or a table that is being torn down).
//! - *plain store* ([`Run::bottom`]): for a 4 KiB leaf that nobody else changes: the holder of the
//!   exclusive lock, or of the slots lock and the shared lock, on an entry that is not
//!   [volatile](crate::Format::is_volatile). Ageing may clear Accessed at the same time, and that
//!   may be lost.
//!
//! # Invariants
//!
//! 1. An entry that decodes to `Table { pfn }` in a node of level *n* was stored by [`Node::link`],
//!    so `pfn` is a live table of level *n* - 1. [`Node::replace`] and `Blank::fill` refuse to
//!    store a table entry; at 4 KiB no value is one.
//! 2. A table is linked by at most one entry: linking consumes its [`Unlinked`], overwriting the
//!    entry, or detaching all below the table that holds it, produces its [`Detached`], and neither
//!    can be copied.
//! 3. A table is freed either as `Blank` or `Unlinked` (nobody ever saw it) or as `Detached` after
//!    a grace period.

use core::marker::PhantomData;

use super::{
    memory::EntryCell,
    ticket::{Detached, Unlinked},
};
use crate::{
    addr::{Gfn, GfnRange, Level, PAGE_SHIFT, Pfn},
    format::Format,
    sync::{AcqRel, Acquire, Relaxed, Release},
};

/// A table being looked at.
pub(crate) struct Node<'g, F> {
    pub(super) entries: &'g [EntryCell],
    /// Host physical address, in bytes.
    pub(super) hpa: u64,
    pub(super) level: Level,
    pub(super) format: PhantomData<F>,
}

impl<F> Clone for Node<'_, F> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Node<'_, F> {}

/// Entries in a cache line.
pub(crate) const LINE: usize = 64 / size_of::<u64>();

/// What [`Node::take`] leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    /// An entry that a fault may fill.
    Empty,
    /// An entry of a table that is being torn down: nobody may fill it.
    Frozen,
}

impl<'g, F: Format> Node<'g, F> {
    #[inline(always)]
    pub(crate) fn pfn(&self) -> Pfn {
        Pfn(self.hpa >> PAGE_SHIFT)
    }

    #[inline(always)]
    pub(super) fn hpa(&self) -> u64 {
        self.hpa
    }

    /// Host physical address of an entry, in bytes.
    pub(crate) fn address_of(&self, index: usize) -> u64 {
        self.hpa + (index * size_of::<u64>()) as u64
    }

    #[inline(always)]
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    #[inline(always)]
    pub(crate) fn load(&self, index: usize) -> u64 {
        self.entries[index].0.load(Acquire)
    }

    /// Stores `new`, which is not a table, if the entry is still `old`. If `old` linked a table,
    /// that table is returned.
    ///
    /// # Errors
    ///
    /// The entry's present value if it is not `old` (or if `new` is a table: a caller's mistake
    /// that changes nothing).
    #[inline(always)]
    pub(crate) fn replace(
        &self,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<Option<Detached>, u64> {
        if F::as_table(new, self.level).is_some() {
            return Err(self.load(index));
        }
        self.entries[index]
            .0
            .compare_exchange(old, new, AcqRel, Acquire)?;
        Ok(self.detach(old))
    }

    /// Empties the entry whatever it holds, and returns what that was.
    pub(crate) fn take(&self, index: usize, leave: Absent) -> (u64, Option<Detached>) {
        let new = match leave {
            Absent::Empty => F::EMPTY,
            Absent::Frozen => F::FROZEN,
        };
        let old = self.entries[index].0.swap(new, AcqRel);
        (old, self.detach(old))
    }

    /// Points the entry to `child`, with all that was written into it, if the entry is still `old`
    /// and `old` is no table.
    ///
    /// # Errors
    ///
    /// `child` comes back if the entry has changed, or if it is not of the level below.
    pub(crate) fn link(&self, index: usize, old: u64, child: Unlinked) -> Result<(), Unlinked> {
        if F::as_table(old, self.level).is_some() || Some(child.level) != self.level.child() {
            return Err(child);
        }
        let new = F::make_table(child.pfn);
        match self.entries[index]
            .0
            .compare_exchange(old, new, AcqRel, Acquire)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(child),
        }
    }

    #[inline(always)]
    pub(super) fn detach(&self, old: u64) -> Option<Detached> {
        let pfn = F::as_table(old, self.level)?;
        let level = self.level.child()?;
        Some(Detached { pfn, level })
    }

    /// Asks for the entries, so that they are near when their turn comes. Nothing waits, and
    /// nothing is read.
    #[inline(always)]
    pub(crate) fn fetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for entry in self.entries.iter().step_by(LINE) {
            // SAFETY: prefetching reads nothing and cannot fault; every x86-64 has it.
            unsafe {
                core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
                    core::ptr::from_ref(entry).cast(),
                );
            }
        }
    }

    /// The part of a 4 KiB table that covers `range`, of which it covers at least one frame from
    /// `first` on.
    pub(crate) fn entries_at_bottom(&self) -> Option<&'g [EntryCell]> {
        (self.level == Level::SIZE_4K).then_some(self.entries)
    }
}

/// Neighbouring entries of one table: what a sweep visits at a time.
pub(crate) struct Run<'g, F> {
    pub(crate) node: Node<'g, F>,
    /// Positions in the table.
    pub(crate) first: usize,
    pub(crate) end: usize,
    /// First frame that entry `first` covers.
    pub(crate) gfn: Gfn,
}

impl<'g, F: Format> Run<'g, F> {
    /// The frames that entry `index` of the table covers.
    pub(crate) fn span_of(&self, index: usize) -> GfnRange {
        let span = F::span(self.node.level);
        GfnRange::new(Gfn(self.gfn.0 + (index - self.first) as u64 * span), span)
    }

    /// The entries, if this is a 4 KiB table: there no value is ever followed, so every store is
    /// sound.
    #[inline(always)]
    pub(crate) fn bottom(&self) -> Option<Bottom<'g>> {
        let entries = self.node.entries_at_bottom()?;
        Some(Bottom(&entries[self.first..self.end]))
    }
}

/// Entries of a 4 KiB table.
#[derive(Clone, Copy)]
pub(crate) struct Bottom<'g>(&'g [EntryCell]);

impl Bottom<'_> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    pub(crate) fn load(&self, index: usize) -> u64 {
        self.0[index].0.load(Relaxed)
    }

    /// Brings the entries near before they are looked at one by one: one load a cache line, none of
    /// which waits for another, where a loop that decides about each entry has only a few lines
    /// under way.
    #[inline(always)]
    pub(crate) fn warm(&self) {
        let all = self.0.iter().step_by(LINE);
        core::hint::black_box(all.fold(0, |all, entry| all ^ entry.0.load(Relaxed)));
    }

    /// A line of neighbours, each as it is at one moment.
    #[inline(always)]
    pub(crate) fn load_line(&self, index: usize) -> [u64; LINE] {
        let line = &self.0[index..index + LINE];
        core::array::from_fn(|i| line[i].0.load(Relaxed))
    }

    /// Changes each of a line of neighbours that nobody else changes.
    #[inline(always)]
    pub(crate) fn change_line(&self, index: usize, new: impl Fn(u64) -> u64) {
        for entry in index..index + LINE {
            self.store(entry, new(self.load(entry)));
        }
    }

    /// Overwrites a line of neighbours that nobody else changes.
    #[inline(always)]
    pub(crate) fn store_line(&self, index: usize, raw: [u64; LINE]) {
        if cfg!(feature = "loom") {
            // As in `store`.
            for (i, raw) in raw.into_iter().enumerate() {
                self.store(index + i, raw);
            }
            return;
        }
        let line = &self.0[index..index + LINE];
        for (entry, raw) in line.iter().zip(raw) {
            entry.0.store(raw, Release);
        }
    }

    /// Overwrites an entry that nobody else changes (see the module).
    #[inline(always)]
    pub(crate) fn store(&self, index: usize, raw: u64) {
        // loom lets another thread's exchange come after a store that it did not read, which no
        // machine does. An exchange overwrites as blindly as the store.
        if cfg!(feature = "loom") {
            self.0[index].0.swap(raw, Release);
            return;
        }
        self.0[index].0.store(raw, Release);
    }

    #[inline(always)]
    pub(crate) fn swap(&self, index: usize, raw: u64) -> u64 {
        self.0[index].0.swap(raw, AcqRel)
    }

    /// # Errors
    ///
    /// The entry's present value if it is not `old`.
    #[inline(always)]
    pub(crate) fn replace(&self, index: usize, old: u64, new: u64) -> Result<u64, u64> {
        self.0[index].0.compare_exchange(old, new, AcqRel, Acquire)
    }
}
