//! Recovering huge pages when dirty logging ends.
//!
//! A table whose whole span may be one leaf is replaced by that leaf, in place: the guest takes no
//! fault for it. That is valid because within a slot guest and host frames run alike, so the leaf's
//! frame follows from any of its pages; and the host's mapping was asked for under the lock.
//!
//! Nothing is recovered where nothing was mapped, where an invalidation is in progress, while the
//! slot logs writes, or outside the slot.
//!
//! *Locking*: the slots lock and the shared MMU lock; yields. *Flush*: the replaced tables' ranges,
//! before a yield and at the end: before the read section that keeps the tables is left.

use super::{
    mmu::TdpMmu,
    session::{Mode, Session},
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{GfnRange, Level},
    flush::{Flush, FlushCause},
    format::{Entry, Format, Leaf},
    rcu::cell::Counter,
    slot::Memslot,
    table::{
        guard::Guard,
        memory::TableMemory,
        node::{Node, Run},
    },
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Recovers what `slot` allows. The caller holds the slots lock.
    pub(super) fn recover_huge_pages(&self, slot: &Memslot) {
        let as_id = slot.spec.as_id;
        if slot.dirty.is_some() || slot.invalid {
            return;
        }
        let reader = self.participants.reader_slot();
        for root in self.roots_of(as_id, |root| !root.is_invalid() && !root.mirror) {
            let session = Session::begin(self, &reader, Mode::Shared, FlushCause::HugePage, as_id);
            let plan = Sweep::leaves(slot.spec.range())
                .finest(Level::SIZE_2M)
                .tables();
            let session = sweep(
                session,
                &root,
                plan,
                || {},
                |session, run| {
                    if root.is_invalid() {
                        return Visit::Done(Flush::None);
                    }
                    Visit::Done(self.recover_run(session, &run, slot))
                },
            );
            session.finish();
        }
        self.tables.reclaim();
    }

    fn recover_run(&self, session: &Session<'_, F, H>, run: &Run<'_, F>, slot: &Memslot) -> Flush {
        let mut owed = Flush::None;
        for index in run.first..run.end {
            let span = run.span_of(index);
            if let Some(flush) = self.recover(session, run.node, index, span, slot) {
                owed = owed.merge(flush);
            }
        }
        owed
    }

    fn recover(
        &self,
        session: &Session<'_, F, H>,
        node: Node<'_, F>,
        index: usize,
        span: GfnRange,
        slot: &Memslot,
    ) -> Option<Flush> {
        let level = node.level();
        let raw = node.load(index);
        F::as_table(raw, level)?;
        let child = session.guard.child(node, index)?;
        // A huge page that the mitigation keeps split is its worker's to bring back.
        if self.tables.header(child.pfn()).nx_disallowed()
            || self.invalidations.overlaps(span)
            || self.allowed_level(slot, span.start, level) < level
        {
            return None;
        }
        let found = any_leaf(&session.guard, child)?;
        let leaf = Leaf {
            pfn: slot.pfn(span.start),
            // No log is kept, so what may be written can be written at once.
            writable: found.mmu_writable,
            executable: !self.avoids_executable_huge_pages(),
            accessed: true,
            dirty: found.mmu_writable,
            ..found
        };
        let new = F::make_leaf(&leaf, level);
        let table = self
            .exchange(node, index, raw, new, span, slot.spec.as_id)
            .ok()??;
        session.cell.add_pages(level.index(), 1);
        session.cell.count(Counter::Recovered, 1);
        self.remove_table(&session.guard, table, session.cell);
        Some(Flush::range(span))
    }
}

/// Any leaf under `node`.
fn any_leaf<'g, F: Format, H: TableMemory>(
    guard: &'g Guard<'_, F, H>,
    node: Node<'g, F>,
) -> Option<Leaf> {
    let level = node.level();
    for index in 0..node.len() {
        let raw = node.load(index);
        if raw == F::EMPTY {
            continue;
        }
        if let Entry::Leaf(leaf) = F::decode(raw, level) {
            return Some(leaf);
        }
        if let Some(child) = guard.child(node, index)
            && let Some(leaf) = any_leaf(guard, child)
        {
            return Some(leaf);
        }
    }
    None
}
