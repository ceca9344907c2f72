//! The VM of one monitor, as handlers reach it: who is meant is checked, and calls that block keep
//! no other task waiting.
//!
//! # Where a call runs
//! Calls that stop a guest, sync a journal or read all memory run on blocking threads. Calls on
//! slots and dirty pages are mostly over before such a thread would have begun, and its caller
//! would have been told of the end: they run on the thread that they came to, which first hands
//! the runtime's other tasks to another one. At most [`IN_PLACE`] run so at a time, as each of them
//! may wait for a lock and takes a thread of the runtime with it; more go to blocking threads. A
//! change of slots that its monitor makes at once, or not at all, runs among the runtime's tasks:
//! to hand those over takes longer.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use slat_proto::{ApiError, Reason, model::VmRef};
use tokio::runtime::{Handle, RuntimeFlavor};
use tonic::Status;

use super::monitor::Monitor;

/// Calls that run on threads of the runtime at a time.
const IN_PLACE: usize = 16;

/// Serves the VM of one monitor.
#[derive(Clone, Debug)]
pub(crate) struct VmEndpoint {
    pub(super) monitor: Arc<dyn Monitor>,
    in_place: Arc<AtomicUsize>,
}

/// A place among [`IN_PLACE`].
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl VmEndpoint {
    pub(super) fn new(monitor: Arc<dyn Monitor>) -> Self {
        Self {
            monitor,
            in_place: Arc::default(),
        }
    }

    /// Runs `call` on a blocking thread, once name, uid and host are found to mean this VM.
    pub(super) async fn on<T: Send + 'static>(
        &self,
        (name, uid, host): (&str, &str, &str),
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        self.check(name, uid, host)?;
        self.blocking(call).await
    }

    /// As [`VmEndpoint::on`], for a call that is short as a rule. See the module.
    #[expect(
        clippy::disallowed_methods,
        reason = "bounded by IN_PLACE; the runtime's other tasks are handed to another thread"
    )]
    pub(super) async fn shortly_on<T: Send + 'static>(
        &self,
        (name, uid, host): (&str, &str, &str),
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        self.check(name, uid, host)?;
        let Some(_place) = self.place() else {
            return self.blocking(call).await;
        };
        tokio::task::block_in_place(|| self.caught(call))
    }

    /// Makes a call that waits for nobody and is over in a moment, among the tasks of the runtime.
    pub(super) fn at_once<T>(
        &self,
        (name, uid, host): (&str, &str, &str),
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError>,
    ) -> Result<T, Status> {
        self.check(name, uid, host)?;
        self.caught(call)
    }

    fn caught<T>(
        &self,
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError>,
    ) -> Result<T, Status> {
        let answer = catch_unwind(AssertUnwindSafe(|| call(&*self.monitor)));
        let panicked = |_| ApiError::new(Reason::Internal, "a call failed: it panicked");
        answer.map_err(panicked)?.map_err(Status::from)
    }

    fn check(&self, name: &str, uid: &str, host: &str) -> Result<(), ApiError> {
        let own = self.uid();
        VmRef::new(name, uid, host)?.check(self.monitor.name(), &own, self.monitor.host())
    }

    /// None on a runtime that has no other thread, or when all are taken.
    fn place(&self) -> Option<Place> {
        if Handle::current().runtime_flavor() != RuntimeFlavor::MultiThread {
            return None;
        }
        let place = Place(Arc::clone(&self.in_place));
        let others = self.in_place.fetch_add(1, Ordering::Relaxed);
        (others < IN_PLACE).then_some(place)
    }

    /// The identity of the VM; empty before that is known.
    pub(super) fn uid(&self) -> String {
        self.monitor.uid().unwrap_or_default()
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let monitor = Arc::clone(&self.monitor);
        tokio::task::spawn_blocking(move || call(&*monitor))
            .await
            .map_err(|error| ApiError::new(Reason::Internal, format!("a call failed: {error}")))?
            .map_err(Status::from)
    }
}
