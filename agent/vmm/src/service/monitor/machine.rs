//! Our own machine as a monitor.

use std::{
    future::Future,
    pin::Pin,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError,
    model::{CursorName, DirtyRateOrder, HostName, SlotChange, VmName, VmSpec},
    v1::{self, DirtyFormat, digest_memory_response::SlotDigest, list_mappings_response::Run},
};
use tokio::sync::watch;

use super::{Cancel, CopySpec, HarvestOrder, Monitor, copies};
use crate::{
    machine::{Machine, SlotUpdate},
    memory::Share,
};

/// Words of a bitmap in one piece of an answer: 4 KiB, 128 MiB of memory.
const PIECE_WORDS: usize = 512;

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn updated(machine: &Machine, update: &SlotUpdate) -> v1::UpdateSlotsResponse {
    let (slots, generation) = machine.show_slots(&update.table);
    v1::UpdateSlotsResponse {
        slots,
        generation,
        paused_nanos: nanos(update.paused),
        duration_nanos: nanos(update.took),
        ..Default::default()
    }
}

impl Monitor for Machine {
    fn name(&self) -> &VmName {
        self.name()
    }

    fn uid(&self) -> Option<String> {
        self.uid()
    }

    fn host(&self) -> &HostName {
        self.host()
    }

    fn snapshot(&self) -> Option<v1::Vm> {
        self.snapshot()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.watch()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let exited = self.exited();
        Box::pin(async move {
            exited.await;
        })
    }

    fn plan(&self, spec: &VmSpec) -> Result<VmSpec, ApiError> {
        self.plan(spec)
    }

    fn create(&self, spec: VmSpec) -> Result<v1::Vm, ApiError> {
        self.create(spec)
    }

    fn start(&self) -> Result<v1::Vm, ApiError> {
        self.start()
    }

    fn pause(&self) -> Result<v1::Vm, ApiError> {
        self.pause()
    }

    fn resume(&self) -> Result<v1::Vm, ApiError> {
        self.resume()
    }

    fn delete(&self) -> Result<(), ApiError> {
        self.delete()
    }

    fn list_slots(&self) -> Result<v1::ListSlotsResponse, ApiError> {
        self.list_slots()
    }

