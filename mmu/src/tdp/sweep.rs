//! Visiting the entries over a range of guest frames.
//!
//! A sweep goes down from a root and shows its visitor *runs*: neighbouring entries of one table.
//! Below the finest level asked for it does not look. In tables of that level a run is all entries
//! in the range, so the visitor's loop is tight; above, each present entry that is a leaf (or any,
//! if asked) is a run of its own, shown before what is below it, and what is below is looked for
//! after the visit: a leaf that the visitor split is followed into its new table.
//!
//! # Yielding
//!
//! Before each run that begins at a later frame than its burst, the sweep asks whether someone
//! waits for the lock. If so it stops, pays what is owed, lets go, and begins again from the root
//! at the frame that was due: nothing is skipped, nothing that was done is done twice except
//! entries above, and each burst makes progress, so a sweep ends however often it must yield.

use core::ops::ControlFlow;

use super::{root::RootPage, session::Session};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::Flush,
    format::Format,
    table::{
        memory::TableMemory,
        node::{Node, Run},
    },
};

/// What a sweep covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sweep {
    pub(super) range: GfnRange,
    /// The finest level visited.
    pub(super) finest: Level,
    /// Show entries that point to tables, too.
    pub(super) tables: bool,
    /// Whether the sweep may let go of the lock.
    pub(super) may_yield: bool,
}

impl Sweep {
    /// Every leaf over `range`.
    pub(super) fn leaves(range: GfnRange) -> Self {
        Self {
            range,
            finest: Level::SIZE_4K,
            tables: false,
            may_yield: true,
        }
    }

    pub(super) fn finest(mut self, finest: Level) -> Self {
        self.finest = finest;
        self
    }

    pub(super) fn tables(mut self) -> Self {
        self.tables = true;
        self
    }

    pub(super) fn atomic(mut self) -> Self {
        self.may_yield = false;
        self
    }
}

/// What a visitor has to say of a run.
pub(super) enum Visit {
    /// Done; this flush is owed.
    Done(Flush),
    /// Cannot go on without something that is only to be had without the lock. The run is shown
    /// again after the refill, so a visitor must not ask twice for what the refill could not give.
    Stop,
}

/// Runs `sweep` under `root`. `refill` is called between bursts, without the lock.
pub(super) fn sweep<'a, F: Format, H: TableMemory>(
    mut session: Session<'a, F, H>,
    root: &RootPage,
    sweep: Sweep,
    mut refill: impl FnMut(),
    mut visit: impl FnMut(&Session<'a, F, H>, Run<'_, F>) -> Visit,
) -> Session<'a, F, H> {
    let end = sweep.range.end.min(F::MAX_GFN);
    let mut due = sweep.range.start;
    while due < end {
        let mut burst = Burst {
            session: &session,
            sweep: &sweep,
            from: due,
            end,
            owed: Flush::None,
            progress: false,
            visit: &mut visit,
        };
        let node = session.guard.root(&root.table);
        let flow = burst.descend(node, Gfn(0));
        let owed = burst.owed;
        session.owe(owed);
        let ControlFlow::Break(next) = flow else {
            break;
        };
        due = next;
        session = session.yielded(&mut refill);
    }
    session
}

struct Burst<'s, 'a, F: Format, H: TableMemory, V> {
    session: &'s Session<'a, F, H>,
    sweep: &'s Sweep,
    from: Gfn,
    end: Gfn,
    owed: Flush,
    progress: bool,
    visit: &'s mut V,
}

impl<'s, 'a, F, H, V> Burst<'s, 'a, F, H, V>
where
    F: Format,
    H: TableMemory,
    V: FnMut(&Session<'a, F, H>, Run<'_, F>) -> Visit,
{
    /// Visits what `node`, whose first frame is `base`, has in the range. Breaks with the frame to
    /// go on from.
    fn descend(&mut self, node: Node<'s, F>, base: Gfn) -> ControlFlow<Gfn> {
        let level = node.level();
        let span = F::span(level);
        let first = (self.from.0.max(base.0) - base.0) >> F::shift(level);
        let end = self.end.0 - base.0;
        let last = (((end - 1) >> F::shift(level)) as usize).min(node.len() - 1);
        let first = first as usize;
        let gfn_of = |index: usize| Gfn(base.0 + index as u64 * span);
        if level <= self.sweep.finest {
            return self.show(Run {
                node,
                first,
                end: last + 1,
                gfn: gfn_of(first),
            });
        }
        for index in first..=last {
            let raw = node.load(index);
            if raw == F::EMPTY {
                continue;
            }
            let gfn = gfn_of(index);
            if self.sweep.tables || F::as_table(raw, level).is_none() {
                self.show(Run {
                    node,
                    first: index,
                    end: index + 1,
                    gfn,
                })?;
            }
            if let Some(child) = self.session.guard.child(node, index) {
                // The next table's entries come while this one's are worked on.
                if child.level() <= self.sweep.finest
                    && index < last
                    && let Some(next) = self.session.guard.child(node, index + 1)
                {
                    next.fetch();
                }
                self.descend(child, gfn)?;
            }
        }
        ControlFlow::Continue(())
    }

    fn show(&mut self, run: Run<'_, F>) -> ControlFlow<Gfn> {
        let due = Gfn(run.gfn.0.max(self.from.0));
        // A table that was shown is shown again after a restart at the same frame; only a later
        // frame is progress.
        if self.progress && due > self.from && self.sweep.may_yield && self.session.is_contended() {
            return ControlFlow::Break(due);
        }
        match (self.visit)(self.session, run) {
            Visit::Done(flush) => {
                self.progress = true;
                self.owed = self.owed.merge(flush);
                ControlFlow::Continue(())
            }
            Visit::Stop => ControlFlow::Break(due),
        }
    }
}
