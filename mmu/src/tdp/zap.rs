//! Removing leaves, tables and roots.
//!
//! *Unmapping* removes the leaves over a range, *whole*: a huge leaf that sticks out at either end
//! goes too, and the flush covers all of it; the guest faults the rest in again. Tables stay. It
//! visits invalid roots as well, because a vCPU may have been running on one a moment ago and its
//! zapper may have yielded: memory is not safe to reuse while any root maps it. Mirrors come last,
//! in batches (`mirror_range`), when the lock was let go of.
//!
//! *Zapping a root* happens under the shared lock, level by level: the first step cuts the tables
//! off the 1 GiB entries, each with the 4 KiB tables below it, the next cuts off what is then left
//! on 512 GiB entries, and so on to the root's. A step is one entry, so at most 513 tables, and
//! leaves are not looked at: nobody maps anything under a withdrawn root, nothing is cached of it,
//! and its leaves are counted as one sum (`root`). So there are no steps for 4 KiB and 2 MiB
//! entries, which the kernel makes only to prove itself (`CONFIG_KVM_PROVE_MMU`). What is cut off
//! is detached without an exchange an entry: nobody else changes it. No flush: the root is
//! unreachable since the flush that withdrew it.
//!
//! *Tearing down a table* that was cut off elsewhere, under the shared lock: faults may still be on
//! their way into it, so every entry is exchanged for *frozen*; who finds an entry frozen by
//! another waits for its owner.

use super::{
    mirror_range::{Aim, MirrorChange},
    mmu::TdpMmu,
    protect::are_settled,
    root::RootPage,
    session::{Mode, Session},
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::{Flush, FlushCause},
    format::Format,
    invalidate::{ForeignInvalidation, Invalidation},
    rcu::cell::Cell,
    sync::Backoff,
    table::{
        guard::Guard,
        memory::TableMemory,
        node::{Absent, Bottom, LINE, Run},
        tables::Retiring,
        ticket::Detached,
    },
};

/// A table on a 1 GiB entry and those on its own entries.
const TABLES_A_STEP: usize = 513;

/// Leaves that were removed from a run.
struct Removed {
    count: i64,
    /// Positions in the table of the first and the last of them.
    first: usize,
    last: usize,
}

fn take_from_bottom<F: Format>(bottom: Bottom<'_>, offset: usize) -> Option<Removed> {
    let is_leaf = |index: &usize| F::is_leaf(bottom.load(*index), Level::SIZE_4K);
    let first = (0..bottom.len()).find(is_leaf);
    let last = (0..bottom.len()).rfind(is_leaf);
    let mut count = 0;
    let mut index = 0;
    while index + LINE <= bottom.len() {
        if are_settled::<F>(bottom.load_line(index)) {
            bottom.store_line(index, [F::EMPTY; LINE]);
            count += LINE as i64;
        } else {
            count += take_each::<F>(bottom, index, index + LINE);
        }
        index += LINE;
    }
    count += take_each::<F>(bottom, index, bottom.len());
    Some(Removed {
        count,
        first: first? + offset,
        last: last? + offset,
    })
}

fn take_each<F: Format>(bottom: Bottom<'_>, first: usize, end: usize) -> i64 {
    let mut count = 0;
    for index in first..end {
        let raw = bottom.load(index);
        count += i64::from(F::is_leaf(raw, Level::SIZE_4K));
        if F::is_volatile(raw, Level::SIZE_4K) {
            bottom.swap(index, F::EMPTY);
        } else if raw != F::EMPTY {
            bottom.store(index, F::EMPTY);
        }
    }
    count
}

