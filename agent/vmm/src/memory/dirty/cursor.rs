//! One reader of the dirty log: what it has yet to be told, and what it was told but did not
//! acknowledge.
//!
//! A page that is written is *fresh* for every cursor. A harvest delivers all fresh pages together
//! with those delivered before and not acknowledged; an acknowledgement of the last batch forgets
//! what was delivered. A page written again after its delivery is fresh again, so that
//! acknowledging the old batch cannot lose it: the two sets are never mixed.
//!
//! Nothing is copied on the way. A fresh bitmap becomes the delivered one, which cursor and reader
//! then share; what was delivered before is united with it, by groups that are not clean. Bitmaps
//! that are done with go back to the log, which uses them again.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use slat_proto::{ApiError, Reason};

use super::{batch::DirtyBatch, bitmap::DirtyBitmap, source::SlotBitmaps};

/// A bitmap that nobody needs any more, but its last reader may still hold.
pub(super) type Retired = (u32, Arc<DirtyBitmap>);

/// How much of what it is owed a reader takes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// At most so many runs of pages.
    Runs(usize),
    /// At most so many pieces of so many words that are not all clean.
    Pieces { words: usize, most: usize },
}

impl Share {
    /// Takes its share of a bitmap off itself; returns the first page that is too much.
    fn cut(&mut self, bitmap: &DirtyBitmap) -> Option<u64> {
        match self {
            Self::Runs(left) => {
                let mut runs = bitmap.runs();
                *left -= runs.by_ref().take(*left).count();
                runs.next().map(|(page, _)| page)
            }
            Self::Pieces { words, most } => {
                let mut from = 0;
                while let Some((word, _)) = bitmap.next_piece(from, *words) {
                    if *most == 0 {
                        return Some(word as u64 * 64);
                    }
                    *most -= 1;
                    from = word + *words;
                }
                None
            }
        }
    }
}

/// One reader's state.
#[derive(Debug)]
pub(super) struct Cursor {
    /// Of the last batch; of none while it is `before`.
    batch: u64,
    /// Batches up to this number are those of earlier cursors.
    before: u64,
    pub(super) last_used: Instant,
    fresh: SlotBitmaps,
    delivered: BTreeMap<u32, Arc<DirtyBitmap>>,
}

impl Cursor {
    /// A cursor that numbers its batches above `before`.
    pub(super) fn new(now: Instant, before: u64) -> Self {
        Self {
            batch: before,
            before,
            last_used: now,
            fresh: SlotBitmaps::new(),
            delivered: BTreeMap::new(),
        }
    }

    /// Number of the last batch, or of an earlier cursor's.
    pub(super) fn last_batch(&self) -> u64 {
        self.batch
    }

    /// Whether `batch` was an earlier cursor's: what it told of is not what this one owes.
    pub(super) fn is_from_before(&self, batch: u64) -> bool {
        (1..=self.before).contains(&batch)
    }

    /// Adds harvested pages of a slot.
    pub(super) fn add(&mut self, slot: u32, from: &DirtyBitmap) {
        self.fresh_mut(slot, from.pages()).unite(from);
    }

    /// Adds harvested pages of a slot, taking the bitmap. What comes back is not needed any more.
    pub(super) fn give(&mut self, slot: u32, from: DirtyBitmap) -> Option<DirtyBitmap> {
        match self.fresh.get_mut(&slot) {
            Some(fresh) => {
                fresh.unite(&from);
                Some(from)
            }
            None => self.fresh.insert(slot, from),
        }
    }

    /// Marks every page of a slot.
    pub(super) fn mark_all(&mut self, slot: u32, pages: u64) {
        self.fresh_mut(slot, pages).set(0, pages);
    }

    /// Marks pages `[first, first + len)` of a slot of `pages`.
    pub(super) fn mark(&mut self, slot: u32, pages: u64, first: u64, len: u64) {
        self.fresh_mut(slot, pages).set(first, len);
    }

