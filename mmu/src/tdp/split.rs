//! Splitting a huge leaf into a table of finer ones.
//!
//! The table is filled before it is linked, and translates and permits exactly what the leaf did; so no flush is owed.
//! That needs a format without break-before-make ([`TdpMmu::new`](super::TdpMmu::new) refuses others).
//!
//! *Locking*: the MMU lock.

use super::{State, TdpMmu, iter::TdpIter};
use crate::{
    addr::{GfnRange, Level},
    format::{Entry, Format},
    table::{memory::TableMemory, node::Guard},
};

/// Why a huge leaf is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SplitError {
    /// No memory for the table.
    NoMemory,
    /// The entry changed, or is no huge leaf; the iterator has a new snapshot.
    Stale,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Splits the huge leaf that `iter` is at; afterwards `iter` is at the table's entry.
    pub(super) fn split(
        &self,
        state: &mut State,
        iter: &mut TdpIter<'_, F, H>,
    ) -> Result<(), SplitError> {
        let (old, level, index) = (iter.old(), iter.level(), iter.index());
        let (Entry::Leaf(_), Some(child)) = (F::decode(old, level), level.child()) else {
            iter.reread();
            return Err(SplitError::Stale);
        };
        let table = self.tables.allocate(child).ok_or(SplitError::NoMemory)?;
        table.set(&self.tables, |i| F::make_huge_page_split(old, level, i));
        let pfn = table.pfn();
        let linked = iter.node().link(index, old, table);
        iter.reread();
        if let Err(table) = linked {
            self.tables.free_unlinked(table);
            return Err(SplitError::Stale);
        }
        state.headers.insert(
            pfn,
            F::node_size(child),
            child,
            iter.gfn(),
            Some((iter.node().pfn(), index)),
        );
        self.stats.split();
        self.stats.add_leaves(level, -1);
        self.stats.add_leaves(child, F::entries(child) as i64);
        Ok(())
    }

    /// Splits every leaf over `range` that is coarser than `target`; false if memory ran out before the end.
    pub(super) fn do_split_huge_pages(&self, range: GfnRange, target: Level) -> bool {
        self.locked(|state, guard| self.split_range(state, guard, range, target))
    }

    fn split_range(
        &self,
        state: &mut State,
        guard: &Guard<'_, F, H>,
        range: GfnRange,
        target: Level,
    ) -> bool {
        let Some(min_level) = target.parent() else {
            return true;
        };
        let Some(mut iter) = self.iter(guard, range, min_level) else {
            return true;
        };
        while iter.advance() {
            while matches!(F::decode(iter.old(), iter.level()), Entry::Leaf(_)) {
                if self.split(state, &mut iter) == Err(SplitError::NoMemory) {
                    return false;
                }
            }
        }
        true
    }
}
