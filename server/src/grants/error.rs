//! Why the server cannot sign.

use std::{io, path::PathBuf};

use slat_proto::{ApiError, Reason};
use slat_trust::grant::GrantError;

/// Why the server cannot sign.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GrantsError {
    /// The directory of its keys cannot be used.
    #[error("{path}: {source}")]
    Directory {
        /// A path in it, or itself.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no key to sign by.
    #[error("there is no key to sign grants by")]
    NoKey,
    /// A grant cannot be made.
    #[error("a grant cannot be made: {0}")]
    Grant(#[from] GrantError),
}

impl From<GrantsError> for ApiError {
    fn from(error: GrantsError) -> Self {
        let told = Self::new(Reason::Internal, error.to_string())
            .with("advice", "see that the server can use its state directory");
        match &error {
            GrantsError::Directory { source, .. } => told.because_of(source),
            GrantsError::NoKey | GrantsError::Grant(_) => told,
        }
    }
}
