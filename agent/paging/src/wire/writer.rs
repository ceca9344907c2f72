//! Between an agent and the process that writes a saved VM's file.
//!
//! The agent starts the writer with its end of a socket pair as descriptor [`WRITER_FD`], says
//! [`ToWriter::Begin`], the sections, the memories, the layers with theirs, and [`ToWriter::Go`].
//! The writer says how far it is, and at last [`FromWriter::Done`] or [`FromWriter::Failed`], and
//! ends. A writer whose socket ends, ends. The file has no name while it is written; the agent
//! gives it one.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::{
    layer::{Layer, LayerMemory},
    problem::Problem,
};

/// The writer's end of the socket.
pub const WRITER_FD: RawFd = 3;

/// From an agent to a writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWriter {
    /// The first message. Descriptor: the file, empty, open to write and read.
    Begin {
        /// What to call the file where something is wrong with it.
        name: String,
        /// zstd's level; 0: not packed.
        zstd_level: u32,
        /// The save that this one builds on and those below it, the nearest first; as many
        /// descriptors follow the file's. Empty: all pages are written.
        bases: Vec<String>,
    },
    /// A section. Descriptor: a memfd with its contents.
    Section {
        /// Its name.
        name: String,
        /// The version of its contents.
        version: u32,
        /// Whoever does not know it may go on without.
        optional: bool,
    },
    /// A memory to be written, by its slot's number, which is also its number in the first layer.
    Memory {
        /// The slot's number.
        number: u32,
        /// Its length.
        pages: u64,
    },
    /// The next layer of where pages are, with its descriptors.
    Layer(Layer),
    /// A memory of the layer before, with its descriptors.
    LayerMemory(LayerMemory),
    /// That was all: write.
    Go,
}

/// How far a file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Pages that were looked at.
    pub done: u64,
    /// Of so many.
    pub all: u64,
    /// Pages of zeroes and pages that were never touched, among those.
    pub empty: u64,
    /// Pages that are in the file.
    pub pages: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// From a writer to its agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWriter {
    /// How far it is; at most four times a second.
    Progress(Written),
    /// The file is whole and durable.
    Done(Written),
    /// There will be no file.
    Failed(Problem),
}
