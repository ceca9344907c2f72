//! MemoryService at the agent: forwarded to the VM's process. The agent itself only accounts for
//! memory: what a change adds is reserved before the change is made.

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{PAGE_SIZE, SlotChange, ordinary_bytes},
    v1::{self, memory_service_server::MemoryService, slot_change::Change},
};
use tonic::{Request, Response, Status};

use super::{
    living::QUICK,
    registry::Refusal,
    supervisor::{Supervisor, living_meant, no_memory, slot_bytes},
};

/// The service.
#[derive(Debug)]
pub(super) struct Memory(pub(super) Arc<Supervisor>);

/// Bytes that the slots a request adds would take. Each slot has been checked by itself; their sum
/// must only not wrap.
fn added(request: &v1::UpdateSlotsRequest) -> u64 {
    let pages = request.changes.iter().map(|change| match &change.change {
        Some(Change::Create(create)) => create.slot.as_ref().map_or(0, |slot| slot.pages),
        _ => 0,
    });
    pages
        .fold(0_u64, u64::saturating_add)
        .saturating_mul(PAGE_SIZE)
}

#[tonic::async_trait]
impl MemoryService for Memory {
    async fn list_slots(
        &self,
        request: Request<v1::ListSlotsRequest>,
    ) -> Result<Response<v1::ListSlotsResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        let answer = live.answer(QUICK, client.list_slots(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn update_slots(
        &self,
        request: Request<v1::UpdateSlotsRequest>,
    ) -> Result<Response<v1::UpdateSlotsResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        // An invalid slot is refused before memory is counted, so that the answer names the slot.
        SlotChange::from_messages(&request.changes)?;
        let spec = live.snapshot().and_then(|vm| vm.spec);
        let counted = move |bytes| ordinary_bytes(spec.as_ref(), bytes);
        let more = counted(added(&request));
        if let Err(refusal) = self.0.registry.grow(&live, more) {
            let error = match refusal {
                Refusal::NoMemory { needed, free } => {
                    no_memory(live.name(), Reason::NoMemory, needed, free)
                }
                Refusal::Held(_) | Refusal::Name(..) => ApiError::no_such_vm(live.name()),
            };
            return Err(error.into());
        }
        let registry = Arc::clone(&self.0.registry);
        let work = async move {
            let mut client = live.memory();
            let list = v1::ListSlotsRequest {
                vm: request.vm.clone(),
                uid: request.uid.clone(),
                ..Default::default()
            };
            let answer = live.answer_long(client.update_slots(request)).await;
            match &answer {
                Ok(table) => registry.set_memory(&live, counted(slot_bytes(&table.slots))),
                // Not known whether it was done: the reservation stays until the next change or the
                // VM's end.
                Err(error) if error.reason == Reason::VmUnreachable => {}
                // Some of it may have been done: what there is now counts.
                Err(error) if error.reason == Reason::Internal => {
                    if let Ok(table) = live.answer(QUICK, client.list_slots(list)).await {
                        registry.set_memory(&live, counted(slot_bytes(&table.slots)));
                    }
                }
                Err(_) => registry.shrink(&live, more),
            }
            answer
        };
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn harvest_dirty_pages(
        &self,
        request: Request<v1::HarvestDirtyPagesRequest>,
    ) -> Result<Response<v1::HarvestDirtyPagesResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        let answer = live.answer_long(client.harvest_dirty_pages(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn delete_dirty_cursor(
        &self,
        request: Request<v1::DeleteDirtyCursorRequest>,
    ) -> Result<Response<v1::DeleteDirtyCursorResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        let answer = live.answer_long(client.delete_dirty_cursor(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn list_dirty_cursors(
        &self,
        request: Request<v1::ListDirtyCursorsRequest>,
    ) -> Result<Response<v1::ListDirtyCursorsResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        Ok(Response::new(
            live.answer(QUICK, client.list_dirty_cursors(request))
                .await?,
        ))
    }

    async fn measure_dirty_rate(
        &self,
        request: Request<v1::MeasureDirtyRateRequest>,
    ) -> Result<Response<v1::MeasureDirtyRateResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        Ok(Response::new(
            live.answer_long(client.measure_dirty_rate(request)).await?,
        ))
    }

    async fn invalidate_memory(
        &self,
        request: Request<v1::InvalidateMemoryRequest>,
    ) -> Result<Response<v1::InvalidateMemoryResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        let answer = live.answer_long(client.invalidate_memory(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn discard_memory(
        &self,
        request: Request<v1::DiscardMemoryRequest>,
    ) -> Result<Response<v1::DiscardMemoryResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        Ok(Response::new(
            live.answer_long(client.discard_memory(request)).await?,
        ))
    }

    async fn digest_memory(
        &self,
        request: Request<v1::DigestMemoryRequest>,
    ) -> Result<Response<v1::DigestMemoryResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, vm);
        let mut client = live.memory();
        let answer = live.answer_long(client.digest_memory(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }
}
