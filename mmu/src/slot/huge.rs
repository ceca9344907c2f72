//! Where huge mappings are forbidden, whatever alignment would allow.
//!
//! A count for each place, because reasons overlap (write tracking, memory whose attributes differ): a mapping is allowed
//! again when every reason is gone. The counterpart of `lpage_info[level].disallow_lpage`; what follows from alignment alone is
//! computed instead ([`Slot::allows_span`](super::Slot::allows_span)), so an untouched slot needs no memory for this.
//!
//! *Locking*: a lock of its own, below all others, and a flag that spares faults the lock where nothing is forbidden.

use alloc::collections::BTreeMap;

use crate::{
    addr::{Gfn, Level},
    sync::{Acquire, AtomicBool, Mutex, Release},
};

#[derive(Debug)]
pub(crate) struct HugePermission {
    any: AtomicBool,
    counts: Mutex<BTreeMap<(Level, u64), u32>>,
}

impl Default for HugePermission {
    fn default() -> Self {
        Self {
            any: AtomicBool::new(false),
            counts: Mutex::new(BTreeMap::new()),
        }
    }
}

impl HugePermission {
    /// Whether a leaf of `level` that begins at `start` is not forbidden.
    #[inline(always)]
    pub(crate) fn allows(&self, level: Level, start: Gfn) -> bool {
        !self.any.load(Acquire) || !self.counts.lock().contains_key(&(level, start.0))
    }

    /// Forbids, once more, the leaf of `level` that begins at `start`.
    pub(crate) fn forbid(&self, level: Level, start: Gfn) {
        let mut counts = self.counts.lock();
        *counts.entry((level, start.0)).or_insert(0) += 1;
        self.any.store(true, Release);
    }

    /// Takes one reason back; false if there was none.
    pub(crate) fn allow(&self, level: Level, start: Gfn) -> bool {
        let mut counts = self.counts.lock();
        let Some(count) = counts.get_mut(&(level, start.0)) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            counts.remove(&(level, start.0));
        }
        self.any.store(!counts.is_empty(), Release);
        true
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted() {
        let huge = HugePermission::default();
        let place = (Level::SIZE_2M, Gfn(512));
        assert!(huge.allows(place.0, place.1));
        assert!(!huge.allow(place.0, place.1), "never negative");
        huge.forbid(place.0, place.1);
        huge.forbid(place.0, place.1);
        assert!(huge.allow(place.0, place.1));
        assert!(!huge.allows(place.0, place.1), "one reason is left");
        assert!(huge.allows(Level::SIZE_1G, place.1) && huge.allows(place.0, Gfn(1024)));
        assert!(huge.allow(place.0, place.1));
        assert!(huge.allows(place.0, place.1));
    }
}
