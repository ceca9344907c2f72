//! Changes of a mirror that its owner is asked for at once: frozen, carried out, settled.
//!
//! `external` has the protocol; what is kept of a batch is in `work`.
//!
//! # A batch and its tables
//!
//! Between freezing and settling nothing is held: no lock, no read section. So nothing of a table
//! is kept either, and the entries are looked up again when the owner has answered. They are where
//! they were: under a valid root no table of a mirror ever goes. A root that was withdrawn
//! meanwhile is left alone: its tables may be gone, and what its entries say means nothing any
//! more.
//!
//! # Waiting
//!
//! Who meets a frozen entry waits, if it has to, until the root's count of batches that are over
//! changes, with neither MMU lock nor read section, and with nothing frozen of its own: so batches
//! never wait for each other. Who froze under the shared lock settles under the shared lock; the
//! slots lock may be held throughout, because settling does not take it.
//!
//! *Locking*: entries are frozen and settled under the shared MMU lock; the owner is called, and
//! waiting done, without it.

use super::{
    mmu::TdpMmu,
    root::RootPage,
    work::{Pending, Work},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    external::{Change, ChangeKind},
    flush::{Flush, FlushCause},
    format::Format,
    rcu::cell::Cell,
    sync::{Backoff, Release},
    table::{
        guard::Guard,
        memory::TableMemory,
        node::{Node, Run},
    },
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Has the owner carry the batch out, and settles it. Called without the MMU lock, and outside.
    /// Whether the root is valid still; if not, what the owner said means nothing.
    ///
    /// `cause`: why mappings are taken away or protected.
    pub(super) fn carry_out(
        &self,
        work: &mut Work,
        root: &RootPage,
        cell: &Cell,
        cause: FlushCause,
    ) -> bool {
        if work.entries.is_empty() {
            return true;
        }
        let mut frozen = Frozen {
            mmu: self,
            work,
            root,
            cell,
            cause,
            settled: false,
        };
        // An owner that is not there any more has refused, by saying nothing.
        if let Some(external) = self.host.external() {
            external.apply(&mut frozen.work.batch);
            self.owner.count(&frozen.work.batch);
        }
        frozen.settle()
    }

    fn settle(&self, guard: &Guard<'_, F, H>, work: &Work, root: &RootPage, cause: FlushCause) {
        let mut entries = &work.entries[..];
        let mut mapped = 0;
        for change in work.changes() {
            let (own, rest) = entries.split_at(change.gfns().pages() as usize);
            entries = rest;
            self.thaw(guard, root, change, own);
            let done = GfnRange::new(change.gfns().start, change.done());
            match change.kind() {
                ChangeKind::Map { again, writable } => {
                    mapped += if again { 0 } else { done.pages() as i64 };
                    if writable {
                        self.mark_made_writable(guard, root.as_id, done);
                    }
                }
                ChangeKind::Protect { writable: true } => {
                    self.mark_made_writable(guard, root.as_id, done);
                }
                ChangeKind::Protect { writable: false } => {
                    self.flushes.count(Flush::range(done), cause);
                }
                ChangeKind::Unmap => {
                    mapped -= done.pages() as i64;
                    self.flushes.count(Flush::range(done), cause);
                }
            }
        }
        if mapped != 0 {
            root.count_separately(Level::SIZE_4K, mapped);
        }
    }

    /// Gives each entry of a change its new value, or its old one.
    fn thaw(
        &self,
        guard: &Guard<'_, F, H>,
        root: &RootPage,
        change: &Change,
        mut entries: &[Pending],
    ) {
        let (mut gfn, mut done) = (change.gfns().start, change.done() as usize);
        while !entries.is_empty() {
            let first = F::index(gfn, Level::SIZE_4K);
            let Some(node) = guard.bottom(&root.table, gfn) else {
                debug_assert!(false, "a table went under a valid mirror");
                return;
            };
            let here = entries.len().min(node.len() - first);
            let (part, rest) = entries.split_at(here);
            store::<F>(node, gfn, first, part, done);
            gfn.0 += here as u64;
            done = done.saturating_sub(here);
            entries = rest;
        }
    }

    /// A page that a mirror makes writable counts as written.
    fn mark_made_writable(&self, guard: &Guard<'_, F, H>, as_id: u8, range: GfnRange) {
        let Some(space) = self.spaces.get(usize::from(as_id)) else {
            return;
        };
        // The slot is the one that the fault found, whatever its flags are now: to go or to move it
        // waits for this batch.
        if let Some(slot) = space.read(guard.inside()).find(range.start)
            && let Some(dirty) = &slot.dirty
        {
            let base = slot.spec.base_gfn.0;
            dirty.set_range(range.start.0 - base, range.end.0 - base);
        }
    }

    /// Waits until a batch under `root` is over that was not when `seen` was read. Without the MMU
    /// lock, outside, and with nothing frozen.
    pub(super) fn await_batch(&self, root: &RootPage, seen: u64) {
        let mut backoff = Backoff::default();
        while root.batches_over() == seen {
            backoff.wait();
        }
    }
}

/// A batch whose entries are frozen. They are settled also when its owner panics: whoever waits for
/// them would wait for ever, and the MMU's own end waits.
struct Frozen<'a, F: Format, H: TableMemory> {
    mmu: &'a TdpMmu<F, H>,
    work: &'a mut Work,
    root: &'a RootPage,
    cell: &'a Cell,
    cause: FlushCause,
    settled: bool,
}

impl<F: Format, H: TableMemory> Frozen<'_, F, H> {
    /// Whether the root is valid still.
    fn settle(&mut self) -> bool {
        self.settled = true;
        let (mmu, root) = (self.mmu, self.root);
        let guard = Guard::new(&mmu.tables, mmu.lock.shared(self.cell));
        let valid = !root.is_invalid();
        if valid {
            mmu.settle(&guard, self.work, root, self.cause);
        }
        // Under the lock, so that who sees the number sees the entries.
        root.batches_over.fetch_add(1, Release);
        valid
    }
}

impl<F: Format, H: TableMemory> Drop for Frozen<'_, F, H> {
    fn drop(&mut self) {
        if !self.settled {
            self.settle();
        }
    }
}

/// Stores what becomes of neighbouring entries, of which the first `done` are done.
fn store<F: Format>(node: Node<'_, F>, gfn: Gfn, first: usize, part: &[Pending], done: usize) {
    let run = Run {
        node,
        first,
        end: first + part.len(),
        gfn,
    };
    let Some(bottom) = run.bottom() else { return };
    for (index, entry) in part.iter().enumerate() {
        // A plain store: an entry that is frozen is its owner's.
        debug_assert_eq!(bottom.load(index), F::FROZEN, "someone else's");
        let raw = if index < done { entry.new } else { entry.old };
        bottom.store(index, raw);
    }
}
