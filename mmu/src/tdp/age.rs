//! Ageing: has the guest used a page since we last asked?
//!
//! Clearing an Accessed bit owes no flush: a TLB that still holds the entry hides later uses, so a
//! page may look idle that is not. Ageing is a hint and may be wrong in that direction. One attempt
//! a leaf: if the entry changes meanwhile, the page is in use, and young.
//!
//! *Locking*: none; inside. Every other change of an entry copes with this one (`protect`).
//! *Roots*: valid.

use core::ops::ControlFlow;

use super::mmu::TdpMmu;
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
    ///
    /// It leaves the read section and goes in again after a bounded number of tables, so that a
    /// change of slots and the freeing of tables wait for no more than that, however long the range
    /// is.
    fn each_leaf(
        &self,
        as_id: u8,
        range: GfnRange,
        mut visit: impl FnMut(Node<'_, F>, usize, u64) -> bool,
    ) {
        let end = range.end.min(F::MAX_GFN);
        let reader = self.participants.reader_slot();
        for root in self.roots_of(as_id, |root| !root.is_invalid() && !root.mirror) {
            let mut due = range.start;
            while due < end {
                let guard = Guard::new(&self.tables, self.participants.pin(&reader));
                let mut part = Part {
                    range: GfnRange { start: due, end },
                    tables: TABLES_A_SECTION,
                    visit: &mut visit,
                };
                match part.visit_under(&guard, guard.root(&root.table), Gfn(0)) {
                    ControlFlow::Continue(()) => break,
                    ControlFlow::Break(Stop::Later(gfn)) => due = gfn,
                    ControlFlow::Break(Stop::Enough) => return,
                }
            }
        }
    }
}

/// Tables that are looked at in one read section.
const TABLES_A_SECTION: usize = 64;

/// Why a visit stopped before the end of the range.
enum Stop {
    /// The visitor has seen enough.
    Enough,
    /// To be gone on with from this frame.
    Later(Gfn),
}

/// What is visited in one read section.
struct Part<V> {
    range: GfnRange,
    /// Tables that may still be gone into.
    tables: usize,
    visit: V,
}

impl<V> Part<V> {
    fn visit_under<'g, F: Format, H: TableMemory>(
        &mut self,
        guard: &'g Guard<'_, F, H>,
        node: Node<'g, F>,
        base: Gfn,
    ) -> ControlFlow<Stop>
    where
        V: FnMut(Node<'_, F>, usize, u64) -> bool,
    {
        let level = node.level();
        let first = (self.range.start.0.max(base.0) - base.0) >> F::shift(level);
        let last = (self.range.end.0 - 1 - base.0) >> F::shift(level);
        for index in first as usize..=(last as usize).min(node.len() - 1) {
            let raw = node.load(index);
            if raw == F::EMPTY {
                continue;
            }
            if F::is_leaf(raw, level) {
                if (self.visit)(node, index, raw) {
                    return ControlFlow::Break(Stop::Enough);
                }
            } else if let Some(child) = guard.child(node, index) {
                let base = Gfn(base.0 + index as u64 * F::span(level));
                if self.tables == 0 {
                    return ControlFlow::Break(Stop::Later(base));
                }
                self.tables -= 1;
                self.visit_under(guard, child, base)?;
            }
        }
        ControlFlow::Continue(())
    }
}