    fn fresh_mut(&mut self, slot: u32, pages: u64) -> &mut DirtyBitmap {
        self.fresh
            .entry(slot)
            .or_insert_with(|| DirtyBitmap::new(pages))
    }

    /// The slot is gone, its pages with it.
    pub(super) fn forget(&mut self, slot: u32) {
        self.fresh.remove(&slot);
        self.delivered.remove(&slot);
    }

    /// Delivers all that is owed. What was delivered before and is now part of the new batch is
    /// retired.
    pub(super) fn deliver(&mut self, retired: &mut Vec<Retired>) -> DirtyBatch {
        self.settle(retired);
        self.batch(false)
    }

    /// Delivers at most `share` of what is owed, slot by slot in `order`; the rest stays fresh.
    pub(super) fn deliver_some(
        &mut self,
        order: &[u32],
        mut share: Share,
        retired: &mut Vec<Retired>,
    ) -> DirtyBatch {
        self.settle(retired);
        let mut more = false;
        for slot in order {
            let Some(delivered) = self.delivered.remove(slot) else {
                continue;
            };
            let Some(page) = share.cut(&delivered) else {
                self.delivered.insert(*slot, delivered);
                continue;
            };
            let mut delivered = Arc::try_unwrap(delivered).unwrap_or_else(|shared| {
                let mut own = DirtyBitmap::new(shared.pages());
                own.unite(&shared);
                own
            });
            more = true;
            self.fresh.insert(*slot, delivered.split_off(page));
            if !delivered.is_empty() {
                self.delivered.insert(*slot, Arc::new(delivered));
            }
        }
        self.batch(more)
    }

    /// Pages that wait to be delivered, and pages that were and are not acknowledged.
    pub(super) fn owed(&self) -> (u64, u64) {
        (
            self.fresh.values().map(DirtyBitmap::count).sum(),
            self.delivered.values().map(|bitmap| bitmap.count()).sum(),
        )
    }

    /// Number of its own last batch; 0 while there is none.
    pub(super) fn own_batch(&self) -> u64 {
        if self.batch > self.before {
            self.batch
        } else {
            0
        }
    }

    /// What is fresh counts as delivered, together with what was not acknowledged.
    fn settle(&mut self, retired: &mut Vec<Retired>) {
        for (slot, mut fresh) in std::mem::take(&mut self.fresh) {
            if let Some(before) = self.delivered.remove(&slot) {
                fresh.unite(&before);
                retired.push((slot, before));
            }
            self.delivered.insert(slot, Arc::new(fresh));
        }
    }

    fn batch(&mut self, more: bool) -> DirtyBatch {
        self.batch += 1;
        let shared = |(slot, bitmap): (&u32, &Arc<DirtyBitmap>)| (*slot, Arc::clone(bitmap));
        let slots: Vec<_> = self.delivered.iter().map(shared).collect();
        DirtyBatch {
            batch: self.batch,
            pages: slots.iter().map(|(_, bitmap)| bitmap.count()).sum(),
            slots,
            more,
        }
    }

    /// Forgets what the last batch delivered. Acknowledging it again has no effect.
    pub(super) fn acknowledge(
        &mut self,
        batch: u64,
        retired: &mut Vec<Retired>,
    ) -> Result<(), ApiError> {
        if batch == 0 || batch != self.batch {
            // An older batch is part of the newest one, mixed with pages written since: there is
            // nothing safe to forget.
            return Err(ApiError::new(
                Reason::BadParameter,
                format!(
                    "batch {batch} cannot be acknowledged: the last one delivered is {}",
                    self.batch
                ),
            )
            .with("field", "acknowledge_batch")
            .with("batch", batch)
            .with("last_batch", self.batch)
            .with("advice", "acknowledge the last batch, or 0 to get it again"));
        }
        retired.extend(std::mem::take(&mut self.delivered));
        Ok(())
    }
}
