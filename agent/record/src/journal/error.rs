//! What can be wrong with a journal.

use std::{io, path::PathBuf};

use slat_proto::{ApiError, Reason};

/// A failure of the journal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("journal {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A line that is neither whole nor the last.
    #[error("journal {path} is corrupt at line {line}: {message}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A line that was written whole, by a program that knows more than this one.
    #[error(
        "journal {path}, line {line}: its checksum is right and this program does not understand it: {message}; \
         it may say who owns the VM, so the file is left as it is: use the version of slat that wrote it"
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is not understood.
        message: String,
    },
    /// A format of a later program.
    #[error("journal {path} has format version {found}; this program reads 1 to {known}")]
    Version {
        /// The file.
        path: PathBuf,
        /// The version in its header.
        found: u32,
        /// The latest that can be read.
        known: u32,
    },
    /// A format that is read and not written any more.
    #[error(
        "journal {path} has format version {found}, which is only read; this program writes {known}"
    )]
    ReadOnlyVersion {
        /// The file.
        path: PathBuf,
        /// The version found.
        found: u32,
        /// The version written.
        known: u32,
    },
    /// An entry that cannot follow what is there.
    #[error("journal: {entry} cannot follow {state}")]
    Order {
        /// The entry refused.
        entry: String,
        /// The state it met.
        state: String,
    },
}

impl From<JournalError> for ApiError {
    fn from(error: JournalError) -> Self {
        let message = error.to_string();
        match error {
            JournalError::Io { path, source } => ApiError {
                message,
                ..ApiError::from_io(Reason::Journal, &path, &source)
            },
            _ => ApiError::new(Reason::Journal, message),
        }
    }
}
