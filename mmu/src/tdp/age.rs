//! Ageing: has the guest used a page since we last asked?
//!
//! Clearing an Accessed bit owes no flush: a TLB that still holds the entry hides later uses, so a page may look idle
//! that is not. Ageing is a hint and may be wrong in that direction. One attempt a leaf: if the entry changes meanwhile, the
//! page is in use, and young.
//!
//! *Locking*: none; inside. Every other change of an entry copes with this one (`protect`). *Roots*: valid.

use super::{mmu::TdpMmu, root::RootPage};
use crate::{
    addr::{Gfn, GfnRange},
    format::Format,
    table::{guard::Guard, memory::TableMemory, node::Node},
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Clears the Accessed bits over `range`; whether any was set.
    pub(super) fn do_age(&self, as_id: u8, range: GfnRange) -> bool {
        let mut young = false;
        self.each_leaf(as_id, range, |node, index, raw| {
            if F::is_accessed(raw, node.level()) {
                young = true;
                let _ = node.replace(index, raw, F::with_accessed(raw, false));
            }
            false
        });
        young
    }

    /// Whether any Accessed bit over `range` is set.
    pub(super) fn do_test_age(&self, as_id: u8, range: GfnRange) -> bool {
        let mut young = false;
        self.each_leaf(as_id, range, |node, _, raw| {
            young = F::is_accessed(raw, node.level());
            young
        });
        young
    }

    /// Visits leaves until `visit` says that it has seen enough.
    fn each_leaf(
        &self,
        as_id: u8,
        range: GfnRange,
        mut visit: impl FnMut(Node<'_, F>, usize, u64) -> bool,
    ) {
        let range = GfnRange {
            start: range.start,
            end: range.end.min(F::MAX_GFN),
        };
        if range.is_empty() {
            return;
        }
        let reader = self.participants.reader_slot();
        let guard = Guard::new(&self.tables, self.participants.pin(&reader));
        let valid = |root: &RootPage| !root.is_invalid() && !root.mirror;
        for root in self.roots_of(as_id, valid) {
            if Self::each_leaf_under(&guard, guard.root(&root.table), Gfn(0), range, &mut visit) {
                return;
            }
        }
    }

    fn each_leaf_under<'g>(
        guard: &'g Guard<'_, F, H>,
        node: Node<'g, F>,
        base: Gfn,
        range: GfnRange,
        visit: &mut impl FnMut(Node<'_, F>, usize, u64) -> bool,
    ) -> bool {
        let level = node.level();
        let first = (range.start.0.max(base.0) - base.0) >> F::shift(level);
        let last = (range.end.0 - 1 - base.0) >> F::shift(level);
        for index in first as usize..=(last as usize).min(node.len() - 1) {
            let raw = node.load(index);
            if raw == F::EMPTY {
                continue;
            }
            let enough = if F::is_leaf(raw, level) {
                visit(node, index, raw)
            } else if let Some(child) = guard.child(node, index) {
                let base = Gfn(base.0 + index as u64 * F::span(level));
                Self::each_leaf_under(guard, child, base, range, visit)
            } else {
                false
            };
            if enough {
                return true;
            }
        }
        false
    }
}
