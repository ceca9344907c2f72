//! Digest of guest memory: equal exactly when (up to a 2^-128 accident) every page of every slot
//! is.
//!
//! A page's digest is XXH3-128 with the page's index in its slot as seed, so that swapped pages
//! show; a slot's is the sum of its pages' modulo 2^128, so that it can be built in any order and
//! in parallel. It finds lost, stale and misplaced pages; it is no defence against a forger.

use std::sync::atomic::{AtomicBool, Ordering};

use slat_proto::model::PAGE_SIZE;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::slots::{SlotMemory, SlotTable};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages read between two looks at whether to stop: about a millisecond.
const LOOK: u64 = 1024;

/// Digest of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotDigest {
    /// Slot number.
    pub slot: u32,
    /// Pages in it.
    pub pages: u64,
    /// The sum.
    pub digest: u128,
}

/// Digests of all slots, by slot number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryDigest {
    /// By slot number.
    pub slots: Vec<SlotDigest>,
}

/// Digest of a page's contents at index `page` of its slot.
#[must_use]
pub(crate) fn digest_page(page: u64, contents: &[u8]) -> u128 {
    xxh3_128_with_seed(contents, page)
}

/// Digest of a whole slot, read with `threads` threads. Meaningful only while nothing writes it,
/// and if `stop` was not set meanwhile.
fn digest_slot(memory: &SlotMemory, threads: usize, stop: &AtomicBool) -> SlotDigest {
    let pages = memory.spec().pages;
    let part = pages.div_ceil(threads.max(1) as u64).max(1);
    let digest = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..pages)
            .step_by(part as usize)
            .map(|first| {
                scope.spawn(move || {
                    let mut buffer = [0_u8; PAGE];
                    let goes_on =
                        |page: &u64| !page.is_multiple_of(LOOK) || !stop.load(Ordering::Relaxed);
                    let pages = (first..(first + part).min(pages)).take_while(goes_on);
                    pages.fold(0_u128, |sum, page| {
                        memory.read_page(page, &mut buffer);
                        sum.wrapping_add(digest_page(page, &buffer))
                    })
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("reading guest memory does not panic"))
            .fold(0_u128, u128::wrapping_add)
    });
    SlotDigest {
        slot: memory.spec().slot,
        pages,
        digest,
    }
}

impl MemoryDigest {
    /// Digest of every slot of `table`. Meaningful only while nothing writes memory.
    #[must_use]
    pub(crate) fn of(table: &SlotTable, threads: usize) -> Self {
        Self::compute(table, threads, &AtomicBool::new(false))
    }

    /// The same, unless `stop` is set before it is complete.
    #[must_use]
    pub(crate) fn unless(table: &SlotTable, threads: usize, stop: &AtomicBool) -> Option<Self> {
        let digest = Self::compute(table, threads, stop);
        (!stop.load(Ordering::Relaxed)).then_some(digest)
    }

    fn compute(table: &SlotTable, threads: usize, stop: &AtomicBool) -> Self {
        let mut slots: Vec<SlotDigest> = table
            .slots()
            .iter()
            .map(|slot| digest_slot(slot, threads, stop))
            .collect();
        slots.sort_by_key(|slot| slot.slot);
        Self { slots }
    }

    /// One number over all slots.
    #[must_use]
    pub(crate) fn total(&self) -> u128 {
        let mut bytes = Vec::with_capacity(self.slots.len() * 32);
        for slot in &self.slots {
            bytes.extend_from_slice(&slot.slot.to_le_bytes());
            bytes.extend_from_slice(&slot.pages.to_le_bytes());
            bytes.extend_from_slice(&slot.digest.to_le_bytes());
        }
        xxh3_128_with_seed(&bytes, 0)
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::SlotSpec;

    use super::*;

    fn digest_slot(slot: &SlotMemory, threads: usize) -> SlotDigest {
        super::digest_slot(slot, threads, &AtomicBool::new(false))
    }

    #[test]
    fn a_digest_that_is_stopped_is_none() {
        let slot = SlotMemory::new(SlotSpec::new(0, 0, 64, false).unwrap()).unwrap();
        let memory = crate::memory::GuestMemory::new();
        memory.publish(vec![std::sync::Arc::new(slot)]);
        let stop = AtomicBool::new(false);
        let whole = MemoryDigest::of(&memory.table(), 2);
        assert_eq!(MemoryDigest::unless(&memory.table(), 2, &stop), Some(whole));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(MemoryDigest::unless(&memory.table(), 2, &stop), None);
    }

    #[test]
    fn one_bit_a_swap_and_the_thread_count() {
        let slot = SlotMemory::new(SlotSpec::new(0, 0, 64, false).unwrap()).unwrap();
        slot.host().write(5 * PAGE, &[1]);
        slot.host().write(6 * PAGE, &[2]);
        let before = digest_slot(&slot, 1);
        assert_eq!(before, digest_slot(&slot, 3));
        slot.host().write(5 * PAGE, &[2]);
        slot.host().write(6 * PAGE, &[1]);
        assert_ne!(before, digest_slot(&slot, 1), "swapped pages must show");
        slot.host().write(5 * PAGE, &[1]);
        slot.host().write(6 * PAGE, &[2]);
        assert_eq!(before, digest_slot(&slot, 1));
        slot.host().write(63 * PAGE + 4095, &[1]);
        assert_ne!(before, digest_slot(&slot, 1), "one bit must show");
    }
}
