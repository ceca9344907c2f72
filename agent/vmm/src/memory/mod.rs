//! Guest memory, whoever runs the guest: one memfd a slot, or a part of one, mapped twice.
//!
//! | file | what |
//! |---|---|
//! | `mode` | which pages a VM's memory is to be made of, and what follows from it |
//! | `node` | NUMA nodes of this host |
//! | `pools` | the pages that this host set aside |
//! | `fits` | whether this host has such pages |
//! | `backing` | the memfd |
//! | `file` | that, for another process |
//! | `origin` | where its pages come from, when they come from elsewhere |
//! | `span` | a mapping, of several slots where small ones share a memfd |
//! | `view` | its two mappings: the guest's, and that of our own threads |
//! | `region` | a backing with its views |
//! | `huge` | which blocks of a region are 2 MiB pages, and which to try |
//! | `scan` | whether the kernel maps a block by one page |
//! | `made_of` | which pages it is made of, and why of small ones |
//! | `collapse` | huge pages for what the guest touched by itself |
//! | `slots` | the slot table |
//! | `place` | placing pages and reading them, through our own view |
//! | `fresh` | how long new memory takes to be there, for a benchmark |
//! | `populate` | making it real before it is used, by several threads |
//! | `sample` | how much of a random sample changes |
//! | `digest` | whether two memories are equal |
//! | `dirty` | which pages were written, and who has yet to hear of it |
//!
//! Nothing here knows backends, guests or the machine.

mod backing;
mod collapse;
mod digest;
mod dirty;
mod file;
mod fits;
mod fresh;
mod huge;
mod made_of;
mod mode;
mod node;
mod origin;
mod place;
mod pools;
mod populate;
mod region;
#[cfg(test)]
mod reserved;
mod sample;
mod scan;
mod slots;
mod span;
#[cfg(test)]
mod tests_modes;
mod view;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use self::digest::SlotDigest;
pub(crate) use self::{
    collapse::Collapser,
    digest::{MemoryDigest, digest_page},
    dirty::{
        DIRTY_WINDOW, DirtyBatch, DirtyBitmap, DirtyError, DirtyLog, DirtySource, Share,
        SlotBitmaps,
    },
    file::MemoryFile,
    fits::{check_mode, check_room, no_huge_pages},
    huge::BLOCK_BYTES,
    mode::Mode,
    origin::Origin,
    populate::Populate,
    sample::Sample,
    slots::{GuestMemory, SlotMemory, SlotTable},
    view::{GuestView, HostView},
};
pub use self::{
    fresh::{Filled, fill_fresh},
    pools::huge_page_pools,
};
#[cfg(test)]
pub(crate) use self::{region::Region, reserved::Reserved, view::resident};
