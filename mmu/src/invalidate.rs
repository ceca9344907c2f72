//! The invalidation sequence: how a fault notices that the host took memory back meanwhile.
//!
//! The counterpart of KVM's `mmu_invalidate_seq` (Documentation/virt/kvm/locking.rst). Who invalidates calls *begin*,
//! takes the memory away, then calls *end*. A fault that looked up its memory outside the lock passes the sequence
//! number it saw first, and is told to retry if
//!
//! - an invalidation that covers its frame is in progress, or
//! - one has ended since (the number changed).
//!
//! A range in progress is named by guest frames and by the token that begin gave; so slots may come and go in between, and
//! an end always finds its begin.
//!
//! *Locking*: changed under the exclusive MMU lock, judged under the shared one; the same question may be asked without a
//! lock to give up early, and then its answer may be old. *Order at the end*: first the number, then the count.

use crate::{
    addr::{Gfn, GfnRange},
    sync::{Acquire, AtomicU64, Relaxed, Release},
};

/// Proof that an invalidation has begun; hand it to
/// [`invalidate_end`](crate::SecondStage::invalidate_end). Until then, faults in the range are told to retry.
#[derive(Debug)]
#[must_use = "faults in the range retry until the invalidation has ended"]
pub struct Invalidation {
    range: GfnRange,
}

impl Invalidation {
    /// The frames being invalidated.
    pub fn range(&self) -> GfnRange {
        self.range
    }
}

#[derive(Debug)]
pub(crate) struct Invalidations {
    /// 64 bits: it never wraps, and must never be cut short (a truncated copy made guests hang after 2^31 invalidations).
    sequence: AtomicU64,
    in_progress: AtomicU64,
    /// The hull of all ranges that began since the count was last 0.
    start: AtomicU64,
    end: AtomicU64,
}

impl Invalidations {
    pub(crate) fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            in_progress: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        }
    }

    #[inline(always)]
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence.load(Acquire)
    }

    /// Under the exclusive lock.
    pub(crate) fn begin(&self, range: GfnRange) -> Invalidation {
        let hull = match self.in_progress.load(Relaxed) {
            0 => range,
            _ => GfnRange {
                start: Gfn(self.start.load(Relaxed)),
                end: Gfn(self.end.load(Relaxed)),
            }
            .hull(range),
        };
        self.start.store(hull.start.0, Relaxed);
        self.end.store(hull.end.0, Relaxed);
        self.in_progress.fetch_add(1, Release);
        Invalidation { range }
    }

    /// Under the exclusive lock.
    pub(crate) fn end(&self, done: Invalidation) {
        let _ = done;
        // The number changes before the count falls, so who reads them in the other order sees at least one of the two.
        self.sequence.fetch_add(1, Release);
        self.in_progress.fetch_sub(1, Release);
    }

    /// Something else made earlier lookups worthless (a slot went).
    pub(crate) fn bump(&self) {
        self.sequence.fetch_add(1, Release);
    }

    /// Whether an invalidation in progress may concern a frame of `span`.
    pub(crate) fn overlaps(&self, span: GfnRange) -> bool {
        self.in_progress.load(Acquire) > 0
            && GfnRange {
                start: Gfn(self.start.load(Relaxed)),
                end: Gfn(self.end.load(Relaxed)),
            }
            .overlaps(span)
    }

    /// Whether a fault on `gfn`, which read `seen` before it looked up its memory, must retry.
    #[inline(always)]
    pub(crate) fn must_retry(&self, gfn: Gfn, seen: Option<u64>) -> bool {
        if self.in_progress.load(Acquire) > 0 {
            let hull = GfnRange {
                start: Gfn(self.start.load(Relaxed)),
                end: Gfn(self.end.load(Relaxed)),
            };
            if hull.contains(gfn) {
                return true;
            }
        }
        seen.is_some_and(|seen| seen != self.sequence())
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn retries_inside_and_after_but_not_beside() {
        let progress = Invalidations::new();
        let seen = Some(progress.sequence());
        let first = progress.begin(GfnRange::new(Gfn(10), 2));
        assert!(progress.must_retry(Gfn(11), None));
        assert!(!progress.must_retry(Gfn(12), seen), "the end is exclusive");
        let second = progress.begin(GfnRange::new(Gfn(20), 1));
        assert!(
            progress.must_retry(Gfn(12), None),
            "between two ranges is inside their hull"
        );
        progress.end(first);
        assert!(progress.must_retry(Gfn(10), None));
        progress.end(second);
        assert!(!progress.must_retry(Gfn(10), None));
        assert!(progress.must_retry(Gfn(99), seen), "the number changed");
        let third = progress.begin(GfnRange::new(Gfn(5), 1));
        assert!(!progress.must_retry(Gfn(10), None), "the hull starts anew");
        progress.end(third);
    }

    #[test]
    fn a_lookup_older_than_2_to_the_32_invalidations_is_still_told_apart() {
        let progress = Invalidations::new();
        let seen = Some(progress.sequence());
        progress.sequence.store(1 << 32, Relaxed);
        assert!(progress.must_retry(Gfn(0), seen));
    }
}
