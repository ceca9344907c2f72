//! The invalidation sequence: how a fault notices that the host took memory back meanwhile.
//!
//! The counterpart of KVM's `mmu_invalidate_seq` (Documentation/virt/kvm/locking.rst). Who
//! invalidates calls *begin*, takes the memory away, then calls *end*. A fault that looked up its
//! memory outside the lock hands in the sequence number it saw first, and is told to retry if
//!
//! - an invalidation that covers its frame is in progress, or
//! - one has ended since (the number changed).
//!
//! A range in progress is named by guest frames and by the token that begin gave; so slots may come
//! and go in between, and an end always finds its begin. A token carries the number of the MMU that
//! gave it and is spent by its end, so none is ended twice or elsewhere, and the count of what is
//! in progress never falls below what is.
//!
//! *Locking*: changed under the exclusive MMU lock, judged under the shared one; the same question
//! may be asked without a lock to give up early, and then its answer may be old. *Order at the
//! end*: first the number, then the count.

use thiserror::Error;

use crate::{
    addr::{Gfn, GfnRange},
    sync::{Acquire, AtomicU64, Relaxed, Release, Statistic},
};

/// MMUs made so far, of whatever format: what distinguishes their tokens. Nothing is ordered by it.
static MADE: Statistic = Statistic::new(0);

/// Proof that an invalidation has begun; hand it to
/// [`invalidate_end`](crate::SecondStage::invalidate_end) of the MMU that gave it. Until then,
/// faults in the range are told to retry.
///
/// A token that is dropped ends nothing: the invalidation stays in progress for as long as the MMU
/// lives. Whoever lost it may have died before all of the memory was taken, so the guest must not
/// get at it again; it is not mapped, and faults on it, and between it and whatever else is being
/// taken back, retry. Only the end, which says that the memory is gone or was replaced, lets them
/// through.
#[derive(Debug)]
#[must_use = "faults in the range retry until the invalidation has ended; dropping this does not end it"]
pub struct Invalidation {
    range: GfnRange,
    /// The number of the MMU that it is in progress at.
    mmu: u64,
}

impl Invalidation {
    /// The frames being invalidated.
    pub fn range(&self) -> GfnRange {
        self.range
    }
}

/// The invalidation was begun at another MMU. It is still in progress there, and nothing has
/// changed at either.
#[derive(Debug, Error)]
#[error(
    "the invalidation of {} frames from {} on was begun at another MMU",
    .0.range.pages(),
    .0.range.start
)]
pub struct ForeignInvalidation(Invalidation);

impl ForeignInvalidation {
    /// The token, to be ended where it was begun.
    pub fn into_token(self) -> Invalidation {
        self.0
    }
}

#[derive(Debug)]
pub(crate) struct Invalidations {
    /// This MMU's own; no other has it, before or after.
    mmu: u64,
    /// 64 bits: it never wraps, and must never be cut short (a truncated copy made guests hang
    /// after 2^31 invalidations).
    sequence: AtomicU64,
    in_progress: AtomicU64,
    /// The hull of all ranges that began since the count was last 0.
    start: AtomicU64,
    end: AtomicU64,
}

impl Invalidations {
    pub(crate) fn new() -> Self {
        Self {
            mmu: MADE.fetch_add(1, Relaxed),
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
        let mmu = self.mmu;
        Invalidation { range, mmu }
    }

    /// Under the exclusive lock. A token of another MMU comes back.
    pub(crate) fn end(&self, done: Invalidation) -> Result<(), ForeignInvalidation> {
        if done.mmu != self.mmu {
            return Err(ForeignInvalidation(done));
        }
        // The number changes before the count falls, so who reads them in the other order sees at
        // least one of the two.
        self.sequence.fetch_add(1, Release);
        self.in_progress.fetch_sub(1, Release);
        Ok(())
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
        progress.end(first).unwrap();
        assert!(progress.must_retry(Gfn(10), None));
        progress.end(second).unwrap();
        assert!(!progress.must_retry(Gfn(10), None));
        assert!(progress.must_retry(Gfn(99), seen), "the number changed");
        let third = progress.begin(GfnRange::new(Gfn(5), 1));
        assert!(!progress.must_retry(Gfn(10), None), "the hull starts anew");
        progress.end(third).unwrap();
    }

    #[test]
    fn a_token_ends_only_where_it_began() {
        let (one, other) = (Invalidations::new(), Invalidations::new());
        let range = GfnRange::new(Gfn(10), 2);
        let token = one.begin(range);
        let seen = other.sequence();
        let refused = other.end(token).unwrap_err();
        assert_eq!(
            std::string::ToString::to_string(&refused),
            "the invalidation of 2 frames from gfn 0xa on was begun at another MMU"
        );
        assert_eq!(other.in_progress.load(Relaxed), 0, "the count came round");
        assert_eq!(other.sequence(), seen);
        assert!(!other.must_retry(Gfn(10), Some(seen)));
        assert!(one.must_retry(Gfn(10), None), "still in progress");
        let token = refused.into_token();
        assert_eq!(token.range(), range);
        one.end(token).unwrap();
        assert!(!one.must_retry(Gfn(10), None));
    }

    #[test]
    fn a_foreign_token_ends_nothing_that_is_in_progress() {
        let (one, other) = (Invalidations::new(), Invalidations::new());
        let range = GfnRange::new(Gfn(10), 2);
        let (theirs, ours) = (one.begin(range), other.begin(range));
        let theirs = other.end(theirs).unwrap_err().into_token();
        assert!(other.must_retry(Gfn(10), None));
        other.end(ours).unwrap();
        assert!(!other.must_retry(Gfn(10), None));
        one.end(theirs).unwrap();
    }

    #[test]
    fn a_dropped_token_ends_nothing() {
        let progress = Invalidations::new();
        drop(progress.begin(GfnRange::new(Gfn(10), 2)));
        assert!(progress.must_retry(Gfn(10), None));
        let other = progress.begin(GfnRange::new(Gfn(20), 1));
        progress.end(other).unwrap();
        assert!(progress.must_retry(Gfn(11), None), "nor does another's end");
        assert!(!progress.must_retry(Gfn(9), None));
    }

    #[test]
    fn a_lookup_older_than_2_to_the_32_invalidations_is_still_told_apart() {
        let progress = Invalidations::new();
        let seen = Some(progress.sequence());
        progress.sequence.store(1 << 32, Relaxed);
        assert!(progress.must_retry(Gfn(0), seen));
    }
}
