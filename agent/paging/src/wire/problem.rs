//! What can go wrong with a page source, a pager or a writer.

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The source cannot be read (an I/O error, a lost connection).
    SourceGone,
    /// The source ends before it should.
    SourceTruncated,
    /// What the source gave is not what was saved.
    SourceCorrupt,
    /// The source does not answer.
    SourceStalled,
    /// The host has no memory for a page.
    NoMemory,
    /// The disk or another limit is full.
    NoSpace,
    /// What was asked for cannot be.
    Refused,
    /// The kernel refused a call.
    Kernel,
    /// The pager is ending.
    Stopping,
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind of thing.
    pub kind: ProblemKind,
    /// For people: what, of which file, where in it.
    pub message: String,
}
