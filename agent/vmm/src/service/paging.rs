//! `PagingService` for the one VM of this process: what its pager knows and can be asked.

use slat_proto::v1::{
    HarvestWorkingSetRequest, HarvestWorkingSetResponse, ListMappingsRequest, ListMappingsResponse,
    RetryPageSourceRequest, Vm, paging_service_server::PagingService,
};
use tonic::{Request, Response, Status};

use super::{endpoint::VmEndpoint, monitor::Monitor, vm::named};

#[tonic::async_trait]
impl PagingService for VmEndpoint {
    async fn retry_page_source(
        &self,
        request: Request<RetryPageSourceRequest>,
    ) -> Result<Response<Vm>, Status> {
        let vm = self
            .on(named!(request.get_ref(), name), Monitor::retry_page_source)
            .await?;
        Ok(Response::new(vm))
    }

    async fn harvest_working_set(
        &self,
        request: Request<HarvestWorkingSetRequest>,
    ) -> Result<Response<HarvestWorkingSetResponse>, Status> {
        let request = request.into_inner();
        let harvested = self.on(named!(&request, name), move |monitor| {
            monitor.harvest_working_set(request.range)
        });
        Ok(Response::new(harvested.await?))
    }

    async fn list_mappings(
        &self,
        request: Request<ListMappingsRequest>,
    ) -> Result<Response<ListMappingsResponse>, Status> {
        let request = request.into_inner();
        let listed = self.on(named!(&request, name), move |monitor| {
            monitor.list_mappings(request.from_gfn)
        });
        Ok(Response::new(listed.await?))
    }
}
