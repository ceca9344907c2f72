//! Unmapping.
//!
//! Zapping a range removes every leaf that covers a frame of it, *whole*: a huge leaf that sticks out at either end goes
//! too, and the flush covers all of it. The guest faults the rest in again. Tables stay where they are; they go only
//! when a huge leaf replaces them or their root is torn down.
//!
//! *Locking*: the MMU lock. *Roots*: valid and invalid ones, because a vCPU may still run on an invalid one.

use super::{State, TdpMmu, iter::TdpIter};
use crate::{
    addr::{GfnRange, Level},
    flush::Flush,
    format::{Entry, Format},
    invalidate::Invalidation,
    table::{
        memory::TableMemory,
        node::{Absent, Detached, Guard},
    },
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_zap_range(&self, range: GfnRange) -> Flush {
        let flush = self.locked(|state, guard| self.zap_and_flush(state, guard, range));
        self.stats.flush(flush)
    }

    pub(super) fn do_invalidate_begin(&self, range: GfnRange) -> (Invalidation, Flush) {
        let (token, flush) = self.locked(|state, guard| {
            // First the mark, then the zap: a fault that comes between would map what is about to go.
            let token = state.progress.begin(range);
            (token, self.zap_and_flush(state, guard, range))
        });
        (token, self.stats.flush(flush))
    }

    pub(super) fn do_invalidate_end(&self, token: Invalidation) {
        self.state.lock().progress.end(token, &self.sequence);
    }

    /// Zaps `range`; the flush covers the slots in it whether or not they had leaves, because another thread may have
    /// zapped them and not flushed yet.
    fn zap_and_flush(&self, state: &mut State, guard: &Guard<'_, F, H>, range: GfnRange) -> Flush {
        let mut hull = self.zap_leaves(state, guard, range);
        for slot in state.slots.iter() {
            let slot = slot.spec.range();
            if slot.overlaps(range) {
                hull = hull.hull(GfnRange {
                    start: slot.start.max(range.start),
                    end: slot.end.min(range.end),
                });
            }
        }
        Flush::range(hull)
    }

    /// Removes every leaf over `range` and returns the hull of what they mapped.
    pub(super) fn zap_leaves(
        &self,
        state: &mut State,
        guard: &Guard<'_, F, H>,
        range: GfnRange,
    ) -> GfnRange {
        let mut hull = GfnRange::default();
        let invalid = state.invalid_roots.iter().map(|root| guard.detached(root));
        for root in guard.root().into_iter().chain(invalid) {
            let mut iter = TdpIter::new(guard, root, range, Level::SIZE_4K);
            while iter.advance() {
                if !matches!(F::decode(iter.old(), iter.level()), Entry::Leaf(_)) {
                    continue;
                }
                // An exchange: hardware may set A or D until the very last moment.
                let (old, _) = iter.node().take(iter.index(), Absent::Empty);
                if matches!(F::decode(old, iter.level()), Entry::Leaf(_)) {
                    self.stats.add_leaves(iter.level(), -1);
                    hull = hull.hull(iter.span());
                }
            }
        }
        hull
    }

    /// Tears down a table that no entry points to any more, with all below it (`handle_removed_pt`).
    pub(super) fn remove_table(&self, state: &mut State, guard: &Guard<'_, F, H>, table: Detached) {
        let (node, level) = (guard.detached(&table), table.level());
        for index in 0..node.len() {
            match node.take(index, Absent::Frozen) {
                (_, Some(child)) => self.remove_table(state, guard, child),
                (old, None) if matches!(F::decode(old, level), Entry::Leaf(_)) => {
                    self.stats.add_leaves(level, -1)
                }
                _ => {}
            }
        }
        state.headers.remove(table.pfn());
        self.tables.retire(table);
    }
}
