//! Made-up host frames: what the tables' entries point to.
//!
//! Each slot's mapping gets a range of frame numbers of its own, congruent to the slot's guest frames so that huge pages are
//! possible. Numbers are used again only after all others were, so that a translation kept too long leads nowhere instead
//! of into another slot.
//!
//! *Locking*: a read-write lock around the map of ranges, held for a look-up or a change and never across a call.
//! *Invariant*: ranges are disjoint; one goes only after the flush that took its translations.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::vm::memory::Mapping;

/// Frames of the largest page that is ever mapped, 1 GiB.
const GIANT: u64 = 1 << 18;
/// Frame numbers are in `[GIANT, END)`: no format holds fewer.
const END: u64 = 1 << 40;

#[derive(Debug, Default)]
struct Inner {
    ranges: BTreeMap<u64, Arc<Mapping>>,
    next: u64,
}

/// Frame number to mapping.
#[derive(Debug, Default)]
pub(super) struct Frames(RwLock<Inner>);

impl Frames {
    /// Numbers the mapping's pages, congruent to guest frames from `base_gfn` on. `None` when no range is free.
    pub(super) fn add(&self, mapping: &Arc<Mapping>, base_gfn: u64) -> Option<u64> {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let room = (base_gfn % GIANT + mapping.pages()).next_multiple_of(GIANT);
        let start = inner
            .free_from(inner.next.max(GIANT), room)
            .or_else(|| inner.free_from(GIANT, room))?;
        inner.next = start + room;
        let base = start + base_gfn % GIANT;
        inner.ranges.insert(base, Arc::clone(mapping));
        Some(base)
    }

    /// Takes a range's numbers away. Call it when no translation leads there any more.
    pub(super) fn remove(&self, base: u64) {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        inner.ranges.remove(&base);
    }

    /// The mapping a frame belongs to, and the page's index in it.
    pub(super) fn find(&self, frame: u64) -> Option<(Arc<Mapping>, u64)> {
        let inner = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (base, mapping) = inner.ranges.range(..=frame).next_back()?;
        let page = frame - base;
        (page < mapping.pages()).then(|| (Arc::clone(mapping), page))
    }
}

impl Inner {
    /// First multiple of [`GIANT`] at or after `from` with `room` free numbers.
    fn free_from(&self, from: u64, room: u64) -> Option<u64> {
        let mut start = from;
        let before = self.ranges.range(..from).next_back();
        for (base, mapping) in before.into_iter().chain(self.ranges.range(from..)) {
            if start + room <= *base {
                break;
            }
            start = start.max((base + mapping.pages()).next_multiple_of(GIANT));
        }
        (start + room <= END).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_congruent_disjoint_and_not_used_again_soon() {
        let frames = Frames::default();
        let mapping = || Arc::new(Mapping::new("test", 8).unwrap());
        let (one, two) = (mapping(), mapping());
        let first = frames.add(&one, 5 * GIANT + 77).unwrap();
        let second = frames.add(&two, 3).unwrap();
        assert_eq!((first % GIANT, second % GIANT), (77, 3));
        let (found, page) = frames.find(first + 7).unwrap();
        assert!(Arc::ptr_eq(&found, &one) && page == 7);
        assert!(frames.find(first + 8).is_none() && frames.find(first - 1).is_none());
        frames.remove(first);
        assert!(frames.find(first).is_none());
        assert!(frames.add(&one, 77).unwrap() > second);
    }

    #[test]
    fn when_all_numbers_were_used_the_free_ones_come_again() {
        let frames = Frames::default();
        let mapping = Arc::new(Mapping::new("test", 1).unwrap());
        let kept = frames.add(&mapping, 0).unwrap();
        frames.0.write().unwrap().next = END;
        let next = frames.add(&mapping, 0).unwrap();
        assert_eq!(next, kept + GIANT);
    }
}
