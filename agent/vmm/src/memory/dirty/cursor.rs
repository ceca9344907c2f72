//! One reader of the dirty log: what it has yet to be told, and what it was told but did not acknowledge.
//!
//! A page that is written is *fresh* for every cursor. A harvest delivers all fresh pages together with those delivered
//! before and not acknowledged; an acknowledgement of the last batch forgets what was delivered. A page written again after
//! its delivery is fresh again, so that acknowledging the old batch cannot lose it: the two sets are never mixed.

use std::{collections::BTreeMap, time::Instant};

use slat_proto::{ApiError, Reason};

use super::{DirtyBatch, SlotLog, bits};

/// Dirty bits by slot; a slot without an entry has none.
type SlotBits = BTreeMap<u32, Vec<u64>>;

/// One reader's state.
#[derive(Debug)]
pub(super) struct Cursor {
    batch: u64,
    pub(super) last_used: Instant,
    fresh: SlotBits,
    delivered: SlotBits,
}

impl Cursor {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            batch: 0,
            last_used: now,
            fresh: SlotBits::new(),
            delivered: SlotBits::new(),
        }
    }

    /// Merges harvested bits of a slot of `pages` pages.
    pub(super) fn merge(&mut self, slot: u32, pages: u64, from: &[u64]) {
        let to = self.fresh.entry(slot).or_insert_with(|| bits::empty(pages));
        bits::or(to, from);
    }

    /// Pages written by the process itself.
    pub(super) fn mark(&mut self, slot: u32, slot_pages: u64, first: u64, pages: u64) {
        let to = self
            .fresh
            .entry(slot)
            .or_insert_with(|| bits::empty(slot_pages));
        bits::set(to, first, pages);
    }

    /// The slot is gone, its pages with it.
    pub(super) fn forget(&mut self, slot: u32) {
        self.fresh.remove(&slot);
        self.delivered.remove(&slot);
    }

    /// Delivers what is owed, at most `max_runs` runs of pages in the order of the slots' frames; the rest stays fresh.
    pub(super) fn deliver(
        &mut self,
        slots: &BTreeMap<u32, SlotLog>,
        max_runs: usize,
    ) -> DirtyBatch {
        for (slot, fresh) in std::mem::take(&mut self.fresh) {
            match self.delivered.get_mut(&slot) {
                Some(delivered) => bits::or(delivered, &fresh),
                None => drop(self.delivered.insert(slot, fresh)),
            }
        }
        if max_runs != usize::MAX {
            self.give_back(slots, max_runs);
        }
        self.batch += 1;
        let slots: Vec<(u32, Vec<u64>)> = slots
            .iter()
            .map(|(slot, log)| match self.delivered.get(slot) {
                Some(delivered) => (*slot, delivered.clone()),
                None => (*slot, bits::empty(log.pages)),
            })
            .collect();
        DirtyBatch {
            batch: self.batch,
            pages: slots.iter().map(|(_, slot)| bits::count(slot)).sum(),
            slots,
        }
    }

    /// Makes everything after the first `max_runs` runs fresh again.
    fn give_back(&mut self, slots: &BTreeMap<u32, SlotLog>, max_runs: usize) {
        let mut order: Vec<(u64, u32, u64)> = slots
            .iter()
            .map(|(slot, log)| (log.base_gfn, *slot, log.pages))
            .collect();
        order.sort_unstable();
        let mut left = max_runs;
        for (_, slot, pages) in order {
            let Some(delivered) = self.delivered.get_mut(&slot) else {
                continue;
            };
            let mut kept = bits::empty(pages);
            let mut rest = bits::empty(pages);
            let mut any = false;
            for (first, len) in bits::runs(delivered) {
                if left > 0 {
                    left -= 1;
                    bits::set(&mut kept, first, len);
                } else {
                    any = true;
                    bits::set(&mut rest, first, len);
                }
            }
            if any {
                *delivered = kept;
                self.fresh.insert(slot, rest);
            }
        }
    }

    /// Forgets what the last batch delivered. Acknowledging it again has no effect.
    pub(super) fn acknowledge(&mut self, batch: u64) -> Result<(), ApiError> {
        if batch == 0 || batch != self.batch {
            // An older batch is part of the newest one, mixed with pages written since: there is nothing safe to forget.
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
        self.delivered.clear();
        Ok(())
    }
}
