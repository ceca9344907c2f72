//! What happens by itself: the state is told when it has changed, leases are looked after, and what
//! failed for want of memory is tried again.
//!
//! The state goes out at most every [`PACE`]; a problem that comes or goes is told at once. It goes
//! out unchanged as well, after [`ALIVE`]: a pager that says nothing is taken for frozen.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slat_mmu::MAX_LEVELS;
use slat_paging::wire::{FromPager, Load, PagerState, ProblemKind};

use crate::{
    shared::Shared,
    sync::{lock, read},
};

/// Between two states.
const PACE: Duration = Duration::from_millis(250);
/// A word at least so often. The VM process gives a silent pager up after some of these.
const ALIVE: Duration = Duration::from_secs(1);
/// After which memory may have become free.
const AGAIN: Duration = Duration::from_secs(1);

/// The ticker's thread.
pub(crate) fn tick(shared: &Shared) {
    let mut told = PagerState::default();
    let mut told_at: Option<Instant> = None;
    let mut retried = Instant::now();
    while !shared.is_over() {
        // Before it is looked what has failed: what fails meanwhile is not forgotten.
        let count = shared.problems.count();
        let last = shared.problems.last();
        let short = last
            .as_ref()
            .is_some_and(|last| last.kind == ProblemKind::NoMemory);
        if short && retried.elapsed() >= AGAIN {
            retried = Instant::now();
            shared.problems.retried(shared.queue.retry());
        }
        // A sweep says itself what is wrong with it, again and again.
        let swept = shared.swept.load(Ordering::Acquire);
        if last.is_some() && swept && shared.queue.waiting() == 0 {
            let failed = shared.queue.has_failed();
            if !failed || shared.is_loaded() {
                // It went away by itself, or does not matter any more.
                shared.problems.went_away(count);
            }
        }
        let problem = shared.problems.now();
        let due = told_at.is_none_or(|at| at.elapsed() >= PACE);
        if due || problem != told.problem {
            let state = shared.state();
            let quiet = told_at.is_none_or(|at| at.elapsed() >= ALIVE);
            if state != told || quiet {
                let sent = FromPager::State(Box::new(state.clone()));
                // A connection that ends is noticed by who reads it.
                let _ = shared.socket.send(&sent, &[]);
                told = state;
                told_at = Some(Instant::now());
            }
        }
        sleep(shared);
    }
}

/// Until it is time for the next state, or something happens.
fn sleep(shared: &Shared) {
    let stall = shared.problems.next_look().unwrap_or(PACE);
    let bound = PACE.min(stall).max(Duration::from_millis(1));
    let bound = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(bound.subsec_nanos()),
    };
    let leases = lock(&shared.snapshots).leases();
    let open = leases
        .iter()
        .filter_map(|(number, fd)| Some((*number, fd.as_ref().ok()?)));
    let open: Vec<_> = open.collect();
    let mut fds = vec![PollFd::new(&shared.bell, PollFlags::IN)];
    // A write end that goes is told without being asked for.
    fds.extend(
        open.iter()
            .map(|(_, fd)| PollFd::new(*fd, PollFlags::empty())),
    );
    // Interrupted, or nothing: the caller looks.
    let _ = poll(&mut fds, Some(&bound));
    shared.bell.quiet();
    let over = PollFlags::HUP | PollFlags::ERR;
    for ((snapshot, _), fd) in open.iter().zip(&fds[1..]) {
        if fd.revents().intersects(over) && shared.end_snapshot(*snapshot) {
            let snapshot = *snapshot;
            let _ = shared
                .socket
                .send(&FromPager::SnapshotEnded { snapshot }, &[]);
        }
    }
}

impl Shared {
    pub(crate) fn state(&self) -> PagerState {
        let mut load = Load::default();
        for place in read(&self.layout).places() {
            let (loaded, all) = place.memory.progress();
            load.loaded += loaded;
            load.all += all;
        }
        let (loaded, all) = self.queue.first_progress();
        let mut state = PagerState {
            working_set: Load { loaded, all },
            faults: self.stats.faults(),
            latency: self.stats.latency(),
            blocked_nanos: self.stats.blocked(),
            waiting: self.queue.waiting(),
            load,
            kept_pages: self.stats.kept.load(Ordering::Relaxed),
            problem: self.problems.now(),
            ..PagerState::default()
        };
        if let Some(mirror) = &self.mirror {
            let stats = mirror.mmu.stats();
            let owner = &stats.owner;
            let pages = |level: usize| u64::try_from(stats.pages[level]).unwrap_or(0);
            state.mapped_pages = (0..MAX_LEVELS).map(pages).collect();
            state.table_pages = stats.tables;
            state.mirror_bytes = mirror.bytes();
            state.batches = owner.batches;
            state.changes = owner.maps + owner.protects + owner.unmaps;
            state.refused = owner.refused.iter().map(|refused| refused.changes).sum();
        }
        state
    }
}
