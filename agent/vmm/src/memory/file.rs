//! The memory file of a slot, for another process: a pager, or whoever reads a snapshot.
//!
//! It holds the file and its pages, whatever becomes of the slot and of its views.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use super::backing::Backing;

/// A memory file, or a part of one. A clone is the same.
#[derive(Clone, Debug)]
pub(crate) struct MemoryFile(Arc<Backing>);

impl MemoryFile {
    pub(super) fn new(backing: &Arc<Backing>) -> Self {
        Self(Arc::clone(backing))
    }

    /// Its first byte in the file.
    #[must_use]
    pub(crate) fn start(&self) -> u64 {
        self.0.start()
    }

    /// Says that another process reads it from now on, also when this one is gone.
    pub(crate) fn lend(&self) {
        self.0.lend();
    }

    /// Whether both are the same memory.
    #[must_use]
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd().as_fd()
    }
}
