//! What the control plane must not forget, and nothing else.
//!
//! **Durable**: migrations (the record and which sides were released) and the last address of each host. **Not durable**:
//! VMs and host figures; agents report them again within one interval, and they are the truth about them.
//!
//! A write that returned is on disk (redb's immediate durability: fsync before the commit returns). A reconciler
//! relies on it: a state is stored before an action that assumes it is begun. Calls block; users of [`Store`] on the
//! runtime go through [`BlockingStore`], which moves them to the blocking pool.

mod redb;

use std::{path::PathBuf, sync::Arc};

use slat_proto::{ApiError, Reason, v1};
use tokio_util::task::TaskTracker;

use crate::phase::has_ended;

pub(crate) use self::redb::RedbStore;

/// Why the store could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another server has the file open.
    #[error("{} is open in another server; give each its own state directory", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The directory or file cannot be made or opened.
    #[error("{}: {source}", path.display())]
    Open {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A record is there and cannot be read.
    #[error("record {key} of table {table} cannot be read: {message}")]
    Record {
        /// Its table.
        table: &'static str,
        /// Its key.
        key: String,
        /// What is wrong with it.
        message: String,
    },
    /// A transaction failed.
    #[error("{operation}: {source}")]
    Transaction {
        /// What was being done.
        operation: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "the store failed");
        Self::new(Reason::Store, error.to_string())
            .with("advice", "see the server's log and its state directory")
    }
}

/// A migration as stored.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StoredMigration {
    /// The resource.
    #[prost(message, optional, tag = "1")]
    pub(crate) migration: Option<v1::Migration>,
    /// The source's side was released: its agent may have forgotten it.
    #[prost(bool, tag = "2")]
    pub(crate) source_released: bool,
    /// The destination's side was released, or there is none.
    #[prost(bool, tag = "3")]
    pub(crate) destination_released: bool,
    /// Whether StartOutgoing may have been called.
    #[prost(enumeration = "SourceStart", tag = "4")]
    pub(crate) source_start: i32,
}

/// Calls of StartOutgoing that were made, or were about to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum SourceStart {
    /// A version wrote this that did not say.
    Unknown = 0,
    /// None.
    Never = 1,
    /// One.
    Once = 2,
    /// More than one.
    Again = 3,
}

impl StoredMigration {
    /// Whether the reconciler still has work with it.
    pub(crate) fn is_open(&self) -> bool {
        let phase = self
            .migration
            .as_ref()
            .map_or(v1::MigrationPhase::Unspecified, v1::Migration::phase);
        !has_ended(phase) || !self.source_released || !self.destination_released
    }
}

/// Which migrations to list.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListQuery {
    /// Only those of this VM (`vms/{vm}`).
    pub(crate) vm: Option<String>,
    /// Only those older than this one (`migrations/{migration}`).
    pub(crate) after: Option<String>,
    /// At most this many.
    pub(crate) limit: usize,
}

/// Durable records. Every method blocks on the disk.
pub(crate) trait Store: Send + Sync + 'static {
    /// Writes a migration; durable when it returns.
    fn put_migration(&self, record: &StoredMigration) -> Result<(), StoreError>;
    /// Reads one migration (`migrations/{migration}`).
    fn migration(&self, name: &str) -> Result<Option<StoredMigration>, StoreError>;
    /// Newest first.
    fn migrations(&self, query: &ListQuery) -> Result<Vec<StoredMigration>, StoreError>;
    /// Those with work left: see [`StoredMigration::is_open`].
    fn open_migrations(&self) -> Result<Vec<StoredMigration>, StoreError>;
    /// Writes a host's address.
    fn put_host(&self, name: &str, address: &str) -> Result<(), StoreError>;
    /// All hosts: name, address.
    fn hosts(&self) -> Result<Vec<(String, String)>, StoreError>;
}

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
