//! What the machine does with its pager: gives it work, asks, and waits, always within a bound.

use std::{
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use slat_paging::wire::{Answer, Ask, Layer, PagerState, Problem};

use super::{
    asks::word,
    error::PagerError,
    silence::Silence,
    state::{Inner, Stage, Work},
    watcher::Watcher,
};
use crate::memory::{Origin, SlotMemory};

/// A wait looks around after this at the latest.
const LOOK: Duration = Duration::from_millis(50);
/// Pages of a source that do not come for so long do not come.
const STALLED: Duration = Duration::from_secs(30);
/// A pager that is told to stop is waited for so long at the VM's end.
const STOPS: Duration = Duration::from_secs(2);

/// How it stands, for whoever looks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown {
    /// A pager serves.
    pub(crate) attached: bool,
    /// Its process id; 0: none is connected.
    pub(crate) pid: u32,
    /// Pagers that ended with work left.
    pub(crate) restarts: u64,
    /// What it said last.
    pub(crate) told: PagerState,
    /// How long it has said nothing, if that is too long.
    pub(crate) silent: Option<Duration>,
    /// Snapshots that are kept.
    pub(crate) snapshots: u32,
    /// Pages of the source that are there, and all.
    pub(crate) progress: (u64, u64),
}

#[derive(Default)]
struct Status {
    shown: Shown,
    origins: Vec<Arc<Origin>>,
}

/// Somebody ends the VM while this lives. See [`Pager::give_way`].
#[derive(Debug)]
pub(crate) struct GivesWay<'a>(&'a Pager);

impl Drop for GivesWay<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.ending = inner.ending.saturating_sub(1);
        self.0.done(inner);
    }
}

/// This process's end of its pager. See the folder's `mod` for the locking.
pub(crate) struct Pager {
    pub(super) vm: String,
    watcher: Watcher,
    inner: Mutex<Inner>,
    changed: Condvar,
    status: Mutex<Status>,
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager")
            .field("vm", &self.vm)
            .field("watcher", &self.watcher)
            .finish_non_exhaustive()
    }
}

impl Pager {
    /// Of a VM called `vm`, whose faults `watcher` tells.
    pub(crate) fn new(vm: String, watcher: Watcher) -> Self {
        Self {
            vm,
            watcher,
            inner: Mutex::default(),
            changed: Condvar::new(),
            status: Mutex::default(),
        }
    }

    /// What tells faults.
    pub(crate) fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changed(&self) -> &Condvar {
        &self.changed
    }

    /// Lets a lock go after a change, and says so to everybody who waits.
    pub(super) fn done(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.change();
        let link = inner.linked(Stage::SetUp);
        let origins = inner.memories.values();
        let origins = origins.filter_map(|memory| memory.origin().cloned());
        let status = Status {
            shown: Shown {
                attached: inner.linked(Stage::Attached).is_some(),
                pid: link.map_or(0, |link| link.pid),
                restarts: inner.restarts,
                told: inner.told.clone(),
                silent: link.and_then(|_| inner.silence.shown()),
                snapshots: u32::try_from(inner.snapshots.all.len()).unwrap_or(u32::MAX),
                progress: (0, 0),
            },
            origins: origins.collect(),
        };
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
        drop(inner);
        self.changed.notify_all();
    }

    /// How it stands. Waits for nobody.
    pub(crate) fn shown(&self) -> Shown {
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let progress = status.origins.iter().fold((0, 0), |(there, all), origin| {
            let (more, of) = origin.progress();
            (there + more, all + of)
        });
        Shown {
            progress,
            ..status.shown.clone()
        }
    }

