//! The blocking pool's handle on a store.

use std::{path::Path, sync::Arc};

use slat_proto::ApiError;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::{
    contract::Store,
    error::StoreError,
    keeper::Keeper,
    redb::{Attach, RedbStore, attach, file_in},
};

/// A store used from async code: each call runs on the blocking pool.
#[derive(Clone)]
pub(crate) struct BlockingStore {
    keeper: Arc<Keeper>,
    calls: TaskTracker,
}

impl BlockingStore {
    /// The store in `directory`, opened or made, and opened again after failures. Blocks.
    pub(crate) fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_with(directory, Arc::new(attach))
    }

    /// [`BlockingStore::open`], with its database put on the file in this way.
    pub(super) fn open_with(directory: &Path, attach: Arc<Attach>) -> Result<Self, StoreError> {
        let state = directory.to_owned();
        let open = move || -> Result<Arc<dyn Store>, StoreError> {
            Ok(Arc::new(RedbStore::open_with(&state, &*attach)?))
        };
        let store = open()?;
        let keeper = Keeper::new(file_in(directory), store, Box::new(open));
        Ok(Self::kept(keeper))
    }

    /// A store that is there already and never has to be opened again.
    #[cfg(test)]
    pub(crate) fn new(store: impl Store) -> Self {
        let store: Arc<dyn Store> = Arc::new(store);
        let same = Arc::clone(&store);
        let open: Box<super::keeper::Open> = Box::new(move || Ok(Arc::clone(&same)));
        Self::kept(Keeper::new("memory".into(), store, open))
    }

    fn kept(keeper: Keeper) -> Self {
        Self {
            keeper: Arc::new(keeper),
            calls: TaskTracker::new(),
        }
    }

    pub(super) fn keeper(&self) -> &Arc<Keeper> {
        &self.keeper
    }

    /// What keeps the store from being written, and each change of that.
    pub(crate) fn trouble(&self) -> watch::Receiver<Option<ApiError>> {
        self.keeper.trouble()
    }

    /// Runs `work` on the store. A call that was begun ends, even when the caller goes away.
    ///
    /// # Errors
    /// The work's own. [`StoreError::Closed`] while a failed file could not be opened again: the
    /// same call may succeed later, and whoever must have it made makes it again, after a pause.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let keeper = Arc::clone(&self.keeper);
        self.calls
            .spawn_blocking(move || keeper.call(work))
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
