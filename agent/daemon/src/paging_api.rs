//! PagingService at the agent: forwarded to the VM's process, which asks the VM's pager.

use std::sync::Arc;

use slat_proto::v1::{self, paging_service_server::PagingService};
use tonic::{Request, Response, Status};

use super::{
    living::QUICK,
    supervisor::{Supervisor, living_meant},
};

/// The service.
#[derive(Debug)]
pub(super) struct Pagings(pub(super) Arc<Supervisor>);

#[tonic::async_trait]
impl PagingService for Pagings {
    async fn retry_page_source(
        &self,
        request: Request<v1::RetryPageSourceRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.pagings();
        let answer = live.answer_long(client.retry_page_source(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn harvest_working_set(
        &self,
        request: Request<v1::HarvestWorkingSetRequest>,
    ) -> Result<Response<v1::HarvestWorkingSetResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.pagings();
        let answer = live.answer_long(client.harvest_working_set(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn list_mappings(
        &self,
        request: Request<v1::ListMappingsRequest>,
    ) -> Result<Response<v1::ListMappingsResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.pagings();
        let answer = live.answer(QUICK, client.list_mappings(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn prefault_memory(
        &self,
        request: Request<v1::PrefaultMemoryRequest>,
    ) -> Result<Response<v1::PrefaultMemoryResponse>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.pagings();
        let answer = live.answer_long(client.prefault_memory(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }
}
