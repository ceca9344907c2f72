//! What an image consists of, as callers see it: its name, memories, pages, sections.
//!
//! A page is 4 KiB and has a number within its memory, from 0. A memory has a number of its own,
//! which is its slot's. Pages are stored in *clusters* of at most 16 neighbours.

use std::{fmt, str::FromStr};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// Most pages of a cluster. A cluster's pages are in the same 16: their numbers, divided by this,
/// are equal.
pub const CLUSTER_PAGES: usize = 16;

/// The contents of a page.
pub type Page = [u8; PAGE_SIZE];

/// Tells one image from all others. Whoever writes one chooses it at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub [u8; 16]);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One image with certain contents. An increment names its base by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageName {
    /// Of the image.
    pub id: ImageId,
    /// Checksum of its index, which has the checksums of all that is stored.
    pub index_sum: u64,
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.id, self.index_sum)
    }
}

/// A memory, as it is declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Its number: that of the VM's slot.
    pub number: u32,
    /// How many pages it has.
    pub pages: u64,
}

/// What an increment builds on, as its writer must know it. From [`crate::Reader::as_base`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Which image.
    pub name: ImageName,
    /// Its memories, by number.
    pub memories: Vec<MemorySpec>,
}

/// What a page is, all bases considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// It was never touched, and reads as zeroes.
    Hole,
    /// It has zeroes.
    Zero,
    /// It has contents, which are in the file or in one of its bases.
    Data,
}

/// What a writer is told of pages without contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    /// Never touched. What nobody says anything of is that, where there is no base.
    Hole,
    /// Zeroes.
    Zero,
    /// As in the base. What nobody says anything of is that, where the base has the page.
    Base,
}

/// Opaque bytes beside memory: the VM's spec, its slots, its vCPUs, whatever a caller puts there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// 1 to 32 lower-case letters, digits and hyphens.
    pub name: String,
    /// Of the contents.
    pub version: u32,
    /// Whoever does not know it may go on without. Nothing here looks at it.
    pub optional: bool,
    /// At most 16 MiB, and 64 MiB with the other sections.
    pub contents: Vec<u8>,
}

/// A section that is in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionInfo {
    /// As in [`Section`].
    pub name: String,
    /// Of the contents.
    pub version: u32,
    /// As in [`Section`].
    pub optional: bool,
    /// Of the contents, in bytes.
    pub length: u64,
}

/// How pages are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// As zstd frames, at this level (1 to 19 are usual). A cluster that would not become smaller
    /// is stored as it is.
    Zstd(i32),
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A text that says no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no compression: none, or zstd:LEVEL with a level from 1 to 19")]
pub struct NoCompression(String);

impl FromStr for Compression {
    type Err = NoCompression;

    fn from_str(text: &str) -> Result<Self, NoCompression> {
        if text == "none" {
            return Ok(Self::None);
        }
        text.strip_prefix("zstd:")
            .and_then(|level| level.parse().ok())
            .filter(|level| (1..=19).contains(level))
            .map(Self::Zstd)
            .ok_or_else(|| NoCompression(text.to_owned()))
    }
}

/// How an image is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Chosen at random.
    pub id: ImageId,
    /// How pages are stored.
    pub compression: Compression,
    /// What it builds on; `None`: it stands alone.
    pub base: Option<Base>,
}

/// How far a writer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pages that contents were given of, pages of zeroes among them, or that were marked.
    pub pages: u64,
    /// Of these, pages whose contents are stored.
    pub data_pages: u64,
    /// `data_pages` in bytes, before compression.
    pub logical_bytes: u64,
    /// Bytes of the file so far.
    pub stored_bytes: u64,
}

/// What a whole file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Which image it is.
    pub name: ImageName,
    /// What it builds on; `None`: it stands alone.
    pub base: Option<ImageName>,
    /// Version of the format.
    pub version: u32,
    /// Of the file, in bytes.
    pub length: u64,
    /// By number.
    pub memories: Vec<MemorySpec>,
    /// In the order in which they were added.
    pub sections: Vec<SectionInfo>,
    /// Pages whose contents are in this file, not in its bases.
    pub data_pages: u64,
    /// In how many clusters.
    pub clusters: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compression_is_what_its_text_says() {
        for compression in [
            Compression::None,
            Compression::Zstd(1),
            Compression::Zstd(19),
        ] {
            assert_eq!(compression.to_string().parse(), Ok(compression));
        }
        for text in ["", "zstd", "zstd:", "zstd:0", "zstd:20", "zstd:x", "lz4"] {
            assert!(text.parse::<Compression>().is_err(), "{text}");
        }
    }
}
