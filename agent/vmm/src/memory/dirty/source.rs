//! What knows which pages were written: KVM's bitmaps or rings, the software MMU's log.
//!
//! # Protocol
//! One reader, the dirty log, calls in order; vCPUs may run meanwhile.
//! [`DirtySource::harvest_dirty`] takes what was written since the last one in all slots that log,
//! and hands it over as bits of bitmaps that the log brings along: a source that keeps bitmaps
//! fills or swaps them, one that keeps entries (slot, page) sets a bit for each.
//!
//! A source of bounded capacity, such as a ring, may be full before it is harvested. That concerns
//! nobody but the source: the vCPU whose ring is full has left the guest, and its own thread moves
//! the entries into bitmaps that the source holds back, one a slot, and goes on. The next harvest
//! delivers those together with what the ring has. So nothing calls upwards, and a vCPU never waits
//! for a reader.
//!
//! # Invariants
//! A page written by a vCPU after a harvest returned is in the next harvest. A harvest returns only
//! after every stale writable translation is flushed. A page may be told of twice, never not at
//! all: what a harvest took before it failed is in the bitmaps, or comes with the next.

use std::{collections::BTreeMap, fmt, io};

use slat_proto::{ApiError, Reason};

use super::bitmap::DirtyBitmap;

/// Dirty pages by slot.
pub(crate) type SlotBitmaps = BTreeMap<u32, DirtyBitmap>;

/// Why a source did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirtyError {
    /// A kernel call failed.
    #[error("{op} failed: {source}")]
    Kernel {
        /// The slot it was for.
        slot: u32,
        /// The call, e.g. `KVM_GET_DIRTY_LOG`.
        op: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No slot of that number.
    #[error("no slot {slot}")]
    NoSuchSlot {
        /// The number asked for.
        slot: u32,
    },
    /// The source refuses it.
    #[error("slot {slot}: {message}")]
    Refused {
        /// The slot it was for.
        slot: u32,
        /// Why.
        message: String,
    },
}

impl From<DirtyError> for ApiError {
    fn from(error: DirtyError) -> Self {
        let message = error.to_string();
        match error {
            DirtyError::Kernel { slot, op, source } => ApiError::new(Reason::KvmIoctl, message)
                .with("op", op)
                .with("errno", source.raw_os_error().unwrap_or(0))
                .with("slot", slot),
            DirtyError::NoSuchSlot { slot } => {
                ApiError::new(Reason::NoSuchSlot, message).with("slot", slot)
            }
            DirtyError::Refused { slot, .. } => {
                ApiError::new(Reason::BadSlotTable, message).with("slot", slot)
            }
        }
    }
}

/// Tells which pages vCPUs wrote. See the module for the protocol.
pub(crate) trait DirtySource: Send + Sync + fmt::Debug {
    /// Turns dirty logging of a slot on or off. When it returns from turning on, every later write
    /// is logged; the log starts empty. Turning off restores huge mappings where it can.
    ///
    /// # Errors
    /// `NoSuchSlot`, or what prevents it; the slot's logging is then as it was.
    fn set_dirty_logging(&self, slot: u32, on: bool) -> Result<(), DirtyError>;

    /// As turning logging on, for a reader that goes over all memory first. True: pages are not
    /// protected, and a write to one is logged only after [`DirtySource::protect`] of it; a harvest
    /// must not come before every page is protected. False: this source cannot, and every write is
    /// logged as usual.
    ///
    /// # Errors
    /// As [`DirtySource::set_dirty_logging`].
    fn begin_dirty_logging(&self, slot: u32) -> Result<bool, DirtyError> {
        self.set_dirty_logging(slot, true).map(|()| false)
    }

    /// Protects pages `[first, first + pages)` after such a beginning: from the return on, a write
    /// to them is logged, and none from before. `first` is a multiple of 64; `pages` is too, unless
    /// the range ends with the slot.
    ///
    /// # Errors
    /// What prevents it; the pages may be protected or not.
    fn protect(&self, slot: u32, first: u64, pages: u64) -> Result<(), DirtyError> {
        let _ = (slot, first, pages);
        Ok(())
    }

    /// Takes the pages written since the last harvest, protects them again and flushes. `into` has
    /// an empty bitmap of the slot's length for every slot that logs, and for no other.
    ///
    /// # Errors
    /// The first slot's that failed. What was taken before is in `into`.
    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError>;
}
