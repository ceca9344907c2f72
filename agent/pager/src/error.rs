//! What ends a pager, and what goes wrong while it serves.
//!
//! A [`PagerError`] ends it. A [`Trouble`] does not: the pages that it is about wait, all others go
//! on, and the state says what is wrong until it was mended.

use std::io;

use slat_paging::wire::{Problem, ProblemKind, WireError};

/// Why a pager or a writer ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The connection failed.
    #[error("the connection: {0}")]
    Wire(#[from] WireError),
    /// The other side said what cannot be at this point.
    #[error("the other side: {0}")]
    Protocol(String),
    /// The kernel refused what nothing works without.
    #[error("{doing}: {source}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No memory for the mirror.
    #[error("no memory for the mirror's tables")]
    NoMemory,
    /// A source that cannot be used at all.
    #[error(transparent)]
    Trouble(#[from] Trouble),
}

impl PagerError {
    pub(crate) fn kernel(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { doing, source }
    }
}

/// Something that went wrong with pages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Trouble {
    /// What kind of thing.
    pub kind: ProblemKind,
    /// What, of which file, where in it.
    pub message: String,
}

impl Trouble {
    /// See the fields.
    #[must_use]
    pub fn new(kind: ProblemKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind, message }
    }

    /// Of a call on one of the VM's memory files.
    pub(crate) fn memory(doing: &str, error: &io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(libc::ENOMEM | libc::ENOSPC | libc::EDQUOT) => ProblemKind::NoMemory,
            _ => ProblemKind::Kernel,
        };
        Self::new(kind, format!("{doing}: {error}"))
    }

    /// Of a read of a source.
    pub(crate) fn source(name: &str, error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::UnexpectedEof => ProblemKind::SourceTruncated,
            _ => ProblemKind::SourceGone,
        };
        Self::new(kind, format!("{name}: {error}"))
    }

    /// As it is told.
    #[must_use]
    pub fn problem(&self) -> Problem {
        Problem {
            kind: self.kind,
            message: self.message.clone(),
        }
    }
}
