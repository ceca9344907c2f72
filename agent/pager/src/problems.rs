//! What is wrong now: what failed and was not tried again, and reads that take too long.
//!
//! A failure is of the *try* in which it began: the queue counts how often somebody said to try
//! again. One that began before the last time says nothing, whenever it comes: what it is about is
//! being tried again.
//!
//! *Locking*: two locks, each held for a look; neither is held while the other is taken.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use slat_paging::wire::{Problem, ProblemKind};

use crate::{bell::Bell, error::Trouble, sync::lock};

/// See the module.
#[derive(Debug)]
pub(crate) struct Problems {
    failed: Mutex<Failed>,
    /// Since when each loader reads, and what.
    reads: Mutex<Vec<Option<(Instant, String)>>>,
    /// A read that takes longer is stalled.
    bound: Duration,
}

#[derive(Debug, Default)]
struct Failed {
    /// What, and in which try it began.
    last: Option<(Trouble, u64)>,
    /// The try that is under way.
    retries: u64,
    /// How many there were.
    count: u64,
}

impl Problems {
    pub(crate) fn new(loaders: usize, bound: Duration) -> Self {
        Self {
            failed: Mutex::default(),
            reads: Mutex::new(vec![None; loaders]),
            bound,
        }
    }

    /// Something failed that began when somebody had said so often to try again. Told at once,
    /// unless it is being tried again.
    pub(crate) fn set(&self, trouble: Trouble, began: u64, bell: &Bell) {
        {
            let mut failed = lock(&self.failed);
            if began < failed.retries {
                return;
            }
            let known = failed.last.as_ref().map(|(trouble, _)| trouble);
            if known != Some(&trouble) {
                tracing::warn!(kind = ?trouble.kind, "{trouble}");
            }
            failed.last = Some((trouble, began));
            failed.count += 1;
        }
        bell.ring();
    }

    /// What failed is tried again, so often by now. What was wrong is shown until that is over.
    pub(crate) fn retried(&self, retries: u64) {
        let mut failed = lock(&self.failed);
        failed.retries = failed.retries.max(retries);
    }

    /// As [`Problems::retried`], and what was wrong is thought to be mended.
    pub(crate) fn mended(&self, retries: u64) {
        self.retried(retries);
        let mut failed = lock(&self.failed);
        // What has failed since then stays.
        failed.last = failed.last.take().filter(|(_, began)| *began >= retries);
    }

    /// What was wrong is not any more, if nothing has failed since there were so many failures.
    pub(crate) fn went_away(&self, count: u64) {
        let mut failed = lock(&self.failed);
        if failed.count == count {
            failed.last = None;
        }
    }

    /// How often something failed so far.
    pub(crate) fn count(&self) -> u64 {
        lock(&self.failed).count
    }

    pub(crate) fn last(&self) -> Option<Trouble> {
        let failed = lock(&self.failed);
        failed.last.as_ref().map(|(trouble, _)| trouble.clone())
    }

    /// A loader begins to read.
    pub(crate) fn begin(&self, loader: usize, what: String) {
        lock(&self.reads)[loader] = Some((Instant::now(), what));
    }

    /// It has read.
    pub(crate) fn end(&self, loader: usize) {
        lock(&self.reads)[loader] = None;
    }

    /// A read that takes too long.
    pub(crate) fn stalled(&self) -> Option<Trouble> {
        let reads = lock(&self.reads);
        let slow = reads
            .iter()
            .flatten()
            .find(|(since, _)| since.elapsed() >= self.bound);
        let what = &slow?.1;
        let message = format!("{what}: not read after {:?}", self.bound);
        Some(Trouble::new(ProblemKind::SourceStalled, message))
    }

    /// How long to sleep at most so that a stall is noticed when it begins.
    pub(crate) fn next_look(&self) -> Option<Duration> {
        let reads = lock(&self.reads);
        let left = |(since, _): &(Instant, String)| self.bound.saturating_sub(since.elapsed());
        reads
            .iter()
            .flatten()
            .map(left)
            .filter(|left| !left.is_zero())
            .min()
    }

    /// What to tell.
    pub(crate) fn now(&self) -> Option<Problem> {
        let trouble = self.last().or_else(|| self.stalled());
        trouble.map(|trouble| trouble.problem())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(what: &str) -> Trouble {
        Trouble::new(ProblemKind::SourceCorrupt, what)
    }

    #[test]
    fn what_failed_before_it_was_tried_again_is_no_news() {
        let problems = Problems::new(1, Duration::from_secs(1));
        let bell = Bell::new().unwrap();
        problems.set(trouble("first"), 0, &bell);
        problems.mended(1);
        assert_eq!((problems.last(), problems.count()), (None, 1));
        // A read that had failed by then, and says so only now.
        problems.set(trouble("old"), 0, &bell);
        assert_eq!((problems.last(), problems.count()), (None, 1));
        problems.set(trouble("new"), 1, &bell);
        assert_eq!(problems.last(), Some(trouble("new")));
        // What failed in the new try stays when the word of it comes late.
        problems.mended(1);
        assert_eq!(problems.last(), Some(trouble("new")));
    }

    #[test]
    fn what_is_tried_again_by_itself_is_shown_until_it_is_over() {
        let problems = Problems::new(1, Duration::from_secs(1));
        let bell = Bell::new().unwrap();
        problems.set(trouble("first"), 0, &bell);
        problems.retried(1);
        assert_eq!(problems.last(), Some(trouble("first")));
        let count = problems.count();
        problems.set(trouble("second"), 1, &bell);
        // It was looked at before the second came.
        problems.went_away(count);
        assert_eq!(problems.last(), Some(trouble("second")));
        problems.went_away(problems.count());
        assert_eq!(problems.last(), None);
    }
}
