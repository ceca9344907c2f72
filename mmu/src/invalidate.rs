//! The invalidation sequence: how a fault notices that the host took memory back meanwhile.
//!
//! The counterpart of KVM's `mmu_invalidate_seq` (Documentation/virt/kvm/locking.rst). Who invalidates calls *begin*,
//! takes the memory away, then calls *end*. A fault that looked up its memory outside the lock passes the sequence
//! number it saw first, and is told to retry if
//!
//! - an invalidation that covers its frame is in progress, or
//! - one has ended since (the number changed).
//!
//! *Locking*: changed under the MMU's lock only; the number alone may be read without it.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{Gfn, GfnRange};

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

/// The number that says which invalidations a lookup has seen. 64 bits: it never wraps.
#[derive(Debug, Default)]
pub(crate) struct Sequence(AtomicU64);

impl Sequence {
    pub(crate) fn read(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn bump(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// The invalidations in progress.
#[derive(Debug, Default)]
pub(crate) struct InProgress {
    count: usize,
    /// The hull of all that began since the count was last 0.
    hull: GfnRange,
}

impl InProgress {
    pub(crate) fn begin(&mut self, range: GfnRange) -> Invalidation {
        self.hull = if self.count == 0 {
            range
        } else {
            self.hull.hull(range)
        };
        self.count += 1;
        Invalidation { range }
    }

    pub(crate) fn end(&mut self, _done: Invalidation, sequence: &Sequence) {
        // The number changes before the count falls, so a fault sees at least one of the two.
        sequence.bump();
        self.count = self.count.saturating_sub(1);
    }

    /// Whether a fault on `gfn`, which read `seen` before it looked up its memory, must retry.
    pub(crate) fn must_retry(&self, gfn: Gfn, seen: Option<u64>, sequence: &Sequence) -> bool {
        (self.count > 0 && self.hull.contains(gfn))
            || seen.is_some_and(|seen| seen != sequence.read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_inside_and_after_but_not_beside() {
        let (mut progress, sequence) = (InProgress::default(), Sequence::default());
        let seen = Some(sequence.read());
        let first = progress.begin(GfnRange::new(Gfn(10), 2));
        assert!(progress.must_retry(Gfn(11), None, &sequence));
        assert!(
            !progress.must_retry(Gfn(12), seen, &sequence),
            "the end is exclusive"
        );
        let second = progress.begin(GfnRange::new(Gfn(20), 1));
        assert!(
            progress.must_retry(Gfn(12), None, &sequence),
            "between two ranges is inside their hull"
        );
        progress.end(first, &sequence);
        assert!(progress.must_retry(Gfn(10), None, &sequence));
        progress.end(second, &sequence);
        assert!(!progress.must_retry(Gfn(10), None, &sequence));
        assert!(
            progress.must_retry(Gfn(99), seen, &sequence),
            "the number changed"
        );
        let third = progress.begin(GfnRange::new(Gfn(5), 1));
        assert!(
            !progress.must_retry(Gfn(10), None, &sequence),
            "the hull starts anew"
        );
        progress.end(third, &sequence);
    }
}
