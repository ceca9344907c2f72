//! The dirty log.
//!
//! # Order
//!
//! Losing no write depends on one order, for each page: **take the bit → protect → flush → use the
//! page's contents**. A write before the protection is in the contents; a write after it faults (or
//! sets D and is logged) and sets the bit again; a write through a stale TLB entry happens before
//! the flush is complete, so it is in the contents too. Hence a harvest, with its flush, holds the
//! slots lock: of two, the second never reports as clean what the first has not flushed.
//!
//! The flush is owed for every bit taken, even where the entry had lost its W bit before, and for
//! nothing if none was taken.
//!
//! *Protecting* means taking W, or D where hardware logs by Dirty bits. A huge leaf under a taken
//! bit is split first, wherever in the bitmap's words it begins: words need not be aligned to huge
//! pages. Without memory for that the whole leaf loses W, which is always safe: its other pages
//! fault once more.
//!
//! *Locking*: the slots lock, and below it the exclusive MMU lock, which is offered to others after
//! each 4096 pages and inside them. From one dirty group of pages to the next it is kept, for a
//! *turn*: while nobody waits for it, no group without a taken bit comes, and for [`TURN`] groups
//! at most. The roots are listed once a turn. That is enough: only who holds the slots lock
//! withdraws a root, so a listed root stays valid and no second one is made; and where none was
//! listed no sweep yields, so the lock is held without a gap and none can be made.

use alloc::{sync::Arc, vec::Vec};
use core::cell::Cell;

use thiserror::Error;

use super::{
    mmu::TdpMmu,
    protect::Take,
    root::RootPage,
    session::{Mode, Session},
    split::Split,
    stock::Ahead,
    sweep::{Sweep, Visit, sweep},
};
use crate::{
    addr::{Gfn, GfnRange},
    flush::{Flush, FlushCause},
    format::{DirtyLogPolicy, Format},
    rcu::{self, buffer::Writer},
    slot::{DirtyBitmap, Memslot, SlotId, SlotSet},
    sync::Counted,
    table::{
        memory::TableMemory,
        node::{Bottom, Run},
    },
};

/// Words that are taken and protected together: 4096 pages, one group of the bitmap's summary.
const GROUP: usize = 64;

/// Groups that are protected before the lock is let go of in any case: 256 MiB. Grace periods wait
/// as long.
const TURN: usize = 16;

/// Why a dirty-log operation was refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// No slot has this number.
    #[error("slot {id} does not exist")]
    UnknownSlot {
        /// The slot asked for.
        id: SlotId,
    },
    /// The slot does not log writes.
    #[error("slot {id} does not log writes")]
    NotLogging {
        /// The slot.
        id: SlotId,
    },
    /// The bitmap given is too short.
    #[error("the bitmap has {got} words, {needed} are needed")]
    BitmapTooShort {
        /// 64-bit words needed.
        needed: usize,
        /// 64-bit words given.
        got: usize,
    },
    /// The first page is not a multiple of 64, or the length is not and does not end at the slot's
    /// end.
    #[error("pages {first_page}+{num_pages} are not in units of 64")]
    Unaligned {
        /// First page, relative to the slot.
        first_page: u64,
        /// Number of pages.
        num_pages: u64,
    },
    /// The pages are not all in the slot.
    #[error("pages {first_page}+{num_pages} reach beyond the slot's {npages}")]
    OutOfSlot {
        /// First page, relative to the slot.
        first_page: u64,
        /// Number of pages.
        num_pages: u64,
        /// Length of the slot in pages.
        npages: u64,
    },
}

fn check_length(needed: usize, got: usize) -> Result<(), DirtyLogError> {
    if got < needed {
        Err(DirtyLogError::BitmapTooShort { needed, got })
    } else {
        Ok(())
    }
}

/// A group of words whose bits were taken, to be protected.
struct TakenBits {
    words: [u64; GROUP],
    /// The first page of the group, as a frame.
    base: Gfn,
}

