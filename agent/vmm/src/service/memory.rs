//! `MemoryService` for the one VM of this process.

use slat_proto::{
    ApiError,
    model::{CursorName, SlotChange},
    v1::{
        DeleteDirtyCursorRequest, DeleteDirtyCursorResponse, DigestMemoryRequest,
        DigestMemoryResponse, GfnRange, HarvestDirtyPagesRequest, HarvestDirtyPagesResponse,
        InvalidateMemoryRequest, InvalidateMemoryResponse, ListSlotsRequest, ListSlotsResponse,
        UpdateSlotsRequest, UpdateSlotsResponse, digest_memory_response::SlotDigest,
        memory_service_server::MemoryService,
    },
};
use tonic::{Request, Response, Status};

use super::VmEndpoint;

/// Most changes in one UpdateSlots.
const MAX_CHANGES: usize = 64;
/// Most ranges in one harvest: about 2 MB, within gRPC's usual 4 MiB. What is left comes with the next harvest.
const MAX_RANGES: usize = 100_000;
/// The cursor of a caller that names none.
const DEFAULT_CURSOR: &str = "default";

fn cursor(name: &str) -> Result<CursorName, ApiError> {
    CursorName::from_id(if name.is_empty() {
        DEFAULT_CURSOR
    } else {
        name
    })
}

#[tonic::async_trait]
impl MemoryService for VmEndpoint {
    async fn list_slots(
        &self,
        request: Request<ListSlotsRequest>,
    ) -> Result<Response<ListSlotsResponse>, Status> {
        let (slots, generation) = self
            .on(&request.get_ref().vm, |machine| machine.list_slots())
            .await?;
        Ok(Response::new(ListSlotsResponse { slots, generation }))
    }

    async fn update_slots(
        &self,
        request: Request<UpdateSlotsRequest>,
    ) -> Result<Response<UpdateSlotsResponse>, Status> {
        let request = request.into_inner();
        if !(1..=MAX_CHANGES).contains(&request.changes.len()) {
            return Err(ApiError::bad_parameter(
                "changes",
                format_args!("{} changes; 1 to {MAX_CHANGES}", request.changes.len()),
            )
            .into());
        }
        let changes = request
            .changes
            .iter()
            .enumerate()
            .map(|(index, change)| {
                SlotChange::from_message(change).map_err(|error| error.with("change", index))
            })
            .collect::<Result<Vec<_>, ApiError>>()?;
        let (slots, generation) = self
            .on(&request.vm, move |machine| {
                let table = machine.update_slots(&changes, request.expected_generation)?;
                Ok(machine.show_slots(&table))
            })
            .await?;
        Ok(Response::new(UpdateSlotsResponse { slots, generation }))
    }

    async fn harvest_dirty_pages(
        &self,
        request: Request<HarvestDirtyPagesRequest>,
    ) -> Result<Response<HarvestDirtyPagesResponse>, Status> {
        let request = request.into_inner();
        let cursor = cursor(&request.cursor)?;
        let harvest = self
            .on(&request.vm, move |machine| {
                machine.check_dirty_readable()?;
                machine
                    .dirty()
                    .read_api(&cursor, request.acknowledge_batch, MAX_RANGES)
            })
            .await?;
        Ok(Response::new(HarvestDirtyPagesResponse {
            batch: harvest.batch,
            ranges: harvest
                .ranges
                .into_iter()
                .map(|(gfn, pages)| GfnRange { gfn, pages })
                .collect(),
            dirty_pages: harvest.pages,
            created: harvest.created,
        }))
    }

    async fn delete_dirty_cursor(
        &self,
        request: Request<DeleteDirtyCursorRequest>,
    ) -> Result<Response<DeleteDirtyCursorResponse>, Status> {
        let cursor = cursor(&request.get_ref().cursor)?;
        self.on(&request.get_ref().vm, move |machine| {
            machine.dirty().detach_api(&cursor)
        })
        .await?;
        Ok(Response::new(DeleteDirtyCursorResponse {}))
    }

    async fn invalidate_memory(
        &self,
        request: Request<InvalidateMemoryRequest>,
    ) -> Result<Response<InvalidateMemoryResponse>, Status> {
        let request = request.into_inner();
        let range = request.range.map(|range| (range.gfn, range.pages));
        let (pages, duration) = self
            .on(&request.vm, move |machine| machine.invalidate(range))
            .await?;
        Ok(Response::new(InvalidateMemoryResponse {
            pages,
            duration_nanos: u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX),
        }))
    }

    async fn digest_memory(
        &self,
        request: Request<DigestMemoryRequest>,
    ) -> Result<Response<DigestMemoryResponse>, Status> {
        let digest = self
            .on(&request.get_ref().vm, |machine| {
                machine.refuse_at_once("be digested")?;
                machine.digest()
            })
            .await?;
        Ok(Response::new(DigestMemoryResponse {
            slots: digest
                .slots
                .iter()
                .map(|slot| SlotDigest {
                    slot: slot.slot,
                    digest: format!("{:032x}", slot.digest),
                    pages: slot.pages,
                })
                .collect(),
            digest: format!("{:032x}", digest.total()),
        }))
    }
}
