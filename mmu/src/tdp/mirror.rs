//! Mirror roots: tables whose real counterpart an external owner keeps.
//!
//! The MMU keeps a tree of its own that it can read, and pushes each change to the owner: it
//! freezes the entry, asks the owner, and stores the new value, or on refusal the old one. Nobody
//! else touches an entry that is frozen, so the two trees change together. Leaves are 4 KiB; they
//! are made under the shared lock and removed under the exclusive one; nothing is ever changed in
//! place, split, recovered, aged or logged here, and a fast zap leaves mirrors alone.
//!
//! A removal that the owner refuses leaves the mapping where it is: memory that the owner still
//! maps must not be reused, so a leak is the only safe answer, and it shows in the page statistics.

use super::{
    descent::{Changed, Descent},
    mmu::TdpMmu,
    root::RootPage,
    session::{Mode, Session},
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    fault::FaultOutcome,
    flush::{Flush, FlushCause},
    format::{Entry, Format, Leaf},
    table::{
        memory::TableMemory,
        node::{Absent, Node, Run},
        ticket::{Blank, Unlinked},
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
        descent.root.count_separately(level, 1);
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
        node.link(index, F::FROZEN, table)
            .map_err(|table| Some(self.tables.blank_again(table)))
    }

    /// Under the exclusive lock.
    pub(super) fn take_mirrored_leaves(&self, run: &Run<'_, F>, root: &RootPage) -> Flush {
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
                root.count_separately(level, -1);
                owed = owed.merge(Flush::range(span));
            }
        }
        owed
    }

    /// Removes everything from a mirror that nobody uses any more: leaves, then tables from the
    /// finest up. A table that its owner keeps is leaked, with the mirror's own.
    pub(super) fn empty_mirror(&self, root: &RootPage) {
        let reader = self.participants.reader_slot();
        let cause = FlushCause::Roots;
        let mut session = Session::begin(self, &reader, Mode::Exclusive, cause, root.as_id);
        let everything = GfnRange {
            start: Gfn(0),
            end: F::MAX_GFN,
        };
        let leaves = Sweep::leaves(everything);
        session = sweep(
            session,
            root,
            leaves,
            || {},
            |_, run| {
                self.take_mirrored_leaves(&run, root);
                Visit::Done(Flush::None)
            },
        );
        let mut next = Some(Level::SIZE_2M);
        while let Some(level) = next.filter(|level| *level <= F::ROOT_LEVEL) {
            let tables = Sweep::leaves(everything).finest(level);
            session = sweep(
                session,
                root,
                tables,
                || {},
                |_, run| {
                    if run.node.level() == level {
                        for index in run.first..run.end {
                            self.cut_mirrored_table(run.node, index);
                        }
                    }
                    Visit::Done(Flush::None)
                },
            );
            next = level.parent();
        }
        session.finish();
    }

    fn cut_mirrored_table(&self, node: Node<'_, F>, index: usize) {
        let Some(pfn) = F::as_table(node.load(index), node.level()) else {
            return;
        };
        let page = self.tables.header(pfn).snapshot(pfn);
        let (Some(page), Some(external)) = (page, self.host.external()) else {
            return;
        };
        if let (_, Some(table)) = node.take(index, Absent::Empty)
            && external.free_table(page.gfn, page.role.level, pfn).is_ok()
        {
            self.tables.retire(table);
        }
    }
}