impl TakenBits {
    /// The frames from the first set bit to the last.
    fn range(&self) -> Option<GfnRange> {
        let first = self.words.iter().position(|word| *word != 0)?;
        let last = self.words.iter().rposition(|word| *word != 0)?;
        let start = first as u64 * 64 + u64::from(self.words[first].trailing_zeros());
        let end = last as u64 * 64 + 64 - u64::from(self.words[last].leading_zeros());
        Some(GfnRange {
            start: Gfn(self.base.0 + start),
            end: Gfn(self.base.0 + end),
        })
    }

    /// Whether a bit is set for a frame of `span`.
    fn any(&self, span: GfnRange) -> bool {
        let pages = GROUP as u64 * 64;
        let first = span.start.0.saturating_sub(self.base.0).min(pages);
        let end = span.end.0.saturating_sub(self.base.0).min(pages);
        let mut page = first;
        while page < end {
            let upto = end.min((page / 64 + 1) * 64);
            let bits = u64::MAX >> (64 - (upto - page)) << (page % 64);
            if self.words[(page / 64) as usize] & bits != 0 {
                return true;
            }
            page = upto;
        }
        false
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    const TAKE: Take = match F::DIRTY_LOG {
        DirtyLogPolicy::WriteProtect => Take::Writable,
        DirtyLogPolicy::DirtyBit => Take::Dirty,
    };

    fn logging(
        &self,
        writer: &Writer<'_, SlotSet>,
        as_id: u8,
        id: SlotId,
    ) -> Result<(Arc<Memslot>, Arc<DirtyBitmap>), DirtyLogError> {
        let unknown = DirtyLogError::UnknownSlot { id };
        let set = writer.read(usize::from(as_id)).ok_or(unknown)?;
        let slot = Arc::clone(set.get(id).map_err(|_| unknown)?);
        let dirty = slot.dirty.clone().ok_or(DirtyLogError::NotLogging { id })?;
        Ok((slot, dirty))
    }

    pub(super) fn do_get_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        let (_, dirty) = self.logging(&self.spaces.lock(), as_id, id)?;
        check_length(dirty.len(), bitmap.len())?;
        for (index, word) in bitmap.iter_mut().take(dirty.len()).enumerate() {
            *word = dirty.get(index);
        }
        Ok(())
    }

    pub(super) fn do_harvest_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<u64, DirtyLogError> {
        let writer = self.spaces.lock();
        let (slot, dirty) = self.logging(&writer, as_id, id)?;
        check_length(dirty.len(), bitmap.len())?;
        let reader = self.participants.reader_slot();
        let mut harvest = Harvest::new(self, &slot, &reader);
        let mut from = 0;
        while let Some(first) = dirty.next_candidate(from) {
            let end = dirty.group_end(first);
            dirty.begin_group(first);
            let mut taken = harvest.group(first);
            let out = bitmap[first..end].iter_mut().zip(&mut taken.words);
            for (word, (out, taken)) in (first..end).zip(out) {
                let bits = dirty.take(word, u64::MAX);
                *out |= bits;
                *taken = bits;
            }
            harvest.protect(&taken);
            from = end;
        }
        Ok(harvest.finish())
    }

    pub(super) fn do_clear_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError> {
        let writer = self.spaces.lock();
        let (slot, dirty) = self.logging(&writer, as_id, id)?;
        let npages = slot.spec.npages;
        let end = first_page
            .checked_add(num_pages)
            .filter(|&end| end <= npages);
        let end = end.ok_or(DirtyLogError::OutOfSlot {
            first_page,
            num_pages,
            npages,
        })?;
        if !first_page.is_multiple_of(64) || (!num_pages.is_multiple_of(64) && end != npages) {
            return Err(DirtyLogError::Unaligned {
                first_page,
                num_pages,
            });
        }
        let words = num_pages.div_ceil(64) as usize;
        check_length(words, bitmap.len())?;
        let reader = self.participants.reader_slot();
        let mut harvest = Harvest::new(self, &slot, &reader);
        for (group, masks) in bitmap[..words].chunks(GROUP).enumerate() {
            let first = (first_page / 64) as usize + group * GROUP;
            let mut taken = harvest.group(first);
            for (offset, mask) in masks.iter().enumerate() {
                // Only what was asked for *and* is set: a page that is clean needs no protection.
                taken.words[offset] = dirty.take(first + offset, *mask);
            }
            harvest.protect(&taken);
        }
        Ok(harvest.finish())
    }

