//! What can go wrong with an image: typed, so that a caller can say what to do. Nothing here is
//! ever a panic: a file comes from outside, and a disk can fill up.
//!
//! Errors are of three kinds: the file is not one that can be read
//! ([`ImageError::is_of_the_file`]), the host failed (`Io`, `NoSpace`), or the caller asked for
//! what cannot be.

use std::{io, path::PathBuf};

use crate::names::ImageName;

/// See the module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file does not begin as one.
    #[error("this is no saved VM")]
    NotAnImage,
    /// The format's version is not read here.
    #[error("format version {found}; this program reads {} to {}", known.0, known.1)]
    Version {
        /// That of the file.
        found: u32,
        /// The oldest and the newest that are read here.
        known: (u32, u32),
    },
    /// The file cannot be understood without something that this program does not have.
    #[error("the file needs the feature {name:?}, which this program does not have")]
    Feature {
        /// As the file calls it.
        name: String,
    },
    /// The file is not whole: its end is missing, or more follows.
    #[error("not whole: {found} bytes, {}", wanted_length(*.expected))]
    Truncated {
        /// The length in bytes that the file says of itself; `None`: the part that says it is
        /// missing.
        expected: Option<u64>,
        /// Bytes that are there.
        found: u64,
    },
    /// What is in the file cannot be right.
    #[error("damaged at byte {offset}: {what}")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// Where in the file that was read: the one that was opened, or one of its bases.
        offset: u64,
    },
    /// The base that was given is not the one that this file builds on.
    #[error("builds on {}, and was given {}", or_nothing(*.wanted), or_nothing(*.given))]
    WrongBase {
        /// What the file builds on; `None`: it stands alone.
        wanted: Option<ImageName>,
        /// What was given; `None`: nothing.
        given: Option<ImageName>,
    },
    /// The image has no memory of that number.
    #[error("no memory {memory} in the image")]
    NoSuchMemory {
        /// Its number.
        memory: u32,
    },
    /// The memory has no such page.
    #[error("memory {memory} has no page {page} in the image")]
    NoSuchPage {
        /// The memory's number.
        memory: u32,
        /// The page's.
        page: u64,
    },
    /// The disk, or a quota, is full.
    #[error("no space for {needed} bytes more, after {written} were stored")]
    NoSpace {
        /// Bytes of the write that found no room. More may have been to follow.
        needed: u64,
        /// Bytes that were stored before.
        written: u64,
    },
    /// A system call failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// More than the format holds.
    #[error("{what}: {found}, at most {most}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: u64,
        /// How much there may be.
        most: u64,
    },
    /// A memory, a page or a section was given to the writer twice.
    #[error("{what} was given twice")]
    Twice {
        /// What.
        what: String,
    },
    /// A write failed before; what was to be written is given up.
    #[error("an earlier write of this image failed")]
    Failed,
    /// A file that is to be written is not empty.
    #[error("the file is not empty: {length} bytes")]
    NotEmpty {
        /// Its length in bytes.
        length: u64,
    },
    /// A name that is not a file's or a section's here.
    #[error("{name:?} cannot be a name")]
    BadName {
        /// The name.
        name: String,
    },
    /// There is a file of that name, which is left alone.
    #[error("{} is there already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another writer is making a file of that name.
    #[error("{} is being written", path.display())]
    Busy {
        /// The name under which it is made.
        path: PathBuf,
    },
}

impl ImageError {
    /// Whether it is the file that is wrong, and neither the host nor the caller: another copy of
    /// it may be right, and trying again does not help.
    #[must_use]
    pub fn is_of_the_file(&self) -> bool {
        matches!(
            self,
            Self::NotAnImage
                | Self::Version { .. }
                | Self::Feature { .. }
                | Self::Truncated { .. }
                | Self::Corrupt { .. }
        )
    }

    pub(crate) fn corrupt(what: &'static str, offset: u64) -> Self {
        Self::Corrupt { what, offset }
    }

    /// For `map_err`.
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

fn wanted_length(expected: Option<u64>) -> String {
    match expected {
        Some(expected) => format!("of {expected}"),
        None => "without the end".to_owned(),
    }
}

fn or_nothing(name: Option<ImageName>) -> String {
    name.map_or_else(|| "nothing".to_owned(), |name| name.to_string())
}
