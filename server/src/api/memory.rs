//! MemoryService: every call goes to the agent of the VM's owner.

use slat_proto::{
    model::{DirtyRateOrder, SlotChange, VmRef},
    v1::{self, memory_service_client::MemoryServiceClient, memory_service_server::MemoryService},
};
use tonic::{Request, Response, Status};

use super::{
    scope::scope_of,
    services::{Services, forwarded},
};

macro_rules! forward {
    ($self:ident, $request:ident, $call:ident) => {{
        let scope = scope_of(&$request);
        let mut message = $request.into_inner();
        let vm = VmRef::new(&message.vm, &message.uid, &message.host)?;
        let (owner, channel) = $self.route(&scope, &vm)?;
        message.vm = owner.vm.name;
        message.uid = owner.vm.uid;
        message.host.clear();
        MemoryServiceClient::new(channel)
            .$call(message)
            .await
            .map_err(|status| forwarded(&owner.host.name, status))
    }};
}

#[tonic::async_trait]
impl MemoryService for Services {
    async fn list_slots(
        &self,
        request: Request<v1::ListSlotsRequest>,
    ) -> Result<Response<v1::ListSlotsResponse>, Status> {
        forward!(self, request, list_slots)
    }

    async fn update_slots(
        &self,
        request: Request<v1::UpdateSlotsRequest>,
    ) -> Result<Response<v1::UpdateSlotsResponse>, Status> {
        // Checked here too: nobody's agent is bothered with what no agent can do.
        SlotChange::from_messages(&request.get_ref().changes)?;
        let message = request.get_ref();
        let vm = VmRef::new(&message.vm, &message.uid, &message.host)?;
        let found = self.find(&scope_of(&request), &vm)?;
        self.refuse_if_migrating(&found, "change slots")?;
        forward!(self, request, update_slots)
    }

    async fn harvest_dirty_pages(
        &self,
        request: Request<v1::HarvestDirtyPagesRequest>,
    ) -> Result<Response<v1::HarvestDirtyPagesResponse>, Status> {
        forward!(self, request, harvest_dirty_pages)
    }

    async fn delete_dirty_cursor(
        &self,
        request: Request<v1::DeleteDirtyCursorRequest>,
    ) -> Result<Response<v1::DeleteDirtyCursorResponse>, Status> {
        forward!(self, request, delete_dirty_cursor)
    }

    async fn list_dirty_cursors(
        &self,
        request: Request<v1::ListDirtyCursorsRequest>,
    ) -> Result<Response<v1::ListDirtyCursorsResponse>, Status> {
        forward!(self, request, list_dirty_cursors)
    }

    async fn measure_dirty_rate(
        &self,
        request: Request<v1::MeasureDirtyRateRequest>,
    ) -> Result<Response<v1::MeasureDirtyRateResponse>, Status> {
        DirtyRateOrder::from_message(request.get_ref())?;
        forward!(self, request, measure_dirty_rate)
    }

    async fn invalidate_memory(
        &self,
        request: Request<v1::InvalidateMemoryRequest>,
    ) -> Result<Response<v1::InvalidateMemoryResponse>, Status> {
        forward!(self, request, invalidate_memory)
    }

    async fn discard_memory(
        &self,
        request: Request<v1::DiscardMemoryRequest>,
    ) -> Result<Response<v1::DiscardMemoryResponse>, Status> {
        forward!(self, request, discard_memory)
    }

    async fn digest_memory(
        &self,
        request: Request<v1::DigestMemoryRequest>,
    ) -> Result<Response<v1::DigestMemoryResponse>, Status> {
        forward!(self, request, digest_memory)
    }
}