    pub(super) fn do_mark_dirty(&self, as_id: u8, range: GfnRange) -> u64 {
        let writer = self.spaces.lock();
        let Some(set) = writer.read(usize::from(as_id)) else {
            return 0;
        };
        let mut marked = 0;
        for slot in set.over(range) {
            let pages = slot.spec.range();
            if let Some(dirty) = &slot.dirty {
                let start = pages.start.max(range.start).0 - pages.start.0;
                let end = pages.end.min(range.end).0 - pages.start.0;
                dirty.set_range(start, end);
                marked += end - start;
            }
        }
        marked
    }

    pub(super) fn do_dirty_pages(&self, as_id: u8, id: SlotId) -> Result<u64, DirtyLogError> {
        let (_, dirty) = self.logging(&self.spaces.lock(), as_id, id)?;
        Ok(dirty.count())
    }
}

/// The exclusive lock, and every valid root of the slot's address space while it is held.
struct Turn<'m, F: Format, H: TableMemory> {
    session: Session<'m, F, H>,
    roots: Vec<Counted<RootPage>>,
    /// Groups that it may still be kept for.
    left: usize,
}

/// Bits being taken from one slot. The caller holds the slots lock until [`finish`](Self::finish).
struct Harvest<'m, F: Format, H: TableMemory> {
    mmu: &'m TdpMmu<F, H>,
    slot: &'m Memslot,
    reader: &'m rcu::cell::Cell,
    /// Before `ahead`, which is dropped without the lock.
    turn: Option<Turn<'m, F, H>>,
    ahead: Ahead<'m, F, H>,
    owed: Flush,
    pages: u64,
}

impl<'m, F: Format, H: TableMemory> Harvest<'m, F, H> {
    fn new(mmu: &'m TdpMmu<F, H>, slot: &'m Memslot, reader: &'m rcu::cell::Cell) -> Self {
        Self {
            mmu,
            slot,
            reader,
            turn: None,
            ahead: Ahead::new(mmu),
            owed: Flush::None,
            pages: 0,
        }
    }

