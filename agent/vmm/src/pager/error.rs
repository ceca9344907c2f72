//! What can go wrong between this process and its pager.

use std::{io, time::Duration};

use slat_paging::wire::{Problem, ProblemKind};
use slat_proto::{ApiError, Reason};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PagerError {
    /// There is none, or it does not answer.
    #[error("no pager {what} within {} s", .waited.as_secs_f32())]
    Unreachable {
        /// What was waited for, as in "answered".
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// It is to have one, and has just begun: after a migration, say.
    #[error("memory is not watched yet: it is when a pager has come")]
    NotYet,
    /// Pages of the source do not come.
    #[error("{there} of {all} pages of the source are here, and none came for {} s", .waited.as_secs())]
    Stalled {
        /// Pages that are there.
        there: u64,
        /// All.
        all: u64,
        /// How long none came.
        waited: Duration,
    },
    /// The VM is being ended, and nobody waits for its pager any more.
    #[error("its VM is being ended")]
    Ending,
    /// It says that it could not.
    #[error("its pager could not {what}: {}", .problem.message)]
    Failed {
        /// What it was asked to do.
        what: &'static str,
        /// What it said.
        problem: Problem,
    },
    /// A call of the kernel's.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl PagerError {
    /// A call of the kernel's that failed.
    pub(crate) fn io(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// The reason for what a pager says is wrong.
pub(crate) fn reason_of(kind: ProblemKind) -> Reason {
    match kind {
        ProblemKind::SourceGone => Reason::PageSourceGone,
        ProblemKind::SourceTruncated => Reason::PageSourceTruncated,
        ProblemKind::SourceCorrupt => Reason::PageSourceCorrupt,
        ProblemKind::SourceStalled => Reason::PageSourceStalled,
        ProblemKind::NoMemory => Reason::NoMemory,
        ProblemKind::NoSpace => Reason::DiskFull,
        ProblemKind::Stopping => Reason::PagerUnreachable,
        ProblemKind::Refused | ProblemKind::Kernel => Reason::Internal,
    }
}

impl From<PagerError> for ApiError {
    fn from(error: PagerError) -> Self {
        let words = error.to_string();
        match &error {
            PagerError::Unreachable { .. } | PagerError::NotYet => {
                Self::new(Reason::PagerUnreachable, words).with(
                    "advice",
                    "the host's agent starts pagers: see its log, then try again",
                )
            }
            PagerError::Stalled { there, all, .. } => Self::new(Reason::PageSourceStalled, words)
                .with("loaded_pages", there)
                .with("source_pages", all)
                .with("advice", "mend the source, then call RetryPageSource"),
            PagerError::Ending => Self::new(Reason::VmState, words),
            PagerError::Failed { problem, .. } => Self::new(reason_of(problem.kind), words),
            PagerError::Io { source, .. } => {
                let reason = match source.raw_os_error() {
                    Some(libc::ENOMEM) => Reason::NoMemory,
                    Some(libc::EMFILE | libc::ENFILE) => Reason::DescriptorsExhausted,
                    _ => Reason::Internal,
                };
                Self::new(reason, words).because_of(source)
            }
        }
    }
}
