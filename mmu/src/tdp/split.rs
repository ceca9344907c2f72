//! Splitting a huge leaf into a table of finer ones.
//!
//! The table is filled before it is linked, and translates and permits exactly what the leaf did;
//! so no flush is owed. A format that wants *break before make* is served in its order: the leaf is
//! frozen, flushed, and then replaced.
//!
//! A range is split as far as table memory goes that faults can spare (`stock`); the rest stays
//! whole, is counted, and is split by the faults that need it.
//!
//! *Locking*: the MMU lock in either mode. Memory is fetched before the lock is taken; when it runs
//! out in the middle of a range, the range yields to fetch more.

use core::cell::Cell;

use super::{
    descent::Changed,
    mmu::TdpMmu,
    session::{Mode, Session},
    stock::Ahead,
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::{Flush, FlushCause},
    format::{Entry, Format},
    rcu::cell::{self, Counter},
    sync::Backoff,
    table::{
        header::PageRole,
        memory::TableMemory,
        node::Node,
        ticket::{Blank, Detached},
    },
};

/// Tables fetched at a time when a range is split.
const BATCH: usize = 64;

/// How an attempt to split ended.
pub(super) enum Split {
    Done,
    /// The entry changed, or is no huge leaf.
    Lost(Blank),
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Replaces the huge leaf `raw` by a table. `nx`: it is the NX mitigation that wants it, so the
    /// table is noted.
    pub(super) fn split(
        &self,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        blank: Blank,
        cell: &cell::Cell,
        nx: bool,
    ) -> Split {
        let level = node.level();
        let (Entry::Leaf(_), Some(child)) = (F::decode(raw, level), level.child()) else {
            return Split::Lost(blank);
        };
        let first = F::make_huge_page_split(raw, level, 0);
        let step = F::leaf_step(child);
        let first = if child == Level::SIZE_4K && self.avoids_executable_huge_pages() {
            // What the mitigation took from the huge page, its pages may have.
            F::with_executable(first, true)
        } else {
            first
        };
        let table = blank.fill(&self.tables, child, |i| {
            first.wrapping_add(step.wrapping_mul(i as u64))
        });
        let (gfn, as_id) = self.place_of_entry(node, index);
        let role = PageRole::new(as_id, child, false);
        let pfn = table.pfn();
        let header = self.tables.header(pfn);
        header.describe(role, gfn, Some((node.pfn(), index)));
        if nx {
            // Before the table is linked: whoever unlinks it must see the mark.
            self.note_nx_table(pfn);
        }
        let lost = |table| {
            if nx {
                self.forget_nx_table(pfn);
            }
            Split::Lost(self.tables.blank_again(table))
        };
        let old = if F::BREAK_BEFORE_MAKE {
            if node.replace(index, raw, F::FROZEN).is_err() {
                return lost(table);
            }
            let span = GfnRange::new(gfn, F::span(level));
            self.flush(Flush::range(span), FlushCause::BreakBeforeMake, as_id);
            F::FROZEN
        } else {
            raw
        };
        if let Err(table) = node.link(index, old, table) {
            return lost(table);
        }
        cell.count(Counter::Splits, 1);
        if nx {
            cell.count(Counter::NxSplits, 1);
        }
        cell.add_pages(level.index(), -1);
        cell.add_pages(child.index(), F::entries(child) as i64);
        Split::Done
    }

    /// First guest frame and address space of an entry.
    fn place_of_entry(&self, node: Node<'_, F>, index: usize) -> (Gfn, u8) {
        let header = self.tables.header(node.pfn());
        let (base, _) = header.place();
        let as_id = header
            .snapshot(node.pfn())
            .map_or(0, |page| page.role.as_id);
        let gfn = Gfn(base.0 + index as u64 * F::span(node.level()));
        (gfn, as_id)
    }

    /// Replaces `raw`, which points to a table, by the leaf `new`; the table comes back. In the
    /// architecture's order.
    pub(super) fn exchange(
        &self,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        new: u64,
        span: GfnRange,
        as_id: u8,
    ) -> Result<Option<Detached>, Changed> {
        if !F::BREAK_BEFORE_MAKE {
            return node.replace(index, raw, new).map_err(|_| Changed);
        }
        let table = node.replace(index, raw, F::FROZEN).map_err(|_| Changed)?;
        self.flush(Flush::range(span), FlushCause::BreakBeforeMake, as_id);
        // Only the owner of a frozen entry changes it, but for teardown, which waits for this.
        let mut backoff = Backoff::default();
        while node.replace(index, F::FROZEN, new).is_err() {
            backoff.wait();
        }
        Ok(table)
    }

    /// Splits every leaf over `range` that is coarser than `target`, as far as memory goes that
    /// faults can spare; how many are left whole. The caller holds the slots lock.
    pub(super) fn do_split_huge_pages(&self, as_id: u8, range: GfnRange, target: Level) -> u64 {
        let Some(finest) = target.parent() else {
            return 0;
        };
        let reader = self.participants.reader_slot();
        let ahead = Ahead::new(self);
        let dry = Cell::new(!ahead.refill(BATCH));
        let mut unsplit = 0;
        for root in self.roots_of(as_id, |root| !root.is_invalid() && !root.mirror) {
            let session = Session::begin(self, &reader, Mode::Shared, FlushCause::DirtyLog, as_id);
            let refill = || dry.set(!ahead.refill(BATCH));
            let plan = Sweep::leaves(range).finest(finest);
            let session = sweep(session, &root, plan, refill, |session, run| {
                if root.is_invalid() {
                    return Visit::Done(Flush::None);
                }
                for index in run.first..run.end {
                    if self.split_in_range(session, run.node, index, range, target, &ahead) {
                        continue;
                    }
                    if !dry.get() {
                        return Visit::Stop;
                    }
                    unsplit += 1;
                }
                Visit::Done(Flush::None)
            });
            session.finish();
        }
        unsplit
    }

    /// Splits the leaf at `index`, if it is one that reaches into `range`. False without memory.
    fn split_in_range(
        &self,
        session: &Session<'_, F, H>,
        node: Node<'_, F>,
        index: usize,
        range: GfnRange,
        target: Level,
        ahead: &Ahead<'_, F, H>,
    ) -> bool {
        let level = node.level();
        if level <= target {
            return true;
        }
        loop {
            let raw = node.load(index);
            if !F::is_leaf(raw, level) || !matches!(F::decode(raw, level), Entry::Leaf(_)) {
                return true;
            }
            let (gfn, _) = self.place_of_entry(node, index);
            if !GfnRange::new(gfn, F::span(level)).overlaps(range) {
                return true;
            }
            let Some(blank) = ahead.take() else {
                return false;
            };
            match self.split(node, index, raw, blank, session.cell, false) {
                // What is below is the sweep's to visit.
                Split::Done => return true,
                Split::Lost(blank) => ahead.put_back(blank),
            }
        }
    }
}
