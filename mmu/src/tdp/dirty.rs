//! The dirty log.
//!
//! # Order
//!
//! Losing no write depends on one order, for each page: **take the bit → protect → flush → use the page's contents**.
//! A write before the protection is in the contents; a write after it faults and sets the bit again; a write through a
//! stale TLB entry happens before the flush is complete, so it is in the contents too. Hence a harvest is complete only
//! when its [`Flush`] is; and harvests of one slot, each with its flush, must be serialised by the caller, as KVM's
//! `slots_lock` does, or the second would report as clean a page that the first has not flushed yet.
//!
//! The flush is owed for every bit taken, even where the entry had lost its W bit before.
//!
//! *Locking*: the MMU lock, except for looking at bits.

use alloc::sync::Arc;

use thiserror::Error;

use super::{State, TdpMmu, iter::TdpIter, split::SplitError};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::Flush,
    format::{Entry, Format},
    slot::{DirtyBitmap, Slot, SlotId},
    table::{memory::TableMemory, node::Guard},
};

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
    /// The first page is not a multiple of 64, or the length is not and does not end at the slot's end.
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

impl State {
    fn logging(&self, id: SlotId) -> Result<(Arc<Slot>, Arc<DirtyBitmap>), DirtyLogError> {
        let slot = self
            .slots
            .get(id)
            .map_err(|_| DirtyLogError::UnknownSlot { id })?
            .clone();
        let dirty = slot.dirty.clone().ok_or(DirtyLogError::NotLogging { id })?;
        Ok((slot, dirty))
    }
}

fn check_length(needed: usize, got: usize) -> Result<(), DirtyLogError> {
    if got < needed {
        Err(DirtyLogError::BitmapTooShort { needed, got })
    } else {
        Ok(())
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_get_dirty_log(
        &self,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        let (_, dirty) = self.state.lock().logging(id)?;
        check_length(dirty.len(), bitmap.len())?;
        for (index, word) in bitmap.iter_mut().take(dirty.len()).enumerate() {
            *word = dirty.get(index);
        }
        Ok(())
    }

    pub(super) fn do_harvest_dirty_log(
        &self,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<Flush, DirtyLogError> {
        let flush = self.locked(|state, guard| {
            let (slot, dirty) = state.logging(id)?;
            check_length(dirty.len(), bitmap.len())?;
            let mut flush = Flush::None;
            for (index, word) in bitmap.iter_mut().take(dirty.len()).enumerate() {
                *word = dirty.take(index, u64::MAX);
                flush = flush.merge(self.clear_dirty_pt_masked(state, guard, &slot, index, *word));
            }
            Ok(flush)
        })?;
        Ok(self.stats.flush(flush))
    }

    pub(super) fn do_clear_dirty_log(
        &self,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<Flush, DirtyLogError> {
        let flush = self.locked(|state, guard| {
            let (slot, dirty) = state.logging(id)?;
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
            let mut flush = Flush::None;
            for (offset, &mask) in bitmap.iter().take(words).enumerate() {
                let index = (first_page / 64) as usize + offset;
                // Only what was asked for *and* is set: a page that is clean needs no protection.
                let taken = dirty.take(index, mask);
                flush = flush.merge(self.clear_dirty_pt_masked(state, guard, &slot, index, taken));
            }
            Ok(flush)
        })?;
        Ok(self.stats.flush(flush))
    }

    pub(super) fn do_mark_dirty(&self, range: GfnRange) -> u64 {
        let state = self.state.lock();
        let mut marked = 0;
        for slot in state.slots.iter() {
            let pages = slot.spec.range();
            let (Some(dirty), true) = (&slot.dirty, pages.overlaps(range)) else {
                continue;
            };
            for gfn in pages.start.max(range.start).0..pages.end.min(range.end).0 {
                dirty.set(gfn - pages.start.0);
                marked += 1;
            }
        }
        marked
    }

    pub(super) fn do_dirty_pages(&self, id: SlotId) -> Result<u64, DirtyLogError> {
        let (_, dirty) = self.state.lock().logging(id)?;
        Ok(dirty.count())
    }

    /// Takes the W bit from every leaf over `range`.
    pub(super) fn write_protect(&self, guard: &Guard<'_, F, H>, range: GfnRange) {
        let Some(mut iter) = self.iter(guard, range, Level::SIZE_4K) else {
            return;
        };
        while iter.advance() {
            clear_writable(&mut iter);
        }
    }

    /// Protects the pages of one bitmap word whose bits are in `mask`, and returns the flush for them.
    ///
    /// A huge leaf under such a page is split first. Without memory for that, the whole leaf is protected, which is
    /// always safe: pages of it whose bits are still set fault once more.
    fn clear_dirty_pt_masked(
        &self,
        state: &mut State,
        guard: &Guard<'_, F, H>,
        slot: &Slot,
        word: usize,
        mask: u64,
    ) -> Flush {
        if mask == 0 {
            return Flush::None;
        }
        let base = slot.spec.base_gfn.0 + word as u64 * 64;
        let start = base + u64::from(mask.trailing_zeros());
        let end = base + 64 - u64::from(mask.leading_zeros());
        let range = GfnRange {
            start: Gfn(start),
            end: Gfn(end),
        };
        let mut flush = Flush::range(range);
        let Some(mut iter) = self.iter(guard, range, Level::SIZE_4K) else {
            return flush;
        };
        while iter.advance() {
            loop {
                if !F::is_writable(iter.old(), iter.level())
                    || mask & pages_under(base, iter.span()) == 0
                {
                    break;
                }
                if iter.level() == Level::SIZE_4K {
                    clear_writable(&mut iter);
                    break;
                }
                match self.split(state, &mut iter) {
                    Ok(()) => break,
                    Err(SplitError::Stale) => continue,
                    Err(SplitError::NoMemory) => {
                        clear_writable(&mut iter);
                        flush = flush.merge(Flush::range(iter.span()));
                        break;
                    }
                }
            }
        }
        flush
    }
}

/// The bits of the word for `base .. base + 64` whose pages lie in `span`. The word need not be aligned to anything.
fn pages_under(base: u64, span: GfnRange) -> u64 {
    let first = span.start.0.saturating_sub(base);
    let end = span.end.0.saturating_sub(base).min(64);
    if first >= end {
        return 0;
    }
    (u64::MAX >> (64 - (end - first))) << first
}

/// Takes the W bit from the leaf at hand, if it has one.
fn clear_writable<F: Format, H: TableMemory>(iter: &mut TdpIter<'_, F, H>) {
    while matches!(F::decode(iter.old(), iter.level()), Entry::Leaf(leaf) if leaf.writable) {
        // Fails only if hardware set A or D meanwhile; the snapshot is new then.
        let _ = iter.replace(F::with_writable(iter.old(), false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_under_a_leaf() {
        let span = |start, pages| GfnRange::new(Gfn(start), pages);
        assert_eq!(pages_under(1000, span(1000, 64)), u64::MAX);
        assert_eq!(pages_under(1000, span(1003, 1)), 1 << 3);
        assert_eq!(pages_under(1000, span(512, 512)), (1 << 24) - 1);
        assert_eq!(pages_under(1000, span(1024, 512)), u64::MAX << 24);
        assert_eq!(pages_under(1000, span(512, 488)), 0);
        assert_eq!(pages_under(1000, span(1064, 1)), 0);
    }
}
