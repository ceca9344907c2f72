//! Dirty pages have readers, not one owner.
//!
//! Reading which pages are dirty is destructive: who reads it owns it. So one reads it, the log,
//! and keeps a cursor for each reader.
//!
//! | file | what |
//! |---|---|
//! | `bitmap` | which pages of a slot are dirty, with a summary that skips clean regions |
//! | `source` | [`DirtySource`]: what a backend offers below the log |
//! | `batch` | what a reader is given |
//! | `cursor` | one reader: what it is owed, what it has not acknowledged |
//! | `log` | [`DirtyLog`]: readers, slots, harvests |

mod batch;
mod bitmap;
mod cursor;
mod log;
mod source;

pub(crate) use self::{
    batch::DirtyBatch,
    bitmap::DirtyBitmap,
    cursor::Share,
    log::DirtyLog,
    log::WINDOW as DIRTY_WINDOW,
    source::{DirtyError, DirtySource, SlotBitmaps},
};
