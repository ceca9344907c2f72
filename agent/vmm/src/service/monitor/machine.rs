//! Our own machine as a monitor.

use std::{future::Future, pin::Pin};

use slat_proto::{
    ApiError,
    model::{CursorName, HostName, SlotChange, VmName, VmSpec},
    v1::{self, digest_memory_response::SlotDigest},
};
use tokio::sync::watch;

use super::Monitor;
use crate::machine::Machine;

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
        let (slots, generation) = self.list_slots()?;
        Ok(v1::ListSlotsResponse {
            slots,
            generation,
            ..Default::default()
        })
    }

    fn update_slots(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Result<v1::UpdateSlotsResponse, ApiError> {
        let table = self.update_slots(changes, expected_generation)?;
        let (slots, generation) = self.show_slots(&table);
        Ok(v1::UpdateSlotsResponse {
            slots,
            generation,
            ..Default::default()
        })
    }

    fn harvest_dirty_pages(
        &self,
        cursor: &CursorName,
        acknowledge: u64,
        most_ranges: usize,
    ) -> Result<v1::HarvestDirtyPagesResponse, ApiError> {
        self.check_dirty_readable()?;
        let harvest = self.dirty().read_api(cursor, acknowledge, most_ranges)?;
        let ranges = harvest.ranges.into_iter();
        Ok(v1::HarvestDirtyPagesResponse {
            batch: harvest.batch,
            ranges: ranges
                .map(|(gfn, pages)| v1::GfnRange { gfn, pages })
                .collect(),
            dirty_pages: harvest.pages,
            created: harvest.created,
            ..Default::default()
        })
    }

    fn delete_dirty_cursor(&self, cursor: &CursorName) -> Result<(), ApiError> {
        self.dirty().detach_api(cursor)
    }

    fn invalidate(
        &self,
        range: Option<v1::GfnRange>,
    ) -> Result<v1::InvalidateMemoryResponse, ApiError> {
        let range = range.map(|range| (range.gfn, range.pages));
        let (pages, duration) = self.invalidate(range)?;
        Ok(v1::InvalidateMemoryResponse {
            pages,
            duration_nanos: u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX),
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
}
