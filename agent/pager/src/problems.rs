//! What is wrong now: what failed and was not tried again, and reads that take too long.
//!
//! *Locking*: two locks, each held for a look; neither is held while the other is taken.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use slat_paging::wire::{Problem, ProblemKind};

use crate::{bell::Bell, error::Trouble, sync::lock};

/// See the module.
#[derive(Debug)]
pub(crate) struct Problems {
    failed: Mutex<Option<Trouble>>,
    /// How many there were.
    count: AtomicU64,
    /// Since when each loader reads, and what.
    reads: Mutex<Vec<Option<(Instant, String)>>>,
    /// A read that takes longer is stalled.
    bound: Duration,
}

impl Problems {
    pub(crate) fn new(loaders: usize, bound: Duration) -> Self {
        Self {
            failed: Mutex::default(),
            count: AtomicU64::new(0),
            reads: Mutex::new(vec![None; loaders]),
            bound,
        }
    }

    /// Something failed. Told at once.
    pub(crate) fn set(&self, trouble: Trouble, bell: &Bell) {
        let new = Some(&trouble) != lock(&self.failed).as_ref();
        if new {
            tracing::warn!(kind = ?trouble.kind, "{trouble}");
            *lock(&self.failed) = Some(trouble);
        }
        self.count.fetch_add(1, Ordering::Release);
        bell.ring();
    }

    /// What failed is tried again.
    pub(crate) fn clear(&self) {
        *lock(&self.failed) = None;
    }

    /// How often something failed so far.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    pub(crate) fn last(&self) -> Option<Trouble> {
        lock(&self.failed).clone()
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
