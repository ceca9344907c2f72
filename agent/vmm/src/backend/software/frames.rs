//! Made-up host frames: what the tables' entries point to.
//!
//! Each slot's mapping gets a range of frame numbers of its own, congruent to the slot's guest
//! frames so that huge pages are possible. Numbers are used again only after all others were, so
//! that a translation kept too long leads nowhere instead of into another slot.
//!
//! Each vCPU has a *view*: its own copy of the map, which hands out its own leases on the mappings.
//! So vCPUs share no lock and no reference count: two that miss at the same time write no common
//! cache line.
//!
//! *Locking*: `numbers` serialises changes; below it each view's lock in turn, which its vCPU takes
//! for a look-up. None is held across a call. *Invariants*: ranges are disjoint; views differ only
//! while a change is under way, before the range's first translation or after its last; a range
//! goes only after the flush that took its translations.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::memory::GuestView;

/// Frames of the largest page that is ever mapped, 1 GiB.
const GIANT: u64 = 1 << 18;
/// Frame numbers are in `[GIANT, END)`: no format holds fewer.
const END: u64 = 1 << 40;

/// A vCPU's hold on a mapping.
#[derive(Debug)]
pub(super) struct Lease(Arc<GuestView>);

impl std::ops::Deref for Lease {
    type Target = GuestView;

    fn deref(&self) -> &GuestView {
        &self.0
    }
}

/// What one vCPU sees.
#[derive(Debug, Default)]
#[repr(align(128))] // no false sharing between vCPUs
pub(super) struct FrameView(Mutex<BTreeMap<u64, Arc<Lease>>>);

impl FrameView {
    fn ranges(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Lease>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mapping a frame belongs to, and the page's index in it.
    pub(super) fn find(&self, frame: u64) -> Option<(Arc<Lease>, u64)> {
        let ranges = self.ranges();
        let (base, lease) = ranges.range(..=frame).next_back()?;
        let page = frame - base;
        (page < lease.pages()).then(|| (Arc::clone(lease), page))
    }
}

/// Which numbers are whose.
#[derive(Debug, Default)]
pub(super) struct Inner {
    /// Pages of each range, by its first number.
    ranges: BTreeMap<u64, u64>,
    next: u64,
}

/// Frame number to mapping.
#[derive(Debug)]
pub(super) struct Frames {
    numbers: Mutex<Inner>,
    views: Vec<Arc<FrameView>>,
}

impl Frames {
    /// With a view for each vCPU.
    pub(super) fn new(vcpus: u32) -> Self {
        Self {
            numbers: Mutex::default(),
            views: (0..vcpus).map(|_| Arc::default()).collect(),
        }
    }

    /// The lock that serialises changes.
    pub(super) fn numbers(&self) -> MutexGuard<'_, Inner> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The view of a vCPU.
    pub(super) fn view(&self, vcpu: usize) -> Arc<FrameView> {
        Arc::clone(&self.views[vcpu])
    }

    /// Numbers the mapping's pages, congruent to guest frames from `base_gfn` on. `None` when no
    /// range is free.
    pub(super) fn add(&self, mapping: &Arc<GuestView>, base_gfn: u64) -> Option<u64> {
        let mut inner = self.numbers();
        let span = (base_gfn % GIANT + mapping.pages()).next_multiple_of(GIANT);
        let start = inner
            .free_from(inner.next.max(GIANT), span)
            .or_else(|| inner.free_from(GIANT, span))?;
        inner.next = start + span;
        let base = start + base_gfn % GIANT;
        inner.ranges.insert(base, mapping.pages());
        for view in &self.views {
            let lease = Arc::new(Lease(Arc::clone(mapping)));
            view.ranges().insert(base, lease);
        }
        Some(base)
    }

    /// Takes a range's numbers away. Call it when no translation leads there any more.
    pub(super) fn remove(&self, base: u64) {
        let mut inner = self.numbers();
        for view in &self.views {
            view.ranges().remove(&base);
        }
        inner.ranges.remove(&base);
    }
}

impl Inner {
    /// First multiple of [`GIANT`] at or after `from` with `span` free numbers.
    fn free_from(&self, from: u64, span: u64) -> Option<u64> {
        let mut start = from;
        let before = self.ranges.range(..from).next_back();
        for (base, pages) in before.into_iter().chain(self.ranges.range(from..)) {
            if start + span <= *base {
                break;
            }
            start = start.max((base + pages).next_multiple_of(GIANT));
        }
        (start + span <= END).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    fn view(pages: u64) -> Arc<GuestView> {
        Arc::clone(Region::new("test", pages).unwrap().guest())
    }

    #[test]
    fn ranges_are_congruent_disjoint_and_not_used_again_soon() {
        let frames = Frames::new(2);
        let (first_cpu, other) = (frames.view(0), frames.view(1));
        let (one, two) = (view(8), view(8));
        let first = frames.add(&one, 5 * GIANT + 77).unwrap();
        let second = frames.add(&two, 3).unwrap();
        assert_eq!((first % GIANT, second % GIANT), (77, 3));
        let (found, page) = first_cpu.find(first + 7).unwrap();
        assert!(Arc::ptr_eq(&found.0, &one) && page == 7);
        let (same, _) = other.find(first).unwrap();
        assert!(Arc::ptr_eq(&same.0, &one) && !Arc::ptr_eq(&same, &found));
        assert!(first_cpu.find(first + 8).is_none() && first_cpu.find(first - 1).is_none());
        frames.remove(first);
        assert!(first_cpu.find(first).is_none() && other.find(first).is_none());
        drop((found, same));
        assert_eq!(Arc::strong_count(&one), 1, "no view holds it any more");
        assert!(frames.add(&one, 77).unwrap() > second);
    }

    #[test]
    fn when_all_numbers_were_used_the_free_ones_come_again() {
        let frames = Frames::new(0);
        let mapping = view(1);
        let kept = frames.add(&mapping, 0).unwrap();
        frames.numbers().next = END;
        let next = frames.add(&mapping, 0).unwrap();
        assert_eq!(next, kept + GIANT);
    }
}