fn take_from_upper<F: Format>(run: &Run<'_, F>) -> Option<Removed> {
    let level = run.node.level();
    let mut taken: Option<Removed> = None;
    for index in run.first..run.end {
        if !F::is_leaf(run.node.load(index), level) {
            continue;
        }
        let (old, table) = run.node.take(index, Absent::Empty);
        debug_assert!(table.is_none(), "a leaf became a table under our lock");
        if F::is_leaf(old, level) {
            let so_far = taken.get_or_insert(Removed {
                count: 0,
                first: index,
                last: index,
            });
            so_far.count += 1;
            so_far.last = index;
        }
    }
    taken
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Unmaps `range`; whether anything was mapped. When it returns, the flush is done.
    pub(super) fn unmap(
        &self,
        as_id: u8,
        range: GfnRange,
        cause: FlushCause,
        may_yield: bool,
    ) -> bool {
        let reader = self.participants.reader_slot();
        let session = Session::begin(self, &reader, Mode::Exclusive, cause, as_id);
        self.unmap_in(session, as_id, range, cause, may_yield)
    }

    fn unmap_in(
        &self,
        mut session: Session<'_, F, H>,
        as_id: u8,
        range: GfnRange,
        cause: FlushCause,
        may_yield: bool,
    ) -> bool {
        let roots = self.roots_of(as_id, |_| true);
        for root in roots.iter().filter(|root| !root.mirror) {
            let mut plan = Sweep::leaves(range);
            if !may_yield {
                plan = plan.atomic();
            }
            session = sweep(
                session,
                root,
                plan,
                || {},
                |session, run| {
                    let removed = self.take_leaves(&run, root, session.cell);
                    // Under a withdrawn root nothing is cached any more.
                    Visit::Done(if root.is_invalid() {
                        Flush::None
                    } else {
                        removed
                    })
                },
            );
        }
        let changed = session.finish();
        // Without the lock, which their owner must not be called with.
        let mut mirrored = MirrorChange::default();
        let valid_mirrors = roots
            .iter()
            .filter(|root| root.mirror && !root.is_invalid());
        for root in valid_mirrors {
            self.change_under(root, range, Aim::Unmap, cause, &mut mirrored);
        }
        changed || mirrored.pages > 0
    }

    /// Empties the leaves of a run, and returns the flush of what they mapped.
    fn take_leaves(&self, run: &Run<'_, F>, root: &RootPage, cell: &Cell) -> Flush {
        let taken = match run.bottom() {
            Some(bottom) => take_from_bottom::<F>(bottom, run.first),
            None => take_from_upper(run),
        };
        let Some(taken) = taken else {
            return Flush::None;
        };
        let level = run.node.level();
        if root.is_invalid() {
            root.count_separately(level, -taken.count);
        } else {
            cell.add_pages(level.index(), -taken.count);
        }
        Flush::range(GfnRange {
            start: run.span_of(taken.first).start,
            end: run.span_of(taken.last).end,
        })
    }

    pub(super) fn do_invalidate_begin(
        &self,
        as_id: u8,
        range: GfnRange,
        may_yield: bool,
    ) -> Invalidation {
        let reader = self.participants.reader_slot();
        let cause = FlushCause::Unmap;
        let session = Session::begin(self, &reader, Mode::Exclusive, cause, as_id);
        // First the mark, then the zap: a fault that comes between would map what is about to go.
        let token = self.invalidations.begin(range);
        self.unmap_in(session, as_id, range, cause, may_yield);
        token
    }

    pub(super) fn do_invalidate_end(&self, token: Invalidation) -> Result<(), ForeignInvalidation> {
        let _exclusive = self.lock.exclusive();
        self.invalidations.end(token)
    }

    /// Tears down a table that no entry points to any more, with all below it
    /// (`handle_removed_pt`), and retires it. The caller flushes before it leaves the read section.
    pub(super) fn remove_table(&self, guard: &Guard<'_, F, H>, table: Detached, cell: &Cell) {
        let (node, level) = (guard.detached(&table), table.level());
        let mut leaves = 0;
        for index in 0..node.len() {
            let (mut old, mut child);
            let mut backoff = Backoff::default();
            loop {
                (old, child) = node.take(index, Absent::Frozen);
                if old != F::FROZEN {
                    break;
                }
                // Its owner stores what it is making; then it is ours.
                backoff.wait();
            }
            match child {
                Some(child) => self.remove_table(guard, child, cell),
                None => leaves += i64::from(F::is_leaf(old, level)),
            }
        }
        if leaves != 0 {
            cell.add_pages(level.index(), -leaves);
        }
        self.forget_nx_table(table.pfn());
        self.tables.retire(table);
    }

    /// Gives back all tables under a withdrawn root.
    pub(super) fn zap_withdrawn_root(&self, root: &RootPage) {
        let reader = self.participants.reader_slot();
        let mut session =
            Session::begin(self, &reader, Mode::Shared, FlushCause::Roots, root.as_id);
        let mut next = Some(Level::SIZE_1G.min(F::ROOT_LEVEL));
        while let Some(level) = next.filter(|level| *level <= F::ROOT_LEVEL) {
            session = self.cut_tables(session, root, level);
            next = level.parent();
        }
        session.finish();
    }

    /// Cuts off every table that hangs on an entry of `level`, with what is below it. The root was
    /// withdrawn, and the caller is the one who zaps it.
    pub(super) fn cut_tables<'a>(
        &self,
        session: Session<'a, F, H>,
        root: &RootPage,
        level: Level,
    ) -> Session<'a, F, H> {
        debug_assert!(root.is_invalid(), "others may still change what hangs here");
        let everything = GfnRange {
            start: Gfn(0),
            end: F::MAX_GFN,
        };
        // An entry at a time: none is entered, because it points nowhere once it was shown.
        let finest = level.child().unwrap_or(level);
        let plan = Sweep::leaves(everything).finest(finest).tables();
        sweep(
            session,
            root,
            plan,
            || {},
            |session, run| {
                if run.node.level() != level {
                    return Visit::Done(Flush::None);
                }
                for index in run.first..run.end {
                    if F::as_table(run.node.load(index), level).is_some() {
                        if let (_, Some(table)) = run.node.take(index, Absent::Empty) {
                            self.give_back(&session.guard, table);
                        }
                    } else if level == F::ROOT_LEVEL {
                        // The root itself stays for as long as someone holds it, so its own leaves
                        // go.
                        run.node.take(index, Absent::Empty);
                    }
                }
                Visit::Done(Flush::None)
            },
        )
    }

    /// Retires a table that was cut off a withdrawn root, with all below it.
    #[expect(
        unsafe_code,
        reason = "that nobody changes what hangs below a withdrawn root is known here"
    )]
    fn give_back(&self, guard: &Guard<'_, F, H>, table: Detached) {
        let mut tables = Retiring::with_capacity(if table.level() == Level::SIZE_2M {
            TABLES_A_STEP
        } else {
            1
        });
        // SAFETY: entries that point to tables change under the MMU lock alone, shared or
        // exclusive, and under the shared one only after a look, in the same section, that the root
        // is valid. We hold it shared, and the root was withdrawn under the exclusive one. Only one
        // thread zaps a root (`to_zap`), and cutting the table off made it ours alone. At the end
        // of the MMU (`tear_down`) nobody else has it at all.
        unsafe { guard.detach_all(table, &mut tables) };
        if self.avoids_executable_huge_pages() {
            for &pfn in tables.pfns() {
                self.forget_nx_table(pfn);
            }
        }
        self.tables.retire_all(tables);
    }

    /// The end: nobody uses the MMU any more. No flush, no yields.
    pub(super) fn tear_down(&self) {
        self.tear_down_mirrors();
        for root in self.withdraw_for_good() {
            self.zap_withdrawn_root(&root);
        }
        self.forget_roots();
    }
}
