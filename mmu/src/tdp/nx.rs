//! The NX-huge-page mitigation (iTLB multihit).
//!
//! Some processors may crash when the size of an executable mapping changes under a running guest.
//! So, where it is configured, a huge mapping is never executable: a fetch from one splits it, the
//! 4 KiB pages are executable, and the table that holds them is noted. Noted tables are
//! zapped after a while, a few at a time, and become huge again if nothing is fetched there any
//! more.
//!
//! *Locking*: the list of noted tables has its own lock (`locks`). A table is noted before it is
//! linked, so whoever unlinks it sees the note, and takes it back. Recovery holds the slots lock
//! and the shared MMU lock.

use super::{
    level::Goal,
    mmu::TdpMmu,
    root::RootPage,
    session::{Mode, Session},
};
use crate::{
    addr::{Gfn, GfnRange, Pfn},
    flush::{Flush, FlushCause},
    format::Format,
    table::memory::TableMemory,
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    #[inline(always)]
    pub(super) fn avoids_executable_huge_pages(&self) -> bool {
        F::NX_HUGE_PAGES && self.config.nx_huge_pages
    }

    /// At the goal: if a noted table is there, it stays, and the fault is mapped one level finer
    /// (`disallowed_hugepage_adjust`). Otherwise the next data access would make the page huge
    /// again, and the next fetch split it.
    #[inline(always)]
    pub(super) fn lower_goal_for_nx(&self, goal: &mut Goal, raw: u64) {
        if self.avoids_executable_huge_pages()
            && let Some(pfn) = F::as_table(raw, goal.level)
            && self.tables.header(pfn).nx_disallowed()
            && let Some(finer) = goal.level.child()
        {
            goal.level = finer;
        }
    }

    /// Notes a table that is described and not linked yet: it is still the caller's alone.
    pub(super) fn note_nx_table(&self, pfn: Pfn) {
        if self.nx_tables.insert(pfn) {
            self.tables.header(pfn).set_nx_disallowed(true);
        }
    }

    #[inline(always)]
    pub(super) fn forget_nx_table(&self, pfn: Pfn) {
        // Whatever the header says: describing the next table in this memory clears the mark there,
        // and only there.
        if self.avoids_executable_huge_pages() && self.nx_tables.remove(pfn) {
            self.tables.header(pfn).set_nx_disallowed(false);
        }
    }

    /// Zaps up to `most` noted tables, so that the guest's next accesses may map them huge. Returns
    /// how many.
    ///
    /// Tables of logged slots are skipped and do not count, so it may have to look at all that are
    /// noted: the lock is offered to others before each one, skipped or not.
    pub(super) fn do_recover_nx_huge_pages(&self, most: usize) -> usize {
        let slots = self.spaces.lock();
        let reader = self.participants.reader_slot();
        let mut zapped = 0;
        // One session for each address space: what is owed is owed to one.
        for (as_id, set) in (0..=u8::MAX).zip(slots.iter()) {
            let cause = FlushCause::NxRecovery;
            let mut session = Session::begin(self, &reader, Mode::Shared, cause, as_id);
            let mut last = None;
            // Of those that may go: tables of logged slots do not hold up the others.
            while zapped < most {
                let Some(pfn) = self.nx_tables.after(last) else {
                    break;
                };
                last = Some(pfn);
                if session.is_contended() {
                    session = session.yielded(|| {});
                }
                let page = self.tables.header(pfn).snapshot(pfn);
                let Some(page) = page.filter(|page| page.role.as_id == as_id) else {
                    continue;
                };
                // A page that is being logged would only be split again.
                let slot = set.find(page.gfn);
                if slot.is_none_or(|slot| slot.dirty.is_some()) {
                    continue;
                }
                for root in self.roots_of(as_id, |root| !root.is_invalid() && !root.mirror) {
                    if let Some(span) = self.cut_off(&session, &root, page.gfn, pfn) {
                        session.owe(Flush::range(span));
                        zapped += 1;
                    }
                }
            }
            session.finish();
        }
        drop(slots);
        self.tidy();
        zapped
    }

    /// Removes the table at `pfn` from the path of `gfn`, if it is still there: presence alone
    /// would not do, the entry may point to another table by now.
    fn cut_off(
        &self,
        session: &Session<'_, F, H>,
        root: &RootPage,
        gfn: Gfn,
        pfn: Pfn,
    ) -> Option<GfnRange> {
        let mut node = session.guard.root(&root.table);
        loop {
            let (level, index) = (node.level(), F::index(gfn, node.level()));
            let raw = node.load(index);
            if F::as_table(raw, level)? == pfn {
                let table = node.replace(index, raw, F::EMPTY).ok()??;
                self.remove_table(&session.guard, table, session.cell);
                return Some(GfnRange::new(F::align_down(gfn, level), F::span(level)));
            }
            node = session.guard.child(node, index)?;
        }
    }
}
