//! Mirror roots: tables whose real counterpart an external owner keeps.
//!
//! The MMU keeps a tree of its own that it can read, and pushes each change to the owner: it freezes the entry, asks the
//! owner, and stores the new value, or on refusal the old one. Nobody else touches an entry that is frozen, so the two trees
//! change together. Leaves are 4 KiB; they are made under the shared lock and removed under the exclusive one; nothing is ever
//! changed in place, split, recovered, aged or logged here, and a fast zap leaves mirrors alone.
//!
//! A removal that the owner refuses leaves the mapping where it is: memory that the owner still maps must not be reused,
//! so a leak is the only safe answer, and it shows in the page statistics.

use super::{
    TdpMmu,
    fault::{Changed, Descent},
};
use crate::{
    addr::Gfn,
    fault::FaultOutcome,
    flush::Flush,
    format::{Entry, Format, Leaf},
    rcu::cell::Cell,
    table::{
        memory::TableMemory,
        node::{Blank, Node, Run, Unlinked},
    },
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn install_mirrored(
        &self,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        leaf: &Leaf,
        descent: &Descent<'_>,
    ) -> Result<FaultOutcome, Changed> {
        let level = node.level();
        // Only from nothing: what is mapped is removed first.
        if !matches!(F::decode(raw, level), Entry::NonPresent) {
            return Ok(FaultOutcome::Retry);
        }
        let Some(external) = self.host.external() else {
            return Ok(FaultOutcome::NoRoot);
        };
        node.replace(index, raw, F::FROZEN).map_err(|_| Changed)?;
        let accepted = external.set_leaf(descent.fault.gfn, leaf).is_ok();
        let new = if accepted {
            F::make_leaf(leaf, level)
        } else {
            raw
        };
        let owned = node.replace(index, F::FROZEN, new);
        debug_assert!(owned.is_ok(), "a frozen entry is its owner's");
        if !accepted {
            return Ok(FaultOutcome::Retry);
        }
        descent.cell.add_pages(level.slot(), 1);
        descent.slot.mark_dirty(descent.fault.gfn);
        Ok(FaultOutcome::Fixed { level })
    }

    /// `Err(Some)`: lost the entry; `Err(None)`: the owner refused.
    pub(super) fn link_mirrored(
        &self,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        table: Unlinked,
        gfn: Gfn,
    ) -> Result<(), Option<Blank>> {
        let external = self.host.external();
        let (Some(external), Some(level)) = (external, node.level().child()) else {
            return Err(Some(self.tables.blank_again(table)));
        };
        if node.replace(index, raw, F::FROZEN).is_err() {
            return Err(Some(self.tables.blank_again(table)));
        }
        if external.link_table(gfn, level, table.pfn()).is_err() {
            let owned = node.replace(index, F::FROZEN, raw);
            debug_assert!(owned.is_ok(), "a frozen entry is its owner's");
            let blank = self.tables.blank_again(table);
            self.tables.free_blank(blank);
            return Err(None);
        }
        self.tables.header(table.pfn()).set_external(1);
        node.link(index, F::FROZEN, table)
            .map_err(|table| Some(self.tables.blank_again(table)))
    }

    /// Under the exclusive lock.
    pub(super) fn take_mirrored_leaves(&self, run: &Run<'_, F>, cell: &Cell) -> Flush {
        let (node, level) = (run.node, run.node.level());
        let mut owed = Flush::None;
        for index in run.first..run.end {
            let raw = node.load(index);
            let Entry::Leaf(leaf) = F::decode(raw, level) else {
                continue;
            };
            let span = run.span_of(index);
            let Some(external) = self.host.external() else {
                return owed;
            };
            if node.replace(index, raw, F::FROZEN).is_err() {
                continue;
            }
            let gone = external.remove_leaf(span.start, leaf.pfn).is_ok();
            let new = if gone { F::EMPTY } else { raw };
            let owned = node.replace(index, F::FROZEN, new);
            debug_assert!(owned.is_ok(), "a frozen entry is its owner's");
            if gone {
                cell.add_pages(level.slot(), -1);
                owed = owed.merge(Flush::range(span));
            }
        }
        owed
    }

    /// Gives an external table back before its mirror is retired; false if the owner keeps it.
    pub(super) fn free_mirrored_table(&self, pfn: crate::Pfn) -> bool {
        let header = self.tables.header(pfn);
        if header.external() == 0 {
            return true;
        }
        header.set_external(0);
        let (Some(page), Some(external)) = (header.snapshot(pfn), self.host.external()) else {
            return true;
        };
        external.free_table(page.gfn, page.role.level, pfn).is_ok()
    }
}
