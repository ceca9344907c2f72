//! Huge pages for memory that the guest touched by itself: made afterwards, a little at a time.
//!
//! A guest that touches a page for the first time gets a page of 4 KiB. Blocks of 2 MiB of which
//! some page is there are made one page in passes over the slots. A pass takes at most a twentieth
//! of one processor's time: each step works for [`STEP`], or one block if that takes longer, and
//! then rests for nineteen times as long. What the kernel refuses is left for the next pass, which
//! begins [`BETWEEN`] after the end of the last.
//!
//! In mode `thp` nothing is made: a pass sees which blocks the kernel maps by one page, which costs
//! little, and begins [`BETWEEN_LOOKS`] after the last. Modes whose pages do not change are passed
//! over.
//!
//! A block takes up 2 MiB from then on, however few of its pages were touched; all of a VM's memory
//! is reserved for it anyway.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::model::MemoryBacking;

use super::{
    huge::BLOCK,
    slots::{SlotMemory, SlotTable},
};

const STEP: Duration = Duration::from_millis(20);
const REST: u32 = 19;
const BETWEEN: Duration = Duration::from_secs(10);
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

/// Where the pass is.
#[derive(Debug)]
pub(crate) struct Collapser {
    not_before: Instant,
    /// The slot and its block that are next.
    at: (u32, u64),
}

impl Default for Collapser {
    fn default() -> Self {
        Self {
            not_before: Instant::now(),
            at: (0, 0),
        }
    }
}

impl Collapser {
    /// Goes on for a step, if it is time.
    pub(crate) fn step(&mut self, table: &SlotTable) {
        let begun = Instant::now();
        if begun < self.not_before {
            return;
        }
        let ended = self.pass(table, begun);
        let rest = begun.elapsed() * REST;
        let looks = |slot: &Arc<SlotMemory>| slot.region().mode().backing == MemoryBacking::Thp;
        let pause = match ended {
            false => rest,
            true if table.slots().iter().any(looks) => rest.max(BETWEEN_LOOKS),
            true => rest.max(BETWEEN),
        };
        self.not_before = Instant::now() + pause;
    }

    /// Whether the pass has come to its end.
    fn pass(&mut self, table: &SlotTable, begun: Instant) -> bool {
        let mut slots: Vec<_> = table.slots().iter().collect();
        slots.sort_by_key(|slot| slot.spec().slot);
        let (slot_due, block_due) = self.at;
        for slot in slots.iter().filter(|slot| slot.spec().slot >= slot_due) {
            let number = slot.spec().slot;
            let first = if number == slot_due { block_due } else { 0 };
            for block in first..slot.spec().pages / BLOCK {
                if begun.elapsed() >= STEP {
                    self.at = (number, block);
                    return false;
                }
                slot.region().tidy(block);
            }
        }
        self.at = (0, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slat_proto::model::SlotSpec;

    use super::*;
    use crate::memory::{GuestMemory, SlotMemory, huge::BLOCK_BYTES, view::mapped_huge};

    #[test]
    fn what_was_touched_becomes_huge_and_keeps_its_contents() {
        let memory = GuestMemory::new();
        let spec = SlotSpec::new(3, 0, 4 * BLOCK + 7, false).unwrap();
        memory.publish(vec![Arc::new(SlotMemory::new(spec).unwrap())]);
        let table = memory.table();
        assert!(table.store(BLOCK_BYTES + 4096, 7));
        assert!(table.store(3 * BLOCK_BYTES + 8, 9));
        let mut collapser = Collapser::default();
        let begun = Instant::now();
        while !collapser.pass(&table, Instant::now()) {
            assert!(begun.elapsed() < Duration::from_secs(30));
        }
        assert_eq!(table.load(BLOCK_BYTES + 4096), Some(7));
        assert_eq!(table.load(3 * BLOCK_BYTES + 8), Some(9));
        // Two at most: the others hold nothing. The kernel may have had none to give.
        assert!(table.huge_bytes() <= 2 * BLOCK_BYTES);
        let slot = &table.slots()[0];
        let host = slot.host().range_ptr(0, 1).addr() as u64;
        for view in [slot.guest().address(), host] {
            assert_eq!(mapped_huge(view), table.huge_bytes(), "as the kernel says");
        }
        if table.huge_bytes() == 0 {
            eprintln!("SKIPPED: the kernel gave no huge page");
        }
    }

    #[test]
    fn it_rests_nineteen_times_as_long_as_it_works() {
        let memory = GuestMemory::new();
        let mut collapser = Collapser::default();
        collapser.step(&memory.table());
        let rest = collapser.not_before.duration_since(Instant::now());
        assert!(rest > BETWEEN / 2, "a pass that found nothing: {rest:?}");
        let before = collapser.not_before;
        collapser.step(&memory.table());
        assert_eq!(collapser.not_before, before);
    }
}
