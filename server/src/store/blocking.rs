//! The blocking pool's handle on a store.

use std::sync::Arc;

use tokio_util::task::TaskTracker;

use super::{contract::Store, error::StoreError};

/// A store used from async code: each call runs on the blocking pool.
#[derive(Clone)]
pub(crate) struct BlockingStore {
    store: Arc<dyn Store>,
    calls: TaskTracker,
}

impl BlockingStore {
    pub(crate) fn new(store: impl Store) -> Self {
        Self {
            store: Arc::new(store),
            calls: TaskTracker::new(),
        }
    }

    /// Runs `work` on the store. A call that was begun ends, even when the caller goes away.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.store);
        self.calls
            .spawn_blocking(move || work(&*store))
            .await
            .map_err(|source| StoreError::Transaction {
                operation: "run a store call",
                source: source.into(),
            })?
    }

    /// Waits for the calls that were begun; nobody makes new ones.
    pub(crate) async fn finish(&self) {
        self.calls.close();
        self.calls.wait().await;
    }
}
