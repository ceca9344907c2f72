//! Where huge mappings are forbidden, whatever alignment would allow.
//!
//! A count of reasons for each place, because reasons overlap (write tracking, memory whose
//! attributes differ): a mapping is allowed again when every reason is gone. The counterpart of
//! `lpage_info[level].disallow_lpage`; what follows from alignment alone is computed instead
//! ([`Memslot::allows_span`](super::Memslot::allows_span)), so an untouched slot needs no memory
//! for this.
//!
//! A reason is a range, and may be as long as the address space. So counts are kept by the places
//! where they change: memory and time depend on how many reasons there are, not on how long they
//! are.
//!
//! *Locking*: a lock of its own (`locks`), and a flag that spares faults the lock where nothing is
//! forbidden.
//!
//! *Invariant*: neighbouring counts differ, and the last count of a level is 0. So a level without
//! reasons has no counts.

use alloc::collections::BTreeMap;

use crate::{
    addr::{Gfn, GfnRange, Level, MAX_LEVELS},
    sync::{Acquire, AtomicBool, Mutex, Release},
};

/// Reasons by place: from each key on, up to the next, the count is the value. 0 before the first.
type Counts = BTreeMap<Gfn, u32>;

#[derive(Debug)]
pub(crate) struct HugePermission {
    any: AtomicBool,
    levels: Mutex<[Counts; MAX_LEVELS]>,
}

impl Default for HugePermission {
    fn default() -> Self {
        Self {
            any: AtomicBool::new(false),
            levels: Mutex::new(core::array::from_fn(|_| Counts::new())),
        }
    }
}

impl HugePermission {
    /// Whether a leaf of `level` that begins at `start` is not forbidden.
    #[inline(always)]
    pub(crate) fn allows(&self, level: Level, start: Gfn) -> bool {
        !self.any.load(Acquire) || count_at(&self.levels.lock()[level.index()], start) == 0
    }

    /// Forbids, once more, the leaves of `level` that begin in `places`.
    pub(crate) fn forbid(&self, level: Level, places: GfnRange) {
        self.change(level, places, |count| count.saturating_add(1));
    }

    /// Takes one reason back where there is one.
    pub(crate) fn allow(&self, level: Level, places: GfnRange) {
        self.change(level, places, |count| count.saturating_sub(1));
    }

    fn change(&self, level: Level, places: GfnRange, new: impl Fn(u32) -> u32) {
        if places.is_empty() {
            return;
        }
        let mut levels = self.levels.lock();
        let counts = &mut levels[level.index()];
        for edge in [places.start, places.end] {
            let count = count_at(counts, edge);
            counts.insert(edge, count);
        }
        for (_, count) in counts.range_mut(places.start..places.end) {
            *count = new(*count);
        }
        let mut before = 0;
        counts.retain(|_, count| core::mem::replace(&mut before, *count) != *count);
        let any = levels.iter().any(|counts| !counts.is_empty());
        self.any.store(any, Release);
    }
}

fn count_at(counts: &Counts, place: Gfn) -> u32 {
    let before = counts.range(..=place).next_back();
    before.map_or(0, |(_, count)| *count)
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    const LEVEL: Level = Level::SIZE_2M;

    fn places(first: u64, end: u64) -> GfnRange {
        GfnRange {
            start: Gfn(first * 512),
            end: Gfn(end * 512),
        }
    }

    impl HugePermission {
        fn allowed(&self, place: u64) -> bool {
            self.allows(LEVEL, Gfn(place * 512))
        }

        fn kept(&self) -> usize {
            self.levels.lock().iter().map(BTreeMap::len).sum()
        }
    }

    #[test]
    fn reasons_are_counted() {
        let huge = HugePermission::default();
        assert!(huge.allowed(1));
        huge.allow(LEVEL, places(1, 2));
        assert!(huge.allowed(1));
        huge.forbid(LEVEL, places(1, 2));
        huge.forbid(LEVEL, places(1, 2));
        huge.allow(LEVEL, places(1, 2));
        assert!(!huge.allowed(1), "one reason is left; the first was none");
        assert!(huge.allows(Level::SIZE_1G, Gfn(512)) && huge.allowed(2) && huge.allowed(0));
        huge.allow(LEVEL, places(1, 2));
        assert!(huge.allowed(1));
        assert_eq!(huge.kept(), 0);
    }

    #[test]
    fn reasons_overlap() {
        let huge = HugePermission::default();
        huge.forbid(LEVEL, places(0, 10));
        huge.forbid(LEVEL, places(5, 15));
        huge.allow(LEVEL, places(0, 10));
        let forbidden: alloc::vec::Vec<u64> =
            (0..20).filter(|&place| !huge.allowed(place)).collect();
        assert!(forbidden.iter().copied().eq(5..15), "{forbidden:?}");
        // More is taken back than there is.
        huge.allow(LEVEL, places(0, 20));
        assert!((0..20).all(|place| huge.allowed(place)));
        assert_eq!(huge.kept(), 0);
    }

    #[test]
    fn what_is_kept_does_not_grow_with_the_range() {
        let huge = HugePermission::default();
        huge.forbid(LEVEL, places(0, 1 << 40));
        assert!(!huge.allowed(1 << 39) && huge.allowed(1 << 40));
        assert_eq!(huge.kept(), 2);
        huge.forbid(LEVEL, places(3, 4));
        assert_eq!(huge.kept(), 4);
    }
}