    fn update_slots(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Result<v1::UpdateSlotsResponse, ApiError> {
        let update = self.update_slots(changes, expected_generation)?;
        Ok(updated(self, &update))
    }

    fn update_slots_at_once(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Option<Result<v1::UpdateSlotsResponse, ApiError>> {
        let update = self.update_slots_at_once(changes, expected_generation)?;
        Some(update.map(|update| updated(self, &update)))
    }

    fn harvest_dirty_pages(
        &self,
        cursor: &CursorName,
        acknowledge: u64,
        format: DirtyFormat,
        most: usize,
    ) -> Result<v1::HarvestDirtyPagesResponse, ApiError> {
        let begun = Instant::now();
        self.check_dirty_readable()?;
        let share = match format {
            DirtyFormat::Unspecified | DirtyFormat::Ranges => Share::Runs(most),
            DirtyFormat::Bitmap => Share::Pieces {
                words: PIECE_WORDS,
                most,
            },
        };
        let harvest = self.dirty().read_api(cursor, acknowledge, share)?;
        let ranges = harvest.ranges.into_iter();
        let pieces = harvest.pieces.into_iter();
        Ok(v1::HarvestDirtyPagesResponse {
            batch: harvest.batch,
            ranges: ranges
                .map(|(gfn, pages)| v1::GfnRange { gfn, pages })
                .collect(),
            dirty_pages: harvest.pages,
            created: harvest.created,
            bitmaps: pieces
                .map(|(gfn, bits)| v1::DirtyBits { gfn, bits })
                .collect(),
            more: harvest.more,
            duration_nanos: nanos(begun.elapsed()),
            ..Default::default()
        })
    }

    fn delete_dirty_cursor(&self, cursor: &CursorName) -> Result<(), ApiError> {
        self.dirty().detach_api(cursor)
    }

    fn list_dirty_cursors(&self) -> Result<v1::ListDirtyCursorsResponse, ApiError> {
        self.check_dirty_readable()?;
        Ok(self.dirty().list(Instant::now()))
    }

    fn measure_dirty_rate(
        &self,
        order: DirtyRateOrder,
        cancel: &Cancel,
    ) -> Result<v1::MeasureDirtyRateResponse, ApiError> {
        self.measure_dirty_rate(order, &|duration| cancel.wait(duration))
    }

    fn invalidate(
        &self,
        range: Option<v1::GfnRange>,
    ) -> Result<v1::InvalidateMemoryResponse, ApiError> {
        let range = range.map(|range| (range.gfn, range.pages));
        let (pages, duration) = self.invalidate(range)?;
        Ok(v1::InvalidateMemoryResponse {
            pages,
            duration_nanos: nanos(duration),
            ..Default::default()
        })
    }

    fn discard(&self, ranges: &[v1::GfnRange]) -> Result<v1::DiscardMemoryResponse, ApiError> {
        let ranges: Vec<(u64, u64)> = ranges.iter().map(|at| (at.gfn, at.pages)).collect();
        let discarded = self.discard(&ranges)?;
        Ok(v1::DiscardMemoryResponse {
            pages: discarded.pages,
            freed_bytes: discarded.freed_bytes,
            duration_nanos: nanos(discarded.took),
            ..Default::default()
        })
    }

    fn digest(&self) -> Result<v1::DigestMemoryResponse, ApiError> {
        self.refuse_at_once("be digested")?;
        let digest = self.digest()?;
        let slots = digest.slots.iter().map(|slot| SlotDigest {
            slot: slot.slot,
            digest: format!("{:032x}", slot.digest),
            pages: slot.pages,
        });
        Ok(v1::DigestMemoryResponse {
            slots: slots.collect(),
            digest: format!("{:032x}", digest.total()),
            ..Default::default()
        })
    }

    fn retry_page_source(&self) -> Result<v1::Vm, ApiError> {
        self.retry_page_source()
    }

    fn harvest_working_set(
        &self,
        order: HarvestOrder,
    ) -> Result<v1::HarvestWorkingSetResponse, ApiError> {
        let range = order.range.map(|range| (range.gfn, range.pages));
        let begun = Instant::now();
        let (runs, created) = match &order.reader {
            None => (self.harvest_working_set(range)?.0, false),
            Some(reader) => self.harvest_for_reader(reader, range, order.end)?,
        };
        Ok(v1::HarvestWorkingSetResponse {
            created,
            pages: runs.iter().map(|(_, pages)| pages).sum(),
            ranges: runs
                .into_iter()
                .map(|(gfn, pages)| v1::GfnRange { gfn, pages })
                .collect(),
            duration_nanos: nanos(begun.elapsed()),
        })
    }

    fn list_mappings(&self, from_gfn: u64) -> Result<v1::ListMappingsResponse, ApiError> {
        let (runs, next) = self.list_mappings(from_gfn)?;
        let runs = runs.into_iter().map(|run| Run {
            gfn: run.gfn,
            pages: run.pages,
            writable: run.writable,
        });
        Ok(v1::ListMappingsResponse {
            runs: runs.collect(),
            next_gfn: next.unwrap_or(0),
        })
    }

    fn prefault_memory(
        &self,
        gfn: u64,
        pages: u64,
    ) -> Result<v1::PrefaultMemoryResponse, ApiError> {
        let begun = Instant::now();
        let (done, next) = self.prefault_memory(gfn, pages)?;
        Ok(v1::PrefaultMemoryResponse {
            pages: done,
            next_gfn: next.unwrap_or(0),
            duration_nanos: nanos(begun.elapsed()),
        })
    }

    fn take_snapshot(
        &self,
        purpose: &str,
        may_pause: bool,
    ) -> Result<v1::TakeSnapshotResponse, ApiError> {
        copies::take(self, purpose, may_pause)
    }

    fn build_copy(&self, copy: &CopySpec) -> Result<v1::Vm, ApiError> {
        copies::build(self, copy)
    }
}