    /// The lock and the roots to look at, for bits that were taken already. Kept, or taken anew.
    fn turn(&mut self) -> Turn<'m, F, H> {
        let (cause, as_id) = (FlushCause::DirtyLog, self.slot.spec.as_id);
        let session = match self.turn.take() {
            Some(turn) if turn.left > 0 && !turn.session.is_contended() => return turn,
            // Whoever waits is let in before this one takes the lock again.
            Some(turn) => turn.session.yielded(|| {}),
            None => Session::begin(self.mmu, self.reader, Mode::Exclusive, cause, as_id),
        };
        let valid = |root: &RootPage| !root.is_invalid() && !root.mirror;
        Turn {
            roots: self.mmu.roots_of(as_id, valid),
            session,
            left: TURN,
        }
    }

    fn end_turn(&mut self) {
        if let Some(turn) = self.turn.take() {
            turn.session.finish();
        }
    }

    fn group(&self, first_word: usize) -> TakenBits {
        TakenBits {
            words: [0; GROUP],
            base: Gfn(self.slot.spec.base_gfn.0 + first_word as u64 * 64),
        }
    }

    /// Protects the pages of the bits that were taken.
    fn protect(&mut self, taken: &TakenBits) {
        let Some(range) = taken.range() else {
            // Nobody knows how many more of these there are.
            self.end_turn();
            return;
        };
        self.pages += taken
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum::<u64>();
        let mmu = self.mmu;
        let mut owed = Flush::range(range);
        let Turn {
            mut session,
            roots,
            left,
        } = self.turn();
        for root in &roots {
            let ahead = &self.ahead;
            let refill = || {
                // The visitor goes on without memory as well.
                ahead.refill(GROUP);
            };
            let dry = Cell::new(false);
            let plan = Sweep::leaves(range);
            session = sweep(session, root, plan, refill, |session, run| {
                debug_assert!(!root.is_invalid(), "withdrawn without the slots lock");
                if let Some(bottom) = run.bottom() {
                    protect_bottom::<F>(TdpMmu::<F, H>::TAKE, &run, bottom, taken);
                    return Visit::Done(Flush::None);
                }
                for index in run.first..run.end {
                    let span = run.span_of(index);
                    let raw = run.node.load(index);
                    if !F::is_leaf(raw, run.node.level()) || !taken.any(span) {
                        continue;
                    }
                    let Some(blank) = ahead.take() else {
                        if !dry.replace(true) {
                            return Visit::Stop;
                        }
                        // Stopped for memory and got none.
                        Take::Writable.apply_to_entry(run.node, index);
                        owed = owed.merge(Flush::range(span));
                        continue;
                    };
                    dry.set(false);
                    // Under the exclusive lock only hardware changes the entry; it sets bits, so
                    // try until it is quiet.
                    let mut attempt = Some((raw, blank));
                    while let Some((raw, blank)) = attempt.take() {
                        let node = run.node;
                        match mmu.split(node, index, raw, blank, session.cell, false) {
                            Split::Done => {}
                            Split::Lost(blank) => {
                                let raw = node.load(index);
                                if F::is_leaf(raw, node.level()) {
                                    attempt = Some((raw, blank));
                                } else {
                                    ahead.put_back(blank);
                                }
                            }
                        }
                    }
                }
                Visit::Done(Flush::None)
            });
        }
        let left = left - 1;
        self.turn = Some(Turn {
            session,
            roots,
            left,
        });
        self.owed = self.owed.merge(owed);
    }

    /// Flushes what was taken, and says how many pages were.
    fn finish(mut self) -> u64 {
        self.end_turn();
        self.mmu
            .flush(self.owed, FlushCause::DirtyLog, self.slot.spec.as_id);
        self.pages
    }
}

/// Takes the bit from the leaves of one 4 KiB table whose pages were taken.
#[inline(always)]
fn protect_bottom<F: Format>(take: Take, run: &Run<'_, F>, bottom: Bottom<'_>, taken: &TakenBits) {
    bottom.warm();
    // Pages of the group, counted from its base; the run lies inside the group.
    let first = run.gfn.0 - taken.base.0;
    let mut index = 0;
    while index < bottom.len() {
        let page = first + index as u64;
        let upto = bottom.len().min(index + 64 - (page % 64) as usize);
        let word = taken.words[(page / 64) as usize];
        if word == u64::MAX {
            take.apply_to_bottom::<F>(bottom, index, upto);
        } else if word != 0 {
            let mut bits = word >> (page % 64);
            let mut at = index;
            while bits != 0 {
                at += bits.trailing_zeros() as usize;
                if at >= upto {
                    break;
                }
                take.apply_to_bottom::<F>(bottom, at, at + 1);
                bits >>= bits.trailing_zeros();
                bits &= !1;
            }
        }
        index = upto;
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn any_is_exact_at_the_edges_of_words_and_group() {
        let mut taken = TakenBits {
            words: [0; GROUP],
            base: Gfn(1000),
        };
        taken.words[1] = 1;
        let span = |start, pages| GfnRange::new(Gfn(start), pages);
        assert_eq!(taken.range(), Some(span(1064, 1)));
        assert!(taken.any(span(1064, 1)) && taken.any(span(512, 1024)));
        assert!(!taken.any(span(1000, 64)) && !taken.any(span(1065, 4000)));
        assert!(!taken.any(span(0, 1000)) && !taken.any(span(5096, 1)));
        taken.words[GROUP - 1] = 1 << 63;
        assert_eq!(taken.range(), Some(span(1064, 4096 - 64)));
        assert!(taken.any(span(5095, 1)));
    }
}
