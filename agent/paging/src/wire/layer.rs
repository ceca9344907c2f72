//! Where pages come from, as it is handed from process to process.
//!
//! A page source is a chain of layers, youngest first; what none of them has is a page of zeroes. A
//! layer is a saved file or a snapshot of a VM's memory. A memory begins in the youngest layer
//! under its slot's number there (its *origin*); the layer's own memory says under which number it
//! goes on in the next.

use serde::{Deserialize, Serialize};

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// A saved file, and the files it builds on, the nearest first. Descriptors: these files.
    File {
        /// What to call it when something is wrong with it.
        name: String,
    },
    /// A snapshot; so many [`LayerMemory`] messages follow. Descriptor: the write end of its
    /// *lease*, a pipe. While anybody has it open the snapshot's pager goes on keeping pages.
    Snapshot {
        /// How many follow.
        memories: u32,
        /// The VM that it was taken of.
        name: String,
        /// Others read it, too: who does says of no page that it is not needed any more.
        #[serde(default)]
        shared: bool,
    },
}

/// One memory of a snapshot. Descriptors: the memory file, the kept file, the marks, and, when
/// `has_loaded`, the bitmap of pages that the memory file has from its own source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMemory {
    /// The number of its slot when the snapshot was taken.
    pub number: u32,
    /// Its length.
    pub pages: u64,
    /// The first byte in the memory file.
    pub file_start: u64,
    /// Its number in the next layer; `None`: what was not written is zeroes.
    pub origin: Option<u32>,
    /// Whether there is a bitmap of loaded pages; without, the memory file has all.
    pub has_loaded: bool,
}
