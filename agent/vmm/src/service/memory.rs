//! `MemoryService` for the one VM of this process.

use std::sync::Arc;

use slat_proto::{
    ApiError,
    model::{CursorName, DirtyRateOrder, SlotChange},
    v1::{
        DeleteDirtyCursorRequest, DeleteDirtyCursorResponse, DigestMemoryRequest,
        DigestMemoryResponse, DirtyFormat, DiscardMemoryRequest, DiscardMemoryResponse,
        HarvestDirtyPagesRequest, HarvestDirtyPagesResponse, InvalidateMemoryRequest,
        InvalidateMemoryResponse, ListDirtyCursorsRequest, ListDirtyCursorsResponse,
        ListSlotsRequest, ListSlotsResponse, MeasureDirtyRateRequest, MeasureDirtyRateResponse,
        UpdateSlotsRequest, UpdateSlotsResponse, memory_service_server::MemoryService,
    },
};
use tonic::{Request, Response, Status};

use super::{endpoint::VmEndpoint, monitor::CancelOnDrop, vm::named};

/// Most ranges in one DiscardMemory.
const MAX_DISCARDED: usize = 1024;
/// Most ranges in one harvest: about 2 MB, within gRPC's usual 4 MiB. What is left comes with the
/// next harvest.
const MAX_RANGES: usize = 100_000;
/// Most pieces of a bitmap in one harvest: 2 MB, 62 GiB of memory.
const MAX_PIECES: usize = 500;
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
        let listed = self.shortly_on(named!(request.get_ref(), vm), |monitor| {
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
        let changes = SlotChange::from_messages(&request.changes)?;
        let expected = request.expected_generation;
        let at_once = self.at_once(named!(&request, vm), |monitor| {
            let updated = monitor.update_slots_at_once(&changes, expected);
            updated.transpose()
        });
        let mut answer = if let Some(answer) = at_once? {
            answer
        } else {
            let updated = self.shortly_on(named!(&request, vm), move |monitor| {
                monitor.update_slots(&changes, expected)
            });
            updated.await?
        };
        answer.uid = self.uid();
        Ok(Response::new(answer))
    }

    async fn harvest_dirty_pages(
        &self,
        request: Request<HarvestDirtyPagesRequest>,
    ) -> Result<Response<HarvestDirtyPagesResponse>, Status> {
        let request = request.into_inner();
        let cursor = cursor(&request.cursor)?;
        let format = DirtyFormat::try_from(request.format).map_err(|_| {
            ApiError::bad_parameter("format", format_args!("{} is no format", request.format))
        })?;
        let limit = match format {
            DirtyFormat::Unspecified | DirtyFormat::Ranges => MAX_RANGES,
            DirtyFormat::Bitmap => MAX_PIECES,
        };
        let most = match request.max_items as usize {
            0 => limit,
            asked => asked.min(limit),
        };
        let harvest = self.shortly_on(named!(&request, vm), move |monitor| {
            monitor.harvest_dirty_pages(&cursor, request.acknowledge_batch, format, most)
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
        self.shortly_on(named!(request.get_ref(), vm), move |monitor| {
            monitor.delete_dirty_cursor(&cursor)
        })
        .await?;
        Ok(Response::new(DeleteDirtyCursorResponse { uid: self.uid() }))
    }

    async fn list_dirty_cursors(
        &self,
        request: Request<ListDirtyCursorsRequest>,
    ) -> Result<Response<ListDirtyCursorsResponse>, Status> {
        let listed = self.shortly_on(named!(request.get_ref(), vm), |monitor| {
            monitor.list_dirty_cursors()
        });
        let mut answer = listed.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
    }

    async fn measure_dirty_rate(
        &self,
        request: Request<MeasureDirtyRateRequest>,
    ) -> Result<Response<MeasureDirtyRateResponse>, Status> {
        let request = request.into_inner();
        let order = DirtyRateOrder::from_message(&request)?;
        // Dropped with this handler when the caller leaves.
        let caller = CancelOnDrop::default();
        let cancel = Arc::clone(&caller.0);
        let measured = self.on(named!(&request, vm), move |monitor| {
            monitor.measure_dirty_rate(order, &cancel)
        });
        let mut answer = measured.await?;
        answer.uid = self.uid();
        Ok(Response::new(answer))
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

    async fn discard_memory(
        &self,
        request: Request<DiscardMemoryRequest>,
    ) -> Result<Response<DiscardMemoryResponse>, Status> {
        let request = request.into_inner();
        if !(1..=MAX_DISCARDED).contains(&request.ranges.len()) {
            return Err(ApiError::bad_parameter(
                "ranges",
                format_args!("has {} entries; 1 to {MAX_DISCARDED}", request.ranges.len()),
            )
            .with("value", request.ranges.len())
            .with("limit", MAX_DISCARDED)
            .into());
        }
        let ranges = request.ranges.clone();
        let discarded = self.on(named!(&request, vm), move |monitor| {
            monitor.discard(&ranges)
        });
        let mut answer = discarded.await?;
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