    /// Waits until something has changed since `seen`, no longer than `patience`; what to say the
    /// next time.
    pub(crate) fn await_change(&self, seen: u64, patience: Duration) -> u64 {
        let waits = |inner: &mut Inner| inner.version == seen && !inner.over;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), patience, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.version
    }

    /// Gives pagers something to do: these memories.
    pub(crate) fn begin(&self, work: Work, slots: &[Arc<SlotMemory>]) {
        let mut inner = self.lock();
        inner.memories.clear();
        for slot in slots {
            inner.put_memory(slot);
        }
        inner.work = Some(work);
        self.done(inner);
    }

    /// There is nothing more to do: the pager ends, and what it has not answered is over.
    pub(crate) fn end(&self) {
        let mut inner = self.lock();
        inner.work = None;
        inner.memories.clear();
        inner.told = PagerState::default();
        inner.stop();
        self.done(inner);
    }

    /// The VM ends, or never came to be: the pager is told to stop, and has a moment for it, so
    /// that its end is not taken for a death. Then its connection is closed.
    pub(crate) fn finish(&self) {
        self.end();
        let stops = |inner: &mut Inner| {
            let link = inner.link.as_ref();
            link.is_some_and(|link| link.stopping && !link.socket.is_closed()) && !inner.over
        };
        let waited = self.changed.wait_timeout_while(self.lock(), STOPS, stops);
        let (inner, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(inner);
        if waited.timed_out() {
            tracing::warn!(vm = self.vm, "its pager does not stop");
        }
        self.close(false);
    }

    /// Until the answer is dropped whoever asks the pager is told that the VM ends.
    pub(crate) fn give_way(&self) -> GivesWay<'_> {
        let mut inner = self.lock();
        inner.ending += 1;
        self.done(inner);
        GivesWay(self)
    }

    /// The process ends, or the VM never came to be.
    pub(crate) fn close(&self, over: bool) {
        let mut inner = self.lock();
        inner.over |= over;
        inner.work = None;
        inner.memories.clear();
        inner.source.clear();
        inner.snapshots.all.clear();
        if let Some(link) = &inner.link {
            link.socket.close();
        }
        self.done(inner);
    }

    /// Whether the process is to end.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Whether a pager is connected, with something to do or not.
    pub(crate) fn is_connected(&self) -> bool {
        self.lock().linked(Stage::Waiting).is_some()
    }

    /// Waits until a pager is connected.
    ///
    /// # Errors
    /// `Unreachable`.
    pub(crate) fn await_connected(&self, patience: Duration) -> Result<(), PagerError> {
        self.await_link(Stage::Waiting, "came", patience)
    }

    /// Waits until a pager serves.
    ///
    /// # Errors
    /// `Unreachable`.
    pub(crate) fn await_attached(&self, patience: Duration) -> Result<(), PagerError> {
        self.await_link(Stage::Attached, "served", patience)
    }

    fn await_link(
        &self,
        stage: Stage,
        what: &'static str,
        patience: Duration,
    ) -> Result<(), PagerError> {
        let waits =
            |inner: &mut Inner| inner.linked(stage).is_none() && !inner.over && inner.ending == 0;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), patience, waits);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match inner.linked(stage) {
            Some(_) => Ok(()),
            None if inner.ending > 0 => Err(PagerError::Ending),
            None => Err(PagerError::Unreachable {
                what,
                waited: patience,
            }),
        }
    }

    /// Asks, of this pager or the next, and waits for the answer.
    ///
    /// # Errors
    /// `Unreachable`, `Failed`.
    pub(crate) fn ask(&self, ask: Ask, patience: Duration) -> Result<Answer, PagerError> {
        let begun = Instant::now();
        let asked = self.ask_while(ask, |so_far| so_far < patience);
        asked.unwrap_or_else(|| {
            Err(PagerError::Unreachable {
                what: "answered",
                waited: begun.elapsed(),
            })
        })
    }

    /// Asks, and waits for as long as `goes_on` says; `None` when it did not.
    fn ask_while(
        &self,
        ask: Ask,
        mut goes_on: impl FnMut(Duration) -> bool,
    ) -> Option<Result<Answer, PagerError>> {
        let (begun, what) = (Instant::now(), word(&ask));
        let ask_is_load = ask == Ask::LoadAll;
        let mut inner = self.lock();
        let number = inner.asks.put(ask, false);
        inner.flush();
        loop {
            if let Some(reply) = inner.asks.take(number) {
                let failed = |problem: Problem| PagerError::Failed { what, problem };
                return Some(reply.map_err(failed));
            }
            if inner.loaded && ask_is_load {
                // One that has brought everything may have ended by now.
                inner.asks.forget(number);
                return Some(Ok(Answer::Done));
            }
            if inner.ending > 0 {
                inner.asks.forget(number);
                return Some(Err(PagerError::Ending));
            }
            if inner.over || inner.work.is_none() || !goes_on(begun.elapsed()) {
                inner.asks.forget(number);
                return None;
            }
            let waited = self.changed.wait_timeout(inner, LOOK);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has all pages of the source brought, and waits no longer than `patience`, nor when none
    /// comes for [`STALLED`].
    ///
    /// # Errors
    /// `Unreachable`, `Stalled`, `Failed`.
    pub(crate) fn load_all(&self, patience: Duration) -> Result<(), PagerError> {
        let mut last = (self.shown().progress.0, Duration::ZERO);
        let mut waited = Duration::ZERO;
        let loaded = self.ask_while(Ask::LoadAll, |so_far| {
            let (there, _) = self.shown().progress;
            if there != last.0 {
                last = (there, so_far);
            }
            waited = so_far;
            so_far < patience && so_far - last.1 < STALLED
        });
        if let Some(reply) = loaded {
            return reply.map(drop);
        }
        if !self.has_source() {
            // All came, and its pager was let go before it answered.
            return Ok(());
        }
        let shown = self.shown();
        let (there, all) = shown.progress;
        Err(if shown.attached {
            PagerError::Stalled {
                there,
                all,
                waited: waited - last.1,
            }
        } else {
            PagerError::Unreachable {
                what: "brought all pages",
                waited,
            }
        })
    }

    /// Whether a source was handed over and is still needed.
    pub(crate) fn has_source(&self) -> bool {
        self.lock().has_source
    }

    /// Whether the source is a snapshot of a VM that goes on, not a file.
    pub(crate) fn is_forked(&self) -> bool {
        let inner = self.lock();
        let youngest = inner.source.first();
        youngest.is_some_and(|kept| matches!(kept.layer, Layer::Snapshot { .. }))
    }

    /// All of the source is there: it is let go of, and no pager to come hears of it.
    pub(crate) fn settle_source(&self) {
        let mut inner = self.lock();
        inner.source.clear();
        inner.has_source = false;
        inner.loaded = false;
        for origin in inner.memories.values().filter_map(|slot| slot.origin()) {
            origin.settle();
        }
        self.done(inner);
    }

    /// What the machine has to hear of: snapshots that ended, and whether all of the source came.
    /// A pager that has been silent for too long is given up.
    pub(crate) fn news(&self) -> (Vec<u64>, bool) {
        let mut inner = self.lock();
        let now = Instant::now();
        // By seconds: each is news once.
        let seconds = |silence: &Silence| silence.shown().map(|lasts| lasts.as_secs());
        let shown = seconds(&inner.silence);
        let serves = inner.linked(Stage::Attached).is_some();
        if let Some(link) = inner
            .linked(Stage::SetUp)
            .map(|link| Arc::clone(&link.socket))
        {
            if inner.silence.look(now, serves) {
                tracing::warn!(vm = %self.vm, "a pager says nothing: it is given up");
                link.close();
            }
        } else {
            inner.silence.broken();
        }
        let silent = seconds(&inner.silence) != shown;
        let over = inner.snapshots.tend(now, serves);
        let mut ended = std::mem::take(&mut inner.ended);
        ended.extend(over);
        let loaded = inner.loaded;
        if !ended.is_empty() || silent {
            self.done(inner);
        }
        (ended, loaded)
    }

    /// Closes the connection: what its pager knows may be wrong, and another is to begin anew.
    pub(crate) fn give_up_pager(&self) {
        if let Some(link) = &self.lock().link {
            link.socket.close();
        }
    }

    /// Makes a snapshot's files for these slots, and tells the pager; `still`: the vCPUs stay
    /// stopped for as long as it lasts, and no pager hears of it.
    ///
    /// # Errors
    /// When files cannot be made.
    pub(crate) fn add_snapshot(&self, slots: &[Arc<SlotMemory>], still: bool) -> io::Result<u64> {
        let mut inner = self.lock();
        let slots = slots.iter().map(|slot| &**slot);
        let number = inner.snapshots.add(slots, still)?;
        if let Some(link) = inner.linked(Stage::SetUp).filter(|_| !still)
            && let Err(error) = inner.tell_snapshot(&link.socket, number)
        {
            tracing::warn!(%error, "a pager is not told of a snapshot");
            link.socket.close();
        }
        self.done(inner);
        Ok(number)
    }

    /// A snapshot has begun: its lease is to be taken from now on. That it began was noted when the
    /// pager said so.
    pub(crate) fn snapshot_begun(&self, number: u64) {
        let mut inner = self.lock();
        inner.snapshots.begun(number);
        self.done(inner);
    }

    /// A snapshot that is not to be.
    pub(crate) fn drop_snapshot(&self, number: u64) {
        let mut inner = self.lock();
        let snapshot = inner.snapshots.all.remove(&number);
        if snapshot.is_some_and(|snapshot| !snapshot.still) && inner.work.is_some() {
            inner.asks.put(Ask::EndSnapshot { snapshot: number }, true);
            inner.flush();
        }
        self.done(inner);
    }
}
