//! Why the owner of mirrored tables refused a change.

use thiserror::Error;

/// Why the owner of mirrored tables refused a change. What was refused is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Refused {
    /// It has no memory for the change. Worth trying again when some was freed.
    #[error("the owner of the tables has no memory for it")]
    NoMemory,
    /// There is nothing to map behind the frame: its contents must be made first.
    #[error("the memory has no contents yet")]
    ContentsMissing,
    /// The address space that the tables are of is gone. It will not come back.
    #[error("the address space is gone")]
    Gone,
    /// Something else is under way there. Worth trying again. Also the reason of a change that the
    /// owner said nothing about.
    #[error("the owner of the tables is busy")]
    Busy,
    /// It failed for another reason: the owner's own number for it, such as an `errno`.
    #[error("the owner of the tables failed with error {0}")]
    Failed(i32),
}

impl Refused {
    /// How many reasons there are, each [`Failed`](Self::Failed) counted as one.
    pub(crate) const COUNT: usize = 5;

    /// The names in statistics, in the order of [`index`](Self::index).
    pub(crate) const NAMES: [&'static str; Self::COUNT] =
        ["no_memory", "contents_missing", "gone", "busy", "failed"];

    /// The reason's place in statistics.
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::NoMemory => 0,
            Self::ContentsMissing => 1,
            Self::Gone => 2,
            Self::Busy => 3,
            Self::Failed(_) => 4,
        }
    }

    /// The name in statistics: a bounded label, whatever the owner's number.
    pub const fn name(self) -> &'static str {
        Self::NAMES[self.index()]
    }
}
