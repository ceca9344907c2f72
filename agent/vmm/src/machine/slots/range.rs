//! What is done to ranges of guest frames: mappings dropped, pages discarded.
//!
//! # Discarding
//! The host's pages of a range are given back, and read zero from then on; reserved pages, which
//! nobody else could have, are overwritten with zeroes and kept. It is a write of the
//! host's, so the range is dirty for every cursor, under the same lock as a harvest: a migration in
//! precopy sends the zeroes. In the switchover it is refused; before, the switchover's beginning
//! waits for it, with the vCPUs running. The collapser waits too: it must not make a huge page of a
//! block while pages of it go.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use slat_paging::wire::Ask;
use slat_proto::{ApiError, v1};

use super::super::{Machine, view::State};
use crate::{
    backend::BackendError,
    memory::{SlotMemory, SlotTable},
};

/// Pages that are discarded between two looks at the dirty log: a harvest waits so long, 64 MiB.
const STEP: u64 = 1 << 14;

/// What became of a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Discarded {
    /// Pages in the ranges.
    pub(crate) pages: u64,
    /// By how much the memory of the slots became less, bytes.
    pub(crate) freed_bytes: u64,
    /// How long it took.
    pub(crate) took: Duration,
}

impl Machine {
    /// Drops the second-stage mappings of guest frames (first, pages), or of every slot. Contents
    /// stay. Returns the pages in the range and how long the backend took.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; CAPABILITY_MISSING; BAD_PARAMETER when the range is empty or not
    /// all of it lies in slots; the backend's.
    pub(crate) fn invalidate(
        &self,
        range: Option<(u64, u64)>,
    ) -> Result<(u64, Duration), ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        let backend = self.built_backend()?;
        if !backend.capabilities().contains(&v1::Capability::Invalidate) {
            return Err(ApiError::capability_missing(
                &self.shared.vm,
                v1::Capability::Invalidate,
            ));
        }
        let pieces = self.pieces(range)?;
        let started = Instant::now();
        let mut pages = 0;
        for (gfn, len) in pieces {
            if self.is_watched() {
                // What is mapped is the pager's to say.
                self.ask_pager(Ask::Unmap { gfn, pages: len })?;
            } else {
                backend.invalidate(gfn, len)?;
            }
            pages += len;
        }
        Ok((pages, started.elapsed()))
    }

    /// A range cut at slot boundaries, or every slot.
    ///
    /// # Errors
    /// BAD_PARAMETER when it is empty or not all of it lies in slots.
    pub(in crate::machine) fn pieces(
        &self,
        range: Option<(u64, u64)>,
    ) -> Result<Vec<(u64, u64)>, ApiError> {
        let table = self.memory.table();
        match range {
            Some((gfn, pages)) => within_slots(&table, gfn, pages),
            None => {
                let slots = table.slots().iter().map(|slot| slot.spec());
                Ok(slots.map(|spec| (spec.base_gfn, spec.pages)).collect())
            }
        }
    }

    /// Gives the host's pages of ranges of frames (first, pages) back.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; MIGRATION_IN_PROGRESS in a switchover; VM_STATE while the VM is
    /// received, and while it is held for a snapshot whose reader reads the very memory;
    /// BAD_PARAMETER with the `range` at fault (from 0) when it is empty or not all of it
    /// lies in slots. Nothing is discarded then. The kernel's: ranges before, and some of this one,
    /// are.
    pub(crate) fn discard(&self, ranges: &[(u64, u64)]) -> Result<Discarded, ApiError> {
        self.refuse_at_once("discard memory")?;
        let _control = self.control();
        // Under the lock: the switchover may have begun while this waited for it.
        self.refuse_at_once("discard memory")?;
        self.check_memory_here("discard memory")?;
        self.refuse_held(&self.shared.view(), "discard memory")?;
        let table = self.memory.table();
        let mut pieces = Vec::new();
        for (index, (gfn, pages)) in ranges.iter().enumerate() {
            let within = within_slots(&table, *gfn, *pages);
            pieces.extend(within.map_err(|error| error.with("range", index))?);
        }
        let started = Instant::now();
        let _collapser = self
            .collapser
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let touched: BTreeMap<u32, &Arc<SlotMemory>> = pieces
            .iter()
            .filter_map(|(gfn, _)| table.find(*gfn))
            .map(|(memory, _)| (memory.spec().slot, memory))
            .collect();
        let before = allocated(&touched)?;
        let mut pages = 0;
        for (gfn, len) in pieces {
            self.discard_piece(&table, gfn, len)?;
            pages += len;
        }
        Ok(Discarded {
            pages,
            freed_bytes: before.saturating_sub(allocated(&touched)?),
            took: started.elapsed(),
        })
    }

    /// Frames of one slot.
    fn discard_piece(&self, table: &SlotTable, gfn: u64, pages: u64) -> Result<(), ApiError> {
        let backend = self.built_backend()?;
        let Some((memory, first)) = table.find(gfn) else {
            return Ok(());
        };
        let (slot, end) = (memory.spec().slot, first + pages);
        let mut at = first;
        while at < end {
            let here = STEP.min(end - at);
            if self.is_watched() {
                memory.keep_small(at, here);
                let discard = Ask::Discard {
                    gfn: gfn + (at - first),
                    pages: here,
                };
                let gone = || self.ask_pager(discard);
                self.dirty
                    .written_by_host(slot, at, here, gone)
                    .map_err(|error| error.with("slot", slot))?;
                at += here;
                continue;
            }
            let gone = self
                .dirty
                .written_by_host(slot, at, here, || memory.discard(at, here));
            gone.map_err(kernel("fallocate(PUNCH_HOLE)"))
                .and_then(|()| Ok(backend.invalidate(gfn + (at - first), here)?))
                .map_err(|error| {
                    error
                        .with("slot", slot)
                        .with("gfn", gfn + (at - first))
                        .with("pages", here)
                })?;
            at += here;
        }
        Ok(())
    }
}

fn kernel(op: &'static str) -> impl Fn(std::io::Error) -> ApiError {
    move |source| BackendError::Ioctl { op, source }.into()
}

/// Bytes that the host has for these slots.
fn allocated(slots: &BTreeMap<u32, &Arc<SlotMemory>>) -> Result<u64, ApiError> {
    let bytes = slots.values().map(|memory| memory.allocated());
    bytes
        .sum::<std::io::Result<u64>>()
        .map_err(kernel("fstat of guest memory"))
}

/// `[gfn, gfn + pages)` cut at slot boundaries, when all of it lies in slots.
fn within_slots(table: &SlotTable, gfn: u64, pages: u64) -> Result<Vec<(u64, u64)>, ApiError> {
    let bad = |message: String| {
        ApiError::bad_parameter("range", message)
            .with("gfn", gfn)
            .with("pages", pages)
    };
    let end = gfn
        .checked_add(pages)
        .filter(|_| pages > 0)
        .ok_or_else(|| bad(format!("{pages} pages from frame {gfn:#x} are no range")))?;
    let mut pieces = Vec::new();
    let mut at = gfn;
    while at < end {
        let (slot, _) = table
            .find(at)
            .ok_or_else(|| bad(format!("frame {at:#x} is in no slot")))?;
        let to = slot.spec().end_gfn().min(end);
        pieces.push((at, to - at));
        at = to;
    }
    Ok(pieces)
}
