//! Mirror roots: tables whose real counterpart an external owner keeps.
//!
//! Leaves change in batches (`batch`): by a fault (`mirror_fault`), over a range (`mirror_range`).
//! Here are the tables, which are made one by one with the owner asked under the lock: the entry is
//! frozen, the owner asked, and the new value stored, or on refusal the old one. They go with the
//! MMU, or, when the owner's view was replaced, with the root, and then the owner is not asked.
//!
//! Leaves are 4 KiB. They are never split, recovered, aged by their Accessed bit or logged, and
//! withdrawing the guest's own roots leaves mirrors alone.
//!
//! A removal that the owner refuses leaves the mapping where it is: memory that the owner still
//! maps must not be reused, so a leak is the only safe answer, and it shows in the page statistics.

use alloc::sync::Arc;

use super::{
    mirror_range::{Aim, MirrorChange},
    mmu::TdpMmu,
    root::RootPage,
    session::{Mode, Session},
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::{Flush, FlushCause},
    format::Format,
    refused::Refused,
    sync::{Counted, Relaxed, Release},
    table::{
        header::PageRole,
        memory::TableMemory,
        node::{Absent, Node},
        ticket::Blank,
    },
};

/// Why no table was linked.
pub(super) enum NotLinked {
    /// Someone else changed the entry. The memory is left.
    Lost(Blank),
    /// The owner refused.
    Refused(Refused),
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Links an empty table into the entry at `index`, which was `raw`, on the way to `gfn`. Under
    /// the shared lock, and a valid root.
    pub(super) fn link_mirrored(
        &self,
        root: &RootPage,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        blank: Blank,
        gfn: Gfn,
    ) -> Result<(), NotLinked> {
        let external = self.host.external();
        let (Some(external), Some(level)) = (external, node.level().child()) else {
            return Err(NotLinked::Lost(blank));
        };
        let gfn = F::align_down(gfn, node.level());
        let table = blank.fill(&self.tables, level, |_| F::EMPTY);
        let header = self.tables.header(table.pfn());
        let role = PageRole::new(root.as_id, level, true);
        header.describe(role, gfn, Some((node.pfn(), index)));
        if node.replace(index, raw, F::FROZEN).is_err() {
            return Err(NotLinked::Lost(self.tables.blank_again(table)));
        }
        if let Err(why) = external.link_table(gfn, level, table.pfn()) {
            let owned = node.replace(index, F::FROZEN, raw);
            debug_assert!(owned.is_ok(), "a frozen entry is its owner's");
            let blank = self.tables.blank_again(table);
            self.tables.free_blank(blank);
            return Err(NotLinked::Refused(why));
        }
        node.link(index, F::FROZEN, table)
            .map_err(|table| NotLinked::Lost(self.tables.blank_again(table)))
    }

    /// The owner's view was replaced: withdraws the address space's mirror without asking the
    /// owner. The generation from which roots are newer.
    pub(super) fn do_withdraw_mirrors(&self, as_id: u8) -> u64 {
        let exclusive = self.lock.exclusive();
        for root in self.roots_of(as_id, |root| root.mirror && !root.is_invalid()) {
            root.invalid.store(true, Release);
            root.to_zap.store(true, Relaxed);
            self.tables.header(root.table.pfn()).invalidate();
            // What was counted is not mapped. A batch that is under way counts nothing any more.
            if let Some(count) = root.counted_in.lock().take() {
                self.separate_counts
                    .lock()
                    .retain(|other| !Arc::ptr_eq(other, &count));
            }
        }
        // Roots are made under the shared lock.
        let newer = self.root_generation.load(Relaxed) + 1;
        drop(exclusive);
        newer
    }

    /// The end of the MMU: unmaps all mirrors, and gives their tables back to the owner. Who was
    /// withdrawn stands for nothing any more.
    pub(super) fn tear_down_mirrors(&self) {
        let roots = self.roots.lock();
        let mirrors = roots
            .iter()
            .filter(|root| root.mirror && !root.is_invalid());
        let mirrors: alloc::vec::Vec<_> = mirrors.map(Counted::clone).collect();
        drop(roots);
        for root in mirrors {
            let mut change = MirrorChange::default();
            let cause = FlushCause::Roots;
            self.change_under(&root, everything::<F>(), Aim::Unmap, cause, &mut change);
            self.free_mirrored_tables(&root);
        }
    }

    /// Gives all tables back to the owner, from the finest up. One that the owner keeps is leaked,
    /// with the mirror's own.
    fn free_mirrored_tables(&self, root: &RootPage) {
        let reader = self.participants.reader_slot();
        let cause = FlushCause::Roots;
        let mut session = Session::begin(self, &reader, Mode::Exclusive, cause, root.as_id);
        let mut next = Some(Level::SIZE_2M);
        while let Some(level) = next.filter(|level| *level <= F::ROOT_LEVEL) {
            let tables = Sweep::leaves(everything::<F>()).finest(level);
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

fn everything<F: Format>() -> GfnRange {
    GfnRange {
        start: Gfn(0),
        end: F::MAX_GFN,
    }
}
