//! Where pages come from: a port, and what fills it in a real pager.
//!
//! A source is a [`Chain`] of layers, youngest first: saved files and snapshots of other VMs, and
//! zeroes at the end. Reads block, for as long as a disk or a network takes, so they are made by
//! threads that do nothing else, and somebody looks at how long they take.

mod chain;
mod contents;
mod file;
mod port;
mod snapshot;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    chain::{Chain, ChainBuilder},
    file::{FileLayer, open as open_files, trouble},
};
pub use self::{contents::Contents, port::Source};
