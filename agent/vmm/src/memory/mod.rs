//! Guest memory: one memfd a slot, mapped shared for as long as anyone holds the slot.

mod digest;
mod dirty;
mod mapping;
mod slots;

#[cfg(test)]
pub(crate) use digest::SlotDigest;
pub(crate) use digest::{MemoryDigest, digest_page};
pub(crate) use dirty::{DirtyBatch, DirtyLog};
pub(crate) use mapping::Mapping;
pub(crate) use slots::{GuestMemory, SlotMemory, SlotTable};
