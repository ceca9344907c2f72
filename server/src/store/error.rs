//! What can go wrong with the store.

use std::path::PathBuf;

use slat_proto::{ApiError, Reason};

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
