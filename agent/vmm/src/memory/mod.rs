//! Guest memory, whoever runs the guest: one memfd a slot, mapped twice.
//!
//! | file | what |
//! |---|---|
//! | `backing` | the memfd |
//! | `view` | its two mappings: the guest's, and that of our own threads |
//! | `region` | a backing with its views |
//! | `slots` | the slot table |
//! | `place` | placing pages and reading them, through our own view |
//! | `digest` | whether two memories are equal |
//! | `dirty` | which pages were written, and who has yet to hear of it |
//!
//! Nothing here knows backends, guests or the machine.

mod backing;
mod digest;
mod dirty;
mod place;
mod region;
mod slots;
mod view;

#[cfg(test)]
pub(crate) use self::{digest::SlotDigest, region::Region, view::resident};
pub(crate) use self::{
    digest::{MemoryDigest, digest_page},
    dirty::{DirtyBatch, DirtyBitmap, DirtyError, DirtyLog, DirtySource, SlotBitmaps},
    slots::{GuestMemory, SlotMemory, SlotTable},
    view::{GuestView, HostView},
};
