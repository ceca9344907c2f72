//! Unmapping, protecting and ageing a range of a mirror, in batches.
//!
//! A step collects up to [`MOST`] pages under the shared lock, lets go, has them changed by the
//! owner, and goes on behind the last frame it looked at. So a frame is asked for once, also if the
//! owner refuses. An entry that another batch owns ends the step; if there was nothing before it,
//! the step waits for that batch. So when a range is done, each of its entries was seen unfrozen,
//! and was either not to be changed or has been asked for.
//!
//! A fault that begins meanwhile may map behind the step, as one that begins after the operation
//! may. Who must keep them off does so before, as for the guest's own tables: by an invalid slot,
//! or by an invalidation in progress.
//!
//! *Locking*: the shared MMU lock while a step collects. Slots lock: as the caller has it.

use alloc::vec::Vec;

use super::{
    mmu::TdpMmu,
    root::RootPage,
    work::{Wish, Work},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    external::{Change, ChangeKind},
    flush::FlushCause,
    format::{Entry, Format, Leaf},
    rcu::cell::Cell,
    refused::Refused,
    table::{guard::Guard, memory::TableMemory},
};

/// Pages in one batch.
const MOST: usize = 4096;
/// Entries looked at while the lock is held.
const LOOKS: usize = 4 * MOST;

/// What came of a change of a range of a mirror.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MirrorChange {
    /// Pages that were changed.
    pub pages: u64,
    /// Pages whose change the owner refused: they are as they were.
    pub kept: u64,
    /// Why, for the first of them.
    pub refused: Option<Refused>,
}

impl MirrorChange {
    fn add(&mut self, work: &Work) {
        for change in work.changes() {
            self.pages += change.done();
            self.kept += change.gfns().pages() - change.done();
        }
        self.refused = self.refused.or(work.refused());
    }
}

/// A part of a range of a mirror that was aged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Aged {
    /// Frames that were mapped, by frame: used since they were last aged, or mapped beside one that
    /// was. They are unmapped now, but for those that the owner kept.
    pub young: Vec<GfnRange>,
    /// How many were unmapped, how many kept.
    pub change: MirrorChange,
    /// What was not looked at yet. Empty at the end.
    pub rest: GfnRange,
}

/// What to do with leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    Unmap,
    WriteProtect,
}

impl Aim {
    fn wish<F: Format>(self, raw: u64, leaf: &Leaf) -> Option<Wish> {
        let (kind, new) = match self {
            Self::Unmap => (ChangeKind::Unmap, F::EMPTY),
            Self::WriteProtect if !leaf.writable => return None,
            Self::WriteProtect => {
                let protected = Leaf {
                    writable: false,
                    ..*leaf
                };
                let new = F::make_leaf(&protected, Level::SIZE_4K);
                (ChangeKind::Protect { writable: false }, new)
            }
        };
        Some(Wish {
            kind,
            pfn: leaf.pfn,
            old: raw,
            new,
        })
    }
}

/// Where a step ended.
struct Step {
    next: Gfn,
    /// There is an entry at `next` that another batch owns.
    met: bool,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Changes the leaves over `range` of the address space's mirror.
    pub(super) fn do_change_mirror(
        &self,
        as_id: u8,
        range: GfnRange,
        aim: Aim,
        cause: FlushCause,
    ) -> MirrorChange {
        let mut all = MirrorChange::default();
        for root in self.roots_of(as_id, |root| root.mirror && !root.is_invalid()) {
            self.change_under(&root, range, aim, cause, &mut all);
        }
        all
    }

    pub(super) fn change_under(
        &self,
        root: &RootPage,
        range: GfnRange,
        aim: Aim,
        cause: FlushCause,
        all: &mut MirrorChange,
    ) {
        let reader = self.participants.reader_slot();
        let mut work = Work::default();
        let mut rest = clipped::<F>(range);
        while !rest.is_empty() {
            rest.start = self.change_step(root, rest, aim, cause, &reader, &mut work);
            all.add(&work);
        }
    }

    pub(super) fn do_age_mirror(&self, as_id: u8, range: GfnRange) -> Aged {
        let mut aged = Aged::default();
        let (aim, cause) = (Aim::Unmap, FlushCause::Age);
        let reader = self.participants.reader_slot();
        let mut work = Work::default();
        for root in self.roots_of(as_id, |root| root.mirror && !root.is_invalid()) {
            aged.rest = clipped::<F>(range);
            while !aged.rest.is_empty() && work.pages() == 0 {
                let rest = aged.rest;
                aged.rest.start = self.change_step(&root, rest, aim, cause, &reader, &mut work);
            }
            aged.young = work.changes().iter().map(Change::gfns).collect();
            aged.change.add(&work);
        }
        aged
    }

    /// Changes the first leaves over `range`; where to go on.
    fn change_step(
        &self,
        root: &RootPage,
        range: GfnRange,
        aim: Aim,
        cause: FlushCause,
        cell: &Cell,
        work: &mut Work,
    ) -> Gfn {
        work.begin(root);
        let seen = root.batches_over();
        let step = {
            let guard = Guard::new(&self.tables, self.lock.shared(cell));
            if root.is_invalid() {
                // The owner's view was replaced: nothing is mapped.
                return range.end;
            }
            self.collect(&guard, root, range, aim, work)
        };
        if work.pages() > 0 {
            self.carry_out(work, root, cell, cause);
        } else if step.met {
            self.await_batch(root, seen);
        }
        step.next
    }

    fn collect(
        &self,
        guard: &Guard<'_, F, H>,
        root: &RootPage,
        range: GfnRange,
        aim: Aim,
        work: &mut Work,
    ) -> Step {
        let mut next = range.start;
        let mut looks = LOOKS;
        let ended = |next, met| Step { next, met };
        while next < range.end && looks > 0 {
            let (node, _) = guard.descend(&root.table, next);
            let level = node.level();
            if level > Level::SIZE_4K {
                // No table: nothing is mapped.
                looks -= 1;
                next = Gfn(F::align_down(next, level).0 + F::span(level));
                continue;
            }
            for index in F::index(next, level)..node.len() {
                loop {
                    if next >= range.end || looks == 0 || work.pages() == MOST {
                        return ended(next, false);
                    }
                    looks -= 1;
                    let raw = node.load(index);
                    let wish = match F::decode(raw, level) {
                        Entry::Frozen => return ended(next, true),
                        Entry::Leaf(leaf) => aim.wish::<F>(raw, &leaf),
                        _ => None,
                    };
                    let Some(wish) = wish else { break };
                    if node.replace(index, raw, F::FROZEN).is_ok() {
                        work.push(next, wish);
                        break;
                    }
                }
                next.0 += 1;
            }
        }
        ended(next, false)
    }
}

fn clipped<F: Format>(range: GfnRange) -> GfnRange {
    GfnRange {
        start: range.start,
        end: range.end.min(F::MAX_GFN),
    }
}
