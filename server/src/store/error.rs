//! What can go wrong with the store.

use std::{
    io,
    path::{Path, PathBuf},
};

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
    /// The file cannot be read or written.
    #[error("{operation}: {}: {source}", path.display())]
    Disk {
        /// What was being done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An earlier failure closed the store, and it could not be opened again yet.
    #[error("the store is closed until it can be written again: {0}")]
    Closed(ApiError),
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

impl StoreError {
    /// With the file that it is about, where nobody below knew it.
    pub(super) fn in_file(mut self, file: &Path) -> Self {
        if let Self::Disk { path, .. } = &mut self {
            file.clone_into(path);
        }
        self
    }

    /// Whether the database is of no use any more and must be opened again. A record that cannot be
    /// read is none of the file's fault.
    pub(super) fn closes(&self) -> bool {
        matches!(self, Self::Disk { .. } | Self::Transaction { .. })
    }

    /// The error of the API, without a word in the log.
    pub(super) fn to_api(&self) -> ApiError {
        match self {
            Self::Disk { path, source, .. } => {
                let mut error = ApiError::from_io(Reason::Store, path, source);
                error.message = self.to_string();
                advised(error)
            }
            Self::Closed(cause) => {
                let mut error = cause.clone();
                error.message = self.to_string();
                error
            }
            Self::InUse { path } | Self::Open { path, .. } => {
                let error = ApiError::new(Reason::Store, self.to_string());
                advised(error.with("path", path.display()))
            }
            other => advised(ApiError::new(Reason::Store, other.to_string())),
        }
    }
}

fn advised(error: ApiError) -> ApiError {
    if error.metadata.contains_key("advice") {
        error
    } else {
        error.with("advice", "see the server's log and its state directory")
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        error.to_api()
    }
}
