//! `MemoryService` for the one VM of this process.

use slat_proto::{
    ApiError,
    model::{CursorName, SlotChange},
    v1::{
        DeleteDirtyCursorRequest, DeleteDirtyCursorResponse, DigestMemoryRequest,
        DigestMemoryResponse, HarvestDirtyPagesRequest, HarvestDirtyPagesResponse,
        InvalidateMemoryRequest, InvalidateMemoryResponse, ListSlotsRequest, ListSlotsResponse,
        UpdateSlotsRequest, UpdateSlotsResponse, memory_service_server::MemoryService,
    },
};
use tonic::{Request, Response, Status};

use super::{endpoint::VmEndpoint, vm::named};

/// Most changes in one UpdateSlots.
const MAX_CHANGES: usize = 64;
/// Most ranges in one harvest: about 2 MB, within gRPC's usual 4 MiB. What is left comes with the
/// next harvest.
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
        let listed = self.on(named!(request.get_ref(), vm), |monitor| {
            monitor.list_slots()
        });
        let mut answer = listed.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
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
        let updated = self.on(named!(&request, vm), move |monitor| {
            monitor.update_slots(&changes, request.expected_generation)
        });
        let mut answer = updated.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
    }

    async fn harvest_dirty_pages(
        &self,
        request: Request<HarvestDirtyPagesRequest>,
    ) -> Result<Response<HarvestDirtyPagesResponse>, Status> {
        let request = request.into_inner();
        let cursor = cursor(&request.cursor)?;
        let harvest = self.on(named!(&request, vm), move |monitor| {
            monitor.harvest_dirty_pages(&cursor, request.acknowledge_batch, MAX_RANGES)
        });
        let mut answer = harvest.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
    }

    async fn delete_dirty_cursor(
        &self,
        request: Request<DeleteDirtyCursorRequest>,
    ) -> Result<Response<DeleteDirtyCursorResponse>, Status> {
        let cursor = cursor(&request.get_ref().cursor)?;
        self.on(named!(request.get_ref(), vm), move |monitor| {
            monitor.delete_dirty_cursor(&cursor)
        })
        .await?;
        Ok(Response::new(DeleteDirtyCursorResponse { uid: self.uid() }))
    }

    async fn invalidate_memory(
        &self,
        request: Request<InvalidateMemoryRequest>,
    ) -> Result<Response<InvalidateMemoryResponse>, Status> {
        let request = request.into_inner();
        let dropped = self.on(named!(&request, vm), move |monitor| {
            monitor.invalidate(request.range)
        });
        let mut answer = dropped.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
    }

    async fn digest_memory(
        &self,
        request: Request<DigestMemoryRequest>,
    ) -> Result<Response<DigestMemoryResponse>, Status> {
        let digest = self.on(named!(request.get_ref(), vm), |monitor| monitor.digest());
        let mut answer = digest.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
    }
}
