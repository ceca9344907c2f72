//! Taking away W and D.
//!
//! # Plain stores
//!
//! A locked instruction costs twenty times a store, so a sweep over a populated slot uses one only
//! where it must: where the entry is *volatile* (hardware may set D, or the fast path give W back,
//! between our load and our store). An entry with W and D set is stable for the holder of the slots
//! lock under either mode of the MMU lock:
//!
//! - faults leave a leaf that allows the access as it is, or set Accessed, which may be lost (a
//!   fault more);
//! - ageing clears Accessed, which may be lost (a page looks young);
//! - other sweeps that take W or D are kept away by the slots lock, unmapping by the exclusive
//!   lock;
//! - nobody tears a table down in which a sweep takes bits: under a valid root that is done by
//!   recovery and by the mitigation's worker, which hold the slots lock, and by a fault that maps a
//!   huge page over a table, which a slot that logs does not allow; it logs for a grace period when
//!   the sweep begins. Withdrawn roots are left out.

use super::{
    mmu::TdpMmu,
    session::{Mode, Session},
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::{Flush, FlushCause},
    format::{Entry, Format},
    table::{
        memory::TableMemory,
        node::{Bottom, LINE, Node, Run},
    },
};

/// Which bit is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Take {
    Writable,
    Dirty,
}

impl Take {
    #[inline(always)]
    fn has<F: Format>(self, raw: u64, level: Level) -> bool {
        match self {
            Self::Writable => F::is_writable(raw, level),
            Self::Dirty => F::is_dirty(raw, level),
        }
    }

    #[inline(always)]
    fn take<F: Format>(self, raw: u64) -> u64 {
        match self {
            Self::Writable => F::with_writable(raw, false),
            Self::Dirty => F::with_dirty(raw, false),
        }
    }

    /// From every 4 KiB leaf in `bottom[first..end]`.
    #[inline(always)]
    pub(super) fn apply_to_bottom<F: Format>(self, bottom: Bottom<'_>, first: usize, end: usize) {
        let mut index = first;
        // A cache line at a time: in a populated slot all of it is settled, and one branch is
        // enough.
        while index + LINE <= end {
            if are_settled::<F>(bottom.load_line(index)) {
                // Loaded once more, which costs less than to keep it: W and D are still there, and
                // nothing else may get lost.
                bottom.change_line(index, |raw| self.take::<F>(raw));
            } else {
                self.apply_to_each::<F>(bottom, index, index + LINE);
            }
            index += LINE;
        }
        self.apply_to_each::<F>(bottom, index, end);
    }

    #[inline(never)]
    fn apply_to_each<F: Format>(self, bottom: Bottom<'_>, first: usize, end: usize) {
        const LEVEL: Level = Level::SIZE_4K;
        for index in first..end {
            let raw = bottom.load(index);
            if self.has::<F>(raw, LEVEL) {
                if F::is_volatile(raw, LEVEL) {
                    self.apply_to_volatile::<F>(bottom, index, raw);
                } else {
                    bottom.store(index, self.take::<F>(raw));
                }
            }
        }
    }

    #[cold]
    fn apply_to_volatile<F: Format>(self, bottom: Bottom<'_>, index: usize, mut raw: u64) {
        while self.has::<F>(raw, Level::SIZE_4K) {
            match bottom.replace(index, raw, self.take::<F>(raw)) {
                Ok(_) => break,
                Err(current) => raw = current,
            }
        }
    }

    /// From the leaf at `index`, at any level.
    pub(super) fn apply_to_entry<F: Format>(self, node: Node<'_, F>, index: usize) {
        let mut raw = node.load(index);
        while self.has::<F>(raw, node.level()) {
            match node.replace(index, raw, self.take::<F>(raw)) {
                Ok(_) => break,
                Err(current) => raw = current,
            }
        }
    }

    pub(super) fn apply_to_run<F: Format>(self, run: &Run<'_, F>) {
        match run.bottom() {
            Some(bottom) => {
                self.apply_to_bottom::<F>(bottom, 0, bottom.len());
            }
            None => {
                for index in run.first..run.end {
                    self.apply_to_entry(run.node, index);
                }
            }
        }
    }
}

/// Whether each is a 4 KiB leaf with W and D: not volatile, whatever the format.
#[inline(always)]
pub(super) fn are_settled<F: Format>(raw: [u64; LINE]) -> bool {
    let settled = |raw| F::is_writable(raw, Level::SIZE_4K) & F::is_dirty(raw, Level::SIZE_4K);
    raw.into_iter().fold(true, |all, raw| all & settled(raw))
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Takes a bit from every leaf of `finest` or coarser over `range` (`wrprot_slot`,
    /// `clear_dirty_slot`). The caller holds the slots lock and owes the flush.
    pub(super) fn take_from_range(&self, as_id: u8, range: GfnRange, finest: Level, take: Take) {
        let reader = self.participants.reader_slot();
        for root in self.roots_of(as_id, |root| !root.is_invalid() && !root.mirror) {
            let session = Session::begin(self, &reader, Mode::Shared, FlushCause::DirtyLog, as_id);
            let plan = Sweep::leaves(range).finest(finest);
            let session = sweep(
                session,
                &root,
                plan,
                || {},
                |_, run| {
                    // Withdrawn before this burst: its zapper does not hold the slots lock, and a
                    // plain store would bring back a leaf that it has counted out.
                    if !root.is_invalid() {
                        take.apply_to_run(&run);
                    }
                    Visit::Done(Flush::None)
                },
            );
            session.finish();
        }
    }

    /// Takes the leave to write from the leaf over `gfn`, if it is of `min_level` or coarser
    /// (`write_protect_gfn`): the next write is a slow fault. Whether anything changed; then it has
    /// been flushed.
    pub(super) fn do_write_protect_gfn(&self, as_id: u8, gfn: Gfn, min_level: Level) -> bool {
        let reader = self.participants.reader_slot();
        let mut changed = false;
        for root in self.roots_of(as_id, |root| !root.is_invalid() && !root.mirror) {
            let cause = FlushCause::WriteProtect;
            let session = Session::begin(self, &reader, Mode::Exclusive, cause, as_id);
            let plan = Sweep::leaves(GfnRange::new(gfn, 1))
                .finest(min_level)
                .atomic();
            let session = sweep(
                session,
                &root,
                plan,
                || {},
                |_, run| {
                    let mut owed = Flush::None;
                    for index in run.first..run.end {
                        owed = owed.merge(take_leave_to_write(run.node, index, run.span_of(index)));
                    }
                    Visit::Done(owed)
                },
            );
            changed |= session.finish();
        }
        changed
    }
}

/// The flush is owed even if W was off: it may have been taken lazily, and a TLB still have it.
fn take_leave_to_write<F: Format>(node: Node<'_, F>, index: usize, span: GfnRange) -> Flush {
    let level = node.level();
    let mut raw = node.load(index);
    loop {
        match F::decode(raw, level) {
            Entry::Leaf(leaf) if leaf.mmu_writable || leaf.writable => {}
            _ => return Flush::None,
        }
        match node.replace(index, raw, F::clear_mmu_writable(raw)) {
            Ok(_) => return Flush::range(span),
            Err(current) => raw = current,
        }
    }
}
