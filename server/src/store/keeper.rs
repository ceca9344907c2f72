//! Keeps the store open: after a failure of the file it is opened again, by the next call or the
//! next probe, and everything goes on when the disk does.
//!
//! ```text
//! open --a call fails on the file--> closed --opened again--> open
//! up   --any call fails-----------> down   --a probe is on disk--> up
//! ```
//! While it is closed, calls are answered with what closed it, at once; the file is tried no more
//! often than every [`REOPEN`]. A write that failed may be on disk or not: every write of this
//! store can be repeated.
//!
//! # Locking
//! `current` is held for a look, a change, or the opening of the file, on blocking threads only. A
//! call that finds it taken by an opening is answered as if closed: no queue of blocked threads
//! grows behind a disk that hangs.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, TryLockError},
    time::{Duration, Instant},
};

use metrics::counter;
use slat_proto::{ApiError, Reason};
use tokio::sync::watch;

use super::{contract::Store, error::StoreError};

/// A closed store is tried no more often than this.
const REOPEN: Duration = Duration::from_millis(250);

/// Opens the store.
pub(super) type Open = dyn Fn() -> Result<Arc<dyn Store>, StoreError> + Send + Sync;

enum Current {
    Open(Arc<dyn Store>),
    Closed { cause: ApiError, tried: Instant },
}

/// See the module.
pub(super) struct Keeper {
    path: PathBuf,
    open: Box<Open>,
    current: Mutex<Current>,
    trouble: watch::Sender<Option<ApiError>>,
}

impl Keeper {
    /// Of a store that is open; `open` opens it again.
    pub(super) fn new(path: PathBuf, store: Arc<dyn Store>, open: Box<Open>) -> Self {
        Self {
            path,
            open,
            current: Mutex::new(Current::Open(store)),
            trouble: watch::Sender::new(None),
        }
    }

    /// What keeps it from being written, and each change of that.
    pub(super) fn trouble(&self) -> watch::Receiver<Option<ApiError>> {
        self.trouble.subscribe()
    }

    /// A probe is on disk.
    pub(super) fn works(&self) {
        let again = self
            .trouble
            .send_if_modified(|trouble| trouble.take().is_some());
        if again {
            tracing::info!(path = %self.path.display(), "the store can be written again");
        }
    }

    /// It cannot be written.
    pub(super) fn fails(&self, cause: ApiError) {
        counter!("slat_store_errors_total", "reason" => cause.reason.as_str()).increment(1);
        let log = cause.clone();
        if self.trouble.send_replace(Some(cause)).is_none() {
            tracing::error!(error = %log, reason = %log.reason, path = %self.path.display(),
                "the store cannot be used; it is tried again until it can");
        }
    }

    /// Runs one call. Blocks on the disk.
    pub(super) fn call<T>(
        &self,
        work: impl FnOnce(&dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let store = self.current()?;
        work(&*store).map_err(|error| {
            let error = error.in_file(&self.path);
            if error.closes() {
                self.close(&store, &error);
            }
            error
        })
    }

    fn current(&self) -> Result<Arc<dyn Store>, StoreError> {
        let mut current = match self.current.try_lock() {
            Ok(current) => current,
            // Only whole values are put there.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                // Held for a moment by a look, or for longer by an opening.
                let cause = self.trouble.borrow().clone();
                match cause {
                    Some(cause) => return Err(StoreError::Closed(cause)),
                    None => self
                        .current
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner),
                }
            }
        };
        let (cause, tried) = match &mut *current {
            Current::Open(store) => return Ok(Arc::clone(store)),
            Current::Closed { cause, tried } => (cause, tried),
        };
        if tried.elapsed() < REOPEN {
            return Err(StoreError::Closed(cause.clone()));
        }
        *tried = Instant::now();
        match (self.open)() {
            Ok(store) => {
                *current = Current::Open(Arc::clone(&store));
                Ok(store)
            }
            Err(error) => {
                *cause = error.to_api();
                self.fails(cause.clone());
                Err(StoreError::Closed(cause.clone()))
            }
        }
    }

    /// Lets go of a store that failed; others may have done so already.
    fn close(&self, failed: &Arc<dyn Store>, error: &StoreError) {
        let cause = error.to_api();
        let closed = {
            let mut current = self
                .current
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            match &*current {
                Current::Open(store) if Arc::ptr_eq(store, failed) => {
                    let closed = Current::Closed {
                        cause: cause.clone(),
                        tried: Instant::now(),
                    };
                    Some(std::mem::replace(&mut *current, closed))
                }
                _ => None,
            }
        };
        self.fails(cause);
        // Closing the database writes too: not under the lock.
        drop(closed);
    }

    /// A disk that does not answer a probe.
    pub(super) fn hangs(&self, waited: Duration) {
        self.fails(
            ApiError::new(
                Reason::Store,
                format!(
                    "{}: the disk has not answered for {} s",
                    self.path.display(),
                    waited.as_secs()
                ),
            )
            .with("path", self.path.display())
            .with("advice", "look at the disk of the server's state directory"),
        );
    }
}
