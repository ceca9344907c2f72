//! One participant's mark, and the counters that it alone writes.
//!
//! *Locking*: the mark and the counters are written by the owner alone and read by anyone. Who the
//! owner is, is settled by `participants`: a vCPU for its whole life, a thread for one operation.

use crate::{
    addr::MAX_LEVELS,
    sync::{AtomicU64, Relaxed, Release, Statistic, announce},
};

const STATE: u64 = 3;
const IDLE: u64 = 0;
const PINNED: u64 = 1;
const SHARED: u64 = 2;
const ERA_SHIFT: u32 = 2;

/// What a participant counts. See [`MmuStats`](crate::MmuStats) for the meanings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    Fixed,
    Prefetched,
    Spurious,
    Retried,
    Emulated,
    Failed,
    Fast,
    Mmio,
    Splits,
    Recovered,
    NxSplits,
    Yields,
}

impl Counter {
    pub(crate) const COUNT: usize = Self::Yields as usize + 1;
}

/// See the module. Two cache lines, because processors fetch lines in pairs.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Cell {
    mark: AtomicU64,
    counters: [Statistic; Counter::COUNT],
    /// Leaves installed minus leaves removed by this participant, by level, as two's complement.
    pages: [Statistic; MAX_LEVELS],
    /// Whose participant this is: for assertions.
    participants: usize,
    /// Whether the owner is inside: for assertions. Beside the mark, so that a model need not try
    /// one access more.
    inside: Statistic,
}

impl Cell {
    pub(crate) fn new(participants: usize) -> Self {
        Self {
            mark: AtomicU64::new(IDLE),
            counters: core::array::from_fn(|_| Statistic::new(0)),
            pages: core::array::from_fn(|_| Statistic::new(0)),
            participants,
            inside: Statistic::new(0),
        }
    }

    #[inline(always)]
    pub(super) fn is_of(&self, participants: usize) -> bool {
        self.participants == participants
    }

    /// Going inside does not nest: the inner end would take back the mark of the outer one, and
    /// what the outer one still looks at could be freed.
    #[inline(always)]
    fn assert_outside(&self) {
        if cfg!(debug_assertions) {
            let before = self.inside.swap(1, Relaxed);
            assert_eq!(before, 0, "this participant is inside already");
        }
    }

    #[inline(always)]
    pub(super) fn pin(&self, era: u64) {
        self.assert_outside();
        announce(&self.mark, era << ERA_SHIFT | PINNED);
    }

    #[inline(always)]
    pub(super) fn share(&self, era: u64) {
        self.assert_outside();
        announce(&self.mark, era << ERA_SHIFT | SHARED);
    }

    /// Everything done so far happens before whoever sees the participant idle.
    #[inline(always)]
    pub(super) fn leave(&self) {
        if cfg!(debug_assertions) {
            self.inside.store(0, Relaxed);
        }
        self.mark.store(IDLE, Release);
    }

    pub(super) fn is_shared(&self) -> bool {
        self.mark.load(crate::sync::Acquire) & STATE == SHARED
    }

    /// Whether the participant is inside since `era` or longer.
    pub(super) fn is_inside_since(&self, era: u64) -> bool {
        let mark = self.mark.load(crate::sync::Acquire);
        mark & STATE != IDLE && mark >> ERA_SHIFT <= era
    }

    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn is_idle(&self) -> bool {
        self.mark.load(crate::sync::Acquire) & STATE == IDLE
    }

    #[inline(always)]
    pub(crate) fn count(&self, counter: Counter, by: u64) {
        let counter = &self.counters[counter as usize];
        // Not an atomic addition: nobody else writes here.
        counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
    }

    #[inline(always)]
    pub(crate) fn add_pages(&self, slot: usize, by: i64) {
        let pages = &self.pages[slot];
        pages.store(pages.load(Relaxed).wrapping_add(by as u64), Relaxed);
    }

    pub(crate) fn counted(&self, counter: Counter) -> u64 {
        self.counters[counter as usize].load(Relaxed)
    }

    pub(crate) fn pages(&self, slot: usize) -> u64 {
        self.pages[slot].load(Relaxed)
    }
}
