//! Lets vCPU threads run, stops them, ends them; and collects why the guest failed.
//!
//! # Protocol
//! A vCPU *rests* until it may run, runs batches while [`Gate::running`], and rests again. The
//! owner says what is wanted and waits until all rest. A failure stops all vCPUs for good: the last
//! one to come to rest reports it, *before* it counts as resting, so that a pause which returned
//! has nothing left to report.
//!
//! *Locking*: one mutex, never held across the event sink. `stop` mirrors "not wanted to run" so
//! that a running vCPU looks without the lock. At rest happens before the owner's return, through
//! the mutex: all stores of the guest are then visible.

use std::{
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::backend::{BackendError, EventSink, GuestEvent};

/// A batch takes milliseconds; a vCPU that needs longer is stuck.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Rest,
    Run,
    End,
}

#[derive(Debug)]
struct Inner {
    want: Want,
    resting: u32,
    /// The guest ran at least once.
    started: bool,
    failure: Option<String>,
    reported: bool,
}

/// What a vCPU that rested is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Run,
    End,
}

pub(super) struct Gate {
    vcpus: u32,
    inner: Mutex<Inner>,
    stop: AtomicBool,
    to_vcpus: Condvar,
    to_owner: Condvar,
    events: EventSink,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

fn error(message: impl Into<String>) -> BackendError {
    BackendError::Vcpu {
        message: message.into(),
    }
}

impl Gate {
    /// All vCPUs count as resting, also before their threads are there.
    pub(super) fn new(vcpus: u32, events: EventSink) -> Self {
        Self {
            vcpus,
            inner: Mutex::new(Inner {
                want: Want::Rest,
                resting: vcpus,
                started: false,
                failure: None,
                reported: false,
            }),
            stop: AtomicBool::new(true),
            to_vcpus: Condvar::new(),
            to_owner: Condvar::new(),
            events,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, inner: &mut Inner, want: Want) {
        if inner.want != Want::End {
            inner.want = want;
        }
        self.stop.store(inner.want != Want::Run, Relaxed);
        self.to_vcpus.notify_all();
    }

    /// Owner: lets the vCPUs run.
    pub(super) fn run(&self) -> Result<(), BackendError> {
        let mut inner = self.inner();
        if let Some(failure) = &inner.failure {
            return Err(error(format!("the guest failed: {failure}")));
        }
        inner.started = true;
        self.want(&mut inner, Want::Run);
        Ok(())
    }

    /// Owner: stops them and waits until all rest.
    pub(super) fn pause(&self) -> Result<(), BackendError> {
        let mut inner = self.inner();
        self.want(&mut inner, Want::Rest);
        let until = Instant::now() + PATIENCE;
        while inner.resting < self.vcpus {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let stuck = self.vcpus - inner.resting;
                return Err(error(format!(
                    "{stuck} of {} vCPUs did not stop within {PATIENCE:?}",
                    self.vcpus
                )));
            }
            inner = self
                .to_owner
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Owner: whether all rest and none is wanted to run.
    pub(super) fn stopped(&self) -> bool {
        let inner = self.inner();
        inner.want != Want::Run && inner.resting == self.vcpus
    }

    /// Owner: whether the guest ever ran.
    pub(super) fn started(&self) -> bool {
        self.inner().started
    }

    /// Owner: tells the threads to end.
    pub(super) fn end(&self) {
        let mut inner = self.inner();
        self.want(&mut inner, Want::End);
    }

    /// vCPU: waits until it may run; the vCPU counts as resting already.
    pub(super) fn wait(&self) -> Next {
        self.wait_for(self.inner())
    }

    /// vCPU: rests until it may run again.
    pub(super) fn rest(&self) -> Next {
        let mut inner = self.inner();
        if inner.resting + 1 == self.vcpus
            && !inner.reported
            && let Some(failure) = inner.failure.clone()
        {
            inner.reported = true;
            drop(inner);
            (self.events)(GuestEvent::Failed(failure.into()));
            inner = self.inner();
        }
        inner.resting += 1;
        self.to_owner.notify_all();
        self.wait_for(inner)
    }

    fn wait_for(&self, inner: MutexGuard<'_, Inner>) -> Next {
        let mut inner = self
            .to_vcpus
            .wait_while(inner, |inner| inner.want == Want::Rest)
            .unwrap_or_else(PoisonError::into_inner);
        if inner.want == Want::End {
            return Next::End;
        }
        inner.resting -= 1;
        Next::Run
    }

    /// vCPU: whether to run another batch.
    pub(super) fn running(&self) -> bool {
        !self.stop.load(Relaxed)
    }

    /// vCPU: sleeps so long, or until it is to stop.
    pub(super) fn doze(&self, time: Option<Duration>) {
        let inner = self.inner();
        let running = |inner: &mut Inner| inner.want == Want::Run;
        match time {
            Some(time) => drop(self.to_vcpus.wait_timeout_while(inner, time, running)),
            None => drop(self.to_vcpus.wait_while(inner, running)),
        }
    }

    /// vCPU: the guest cannot go on. The first failure counts.
    pub(super) fn fail(&self, message: String) {
        let mut inner = self.inner();
        inner.failure.get_or_insert(message);
        self.want(&mut inner, Want::Rest);
    }
}
