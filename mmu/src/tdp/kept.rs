//! A slot as a vCPU remembers it from one fault to the next.
//!
//! Made and used by `nearby`; believed only while the generation of slots is the one in which it
//! was found.

use alloc::sync::Arc;

use crate::slot::Memslot;

/// A slot as a vCPU remembers it.
#[derive(Debug)]
pub(super) struct KeptSlot {
    pub(super) slot: Arc<Memslot>,
    /// The generation of slots in which it was found.
    pub(super) generation: u64,
    /// The slot's place again, where it is at hand.
    pub(super) base: u64,
    pub(super) npages: u64,
    /// The 4 KiB entries for the slot's first page: of a read or fetch, and of a write. 0: not to
    /// be used.
    pub(super) read: Template,
    pub(super) write: Template,
    /// Nothing coarser than 4 KiB is mapped anywhere in it, as long as slots stay as they are.
    pub(super) small: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Template {
    pub(super) raw: u64,
    /// The page counts as written.
    pub(super) dirties: bool,
}
