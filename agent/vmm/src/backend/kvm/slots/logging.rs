//! The dirty log of slots: turned on and off, harvested.
//!
//! # Protocol
//! With manual protection (the kernel's KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) a harvest has the kernel
//! write the log into the reader's bitmap and then clears exactly what it wrote: a page written in
//! between keeps its bit. Without it the kernel clears as it copies. With
//! KVM_DIRTY_LOG_INITIALLY_SET the kernel begins a log with every bit set and protects nothing: all
//! is cleared afterwards, in pieces, so that no vCPU waits for the protection of a whole slot, and
//! for a reader that goes over all memory first, just before it reads. A VM with dirty rings has no
//! bitmaps in the kernel: [`Rings`](super::super::ring::Rings) logs then.
//!
//! *Locking*: `table`, over every call of the kernel.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use kvm_ioctls::VmFd;

use super::{
    super::{
        super::BackendError,
        ioctl::{clear_dirty_log, get_dirty_log},
    },
    KvmSlot, Slots,
    log::{CLEAR_WORDS, Log, clear_all},
};
use crate::memory::{DirtyBitmap, DirtyError, SlotBitmaps};

impl Slots {
    /// Turns logging on or off. It begins with an empty log.
    pub(in super::super) fn set_logging(
        &self,
        vm: &VmFd,
        number: u32,
        on: bool,
    ) -> Result<(), DirtyError> {
        if !on || !self.begin_logging(vm, number)? {
            return self.switch_logging(vm, number, on);
        }
        let pages = {
            let mut table = self.lock();
            logged(&mut table, number)?.memory.spec().pages
        };
        self.protect(vm, number, 0, pages).inspect_err(|_| {
            if let Err(error) = self.switch_logging(vm, number, false) {
                tracing::error!(%error, slot = number, "dirty logging stays on");
            }
        })
    }

    /// Turns logging on with a full log, which [`Slots::protect`] is to empty; false, having done
    /// nothing, where the kernel begins with an empty one.
    pub(in super::super) fn begin_logging(
        &self,
        vm: &VmFd,
        number: u32,
    ) -> Result<bool, DirtyError> {
        if !matches!(self.log, Log::Bitmap { full: true, .. }) {
            return Ok(false);
        }
        let logs = {
            let mut table = self.lock();
            logged(&mut table, number)?.logging
        };
        if logs {
            return Ok(false);
        }
        self.switch_logging(vm, number, true).map(|()| true)
    }

    /// Clears pages `[first, first + pages)` of a log that began full, whatever is set.
    pub(in super::super) fn protect(
        &self,
        vm: &VmFd,
        number: u32,
        first: u64,
        pages: u64,
    ) -> Result<(), DirtyError> {
        let mut table = self.lock();
        logged(&mut table, number)?;
        clear_all(vm, number, first, pages)
    }

    fn switch_logging(&self, vm: &VmFd, number: u32, on: bool) -> Result<(), DirtyError> {
        let mut table = self.lock();
        let slot = logged(&mut table, number)?;
        if slot.logging == on {
            return Ok(());
        }
        let (rings, pages) = (self.rings(), slot.memory.spec().pages);
        if let Some(rings) = rings.filter(|_| on) {
            rings.begin(number, pages)?;
        }
        let done = self.set(vm, &slot.memory, pages, on);
        slot.logging = on == done.is_ok();
        if let Some(rings) = rings.filter(|_| !slot.logging) {
            rings.end(number);
        }
        done.map_err(|error| of_slot(number, error))
    }

    pub(in super::super) fn harvest(
        &self,
        vm: &VmFd,
        into: &mut SlotBitmaps,
    ) -> Result<(), DirtyError> {
        let mut table = self.lock();
        let Log::Bitmap { manual, .. } = self.log else {
            for number in into.keys() {
                logged(&mut table, *number)?;
            }
            let taken = self.rings().map_or(Ok(0), |rings| rings.harvest(into))?;
            self.harvested.fetch_add(taken, Ordering::Relaxed);
            return Ok(());
        };
        for (number, bitmap) in into {
            self.harvest_slot(vm, logged(&mut table, *number)?, bitmap, manual)?;
        }
        Ok(())
    }

    fn harvest_slot(
        &self,
        vm: &VmFd,
        slot: &KvmSlot,
        bitmap: &mut DirtyBitmap,
        manual: bool,
    ) -> Result<(), DirtyError> {
        let spec = slot.memory.spec();
        let (number, refused) = (spec.slot, |message: &str| DirtyError::Refused {
            slot: spec.slot,
            message: message.to_owned(),
        });
        if !slot.logging {
            return Err(refused("dirty logging is off"));
        }
        if bitmap.pages() != spec.pages {
            return Err(refused("a bitmap of another length"));
        }
        let kernel = |op| {
            move |source| DirtyError::Kernel {
                slot: number,
                op,
                source,
            }
        };
        // How many bits the kernel sets it does not say.
        let all = |()| u64::MAX;
        let taken = bitmap.load(|words| get_dirty_log(vm, number, spec.pages, words).map(all));
        // Without manual protection the log is taken by now: nothing below may fail then.
        let taken = taken.map_err(kernel("KVM_GET_DIRTY_LOG"))?;
        let mut from = 0;
        while manual && let Some((word, words)) = bitmap.next_piece(from, CLEAR_WORDS) {
            let first = word as u64 * 64;
            // At most 64 Ki; shorter only where the slot ends.
            let pages = (spec.pages - first).min(words.len() as u64 * 64) as u32;
            // What is not cleared is told again by the next harvest.
            clear_dirty_log(vm, number, first, pages, words)
                .map_err(kernel("KVM_CLEAR_DIRTY_LOG"))?;
            from = word + CLEAR_WORDS;
        }
        self.harvested.fetch_add(taken, Ordering::Relaxed);
        Ok(())
    }
}

fn logged(table: &mut BTreeMap<u32, KvmSlot>, slot: u32) -> Result<&mut KvmSlot, DirtyError> {
    table.get_mut(&slot).ok_or(DirtyError::NoSuchSlot { slot })
}

/// A change of a slot's flags was refused.
fn of_slot(slot: u32, error: BackendError) -> DirtyError {
    match error {
        BackendError::Ioctl { op, source } | BackendError::SlotCall { op, source, .. } => {
            DirtyError::Kernel { slot, op, source }
        }
        BackendError::BadSlot { message, .. } => DirtyError::Refused { slot, message },
        error => DirtyError::Refused {
            slot,
            message: error.to_string(),
        },
    }
}
