//! A random sample of guest memory, hashed at several times: how much of it changed, without any
//! dirty logging.
//!
//! Memory is cut into as many equal parts as the sample has pages, and one page of each part is
//! chosen at random: so no pattern of the guest's hides from it, and the spread is less than of
//! pages chosen anywhere. Pages that are nowhere yet count as zero and stay nowhere, but for
//! reserved ones: those come to be. What the guest writes while a page is hashed shows as a change,
//! which it is.
//!
//! A page that was written with what it held is not found.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    sync::Arc,
};

use slat_proto::model::PAGE_SIZE;

use super::{
    digest::digest_page,
    slots::{SlotMemory, SlotTable},
};

/// Most pages in a sample.
const MOST: u64 = 1 << 16;

/// Pages and their contents at each look.
#[derive(Debug)]
pub(crate) struct Sample {
    pages: Vec<(Arc<SlotMemory>, u64)>,
    /// Of all memory.
    total: u64,
    looks: Vec<Vec<u128>>,
}

/// What a sample says of all memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Changed {
    /// Pages that changed between the first and the second look, the second and the third, in
    /// both, and in either.
    pub(crate) first: u64,
    pub(crate) second: u64,
    pub(crate) both: u64,
    pub(crate) either: u64,
    /// Pages of memory for each page of the sample.
    pub(crate) scale: f64,
}

impl Sample {
    /// Chooses pages, so many for each GiB, at least one.
    pub(crate) fn choose(table: &SlotTable, per_gib: u32) -> Self {
        let total = table.pages();
        let gib = (1_u64 << 30) / PAGE_SIZE;
        let wanted = (total.saturating_mul(per_gib.into()) / gib)
            .clamp(1, MOST)
            .min(total);
        let mut random = Random::new();
        let mut pages = Vec::with_capacity(wanted as usize);
        let mut slots = table.slots().iter();
        // `before` pages are in the slots before `slot`.
        let (mut slot, mut before) = (slots.next(), 0);
        for part in 0..wanted {
            // At most 2^40 pages and 2^16 parts.
            let (from, to) = (part * total / wanted, (part + 1) * total / wanted);
            let page = from + random.below(to - from);
            while let Some(memory) = slot {
                if page - before < memory.spec().pages {
                    pages.push((Arc::clone(memory), page - before));
                    break;
                }
                before += memory.spec().pages;
                slot = slots.next();
            }
        }
        Self {
            pages,
            total,
            looks: Vec::new(),
        }
    }

    /// Pages in the sample.
    pub(crate) fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Hashes them once more.
    pub(crate) fn look(&mut self) {
        let mut contents = [0; PAGE_SIZE as usize];
        let hashes = self.pages.iter().map(|(memory, page)| {
            if memory.has_page(*page) {
                memory.read_page(*page, &mut contents);
            } else {
                contents.fill(0);
            }
            digest_page(*page, &contents)
        });
        let hashes = hashes.collect();
        self.looks.push(hashes);
    }

    /// What three looks say. Without them, nothing changed.
    pub(crate) fn changed(&self) -> Changed {
        let mut changed = Changed {
            first: 0,
            second: 0,
            both: 0,
            either: 0,
            scale: self.total as f64 / self.pages.len().max(1) as f64,
        };
        let [one, two, three] = self.looks.as_slice() else {
            return changed;
        };
        for ((one, two), three) in one.iter().zip(two).zip(three) {
            let (first, second) = (one != two, two != three);
            changed.first += u64::from(first);
            changed.second += u64::from(second);
            changed.both += u64::from(first && second);
            changed.either += u64::from(first || second);
        }
        changed
    }
}

/// SplitMix64 from a seed that differs each time.
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }

    /// Below `bound`, which is not 0. Even enough for bounds far below 2^64.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::SlotSpec;

    use super::*;
    use crate::memory::GuestMemory;

    fn memory(slots: &[(u32, u64, u64)]) -> Arc<SlotTable> {
        let memory = GuestMemory::new();
        let slots = slots.iter().map(|(slot, base, pages)| {
            let spec = SlotSpec::new(*slot, *base, *pages, false).unwrap();
            Arc::new(SlotMemory::new(spec).unwrap())
        });
        memory.publish(slots.collect());
        memory.table()
    }

    #[test]
    fn a_page_of_each_part_is_chosen_and_all_where_all_are_asked_for() {
        let table = memory(&[(0, 0, 3 << 18), (1, 1 << 20, 1 << 18)]);
        let sample = Sample::choose(&table, 512);
        assert_eq!(sample.len(), 2048);
        let places: Vec<u64> = sample
            .pages
            .iter()
            .map(|(memory, page)| {
                let second = memory.spec().slot == 1;
                page + if second { 3 << 18 } else { 0 }
            })
            .collect();
        for (part, place) in places.iter().enumerate() {
            assert_eq!(place / 512, part as u64, "page {place}");
        }
        let small = memory(&[(0, 0, 64)]);
        assert_eq!(Sample::choose(&small, 16).len(), 1);
    }

    #[test]
    fn what_changed_between_looks_is_counted_and_nothing_is_populated() {
        let table = memory(&[(0, 0, 1 << 14)]);
        let slot = &table.slots()[0];
        // Each of the 16,384 pages of a GiB's share: all of them.
        let mut sample = Sample::choose(&table, 1 << 18);
        assert_eq!(sample.len(), 1 << 14);
        let write = |pages: std::ops::Range<u64>, word: u64| {
            for page in pages {
                slot.host().store((page * PAGE_SIZE) as usize, word);
            }
        };
        sample.look();
        assert!(!slot.has_page(5000), "hashing makes no page");
        write(0..1000, 1);
        sample.look();
        write(500..2000, 2);
        // Written with what they hold.
        write(3000..4000, 0);
        sample.look();
        let changed = sample.changed();
        assert_eq!((changed.first, changed.second), (1000, 1500));
        assert_eq!((changed.both, changed.either), (500, 2000));
        assert!((changed.scale - 1.0).abs() < 1e-9);
    }
}
