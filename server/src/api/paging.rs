//! PagingService: every call goes to the agent of the VM's owner.

use slat_proto::{
    model::VmRef,
    v1::{self, paging_service_client::PagingServiceClient, paging_service_server::PagingService},
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
        let vm = VmRef::new(&message.name, &message.uid, &message.host)?;
        let (owner, channel) = $self.route(&scope, &vm)?;
        message.name = owner.vm.name;
        message.uid = owner.vm.uid;
        message.host.clear();
        let host = owner.host.name;
        PagingServiceClient::new(channel)
            .$call(message)
            .await
            .map(|answer| (host.clone(), answer))
            .map_err(|status| forwarded(&host, status))?
    }};
}

#[tonic::async_trait]
impl PagingService for Services {
    async fn retry_page_source(
        &self,
        request: Request<v1::RetryPageSourceRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let scope = scope_of(&request);
        let (host, answer) = forward!(self, request, retry_page_source);
        let vm = self.noted(&host, answer.into_inner());
        Ok(Response::new(self.as_seen(&scope, self.with_migration(vm))))
    }

    async fn harvest_working_set(
        &self,
        request: Request<v1::HarvestWorkingSetRequest>,
    ) -> Result<Response<v1::HarvestWorkingSetResponse>, Status> {
        let (_, answer) = forward!(self, request, harvest_working_set);
        Ok(answer)
    }

    async fn list_mappings(
        &self,
        request: Request<v1::ListMappingsRequest>,
    ) -> Result<Response<v1::ListMappingsResponse>, Status> {
        let (_, answer) = forward!(self, request, list_mappings);
        Ok(answer)
    }

    async fn prefault_memory(
        &self,
        request: Request<v1::PrefaultMemoryRequest>,
    ) -> Result<Response<v1::PrefaultMemoryResponse>, Status> {
        let (_, answer) = forward!(self, request, prefault_memory);
        Ok(answer)
    }
}
