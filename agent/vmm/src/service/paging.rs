//! `PagingService` for the one VM of this process: what its pager knows and can be asked.

use slat_proto::v1::{
    HarvestWorkingSetRequest, HarvestWorkingSetResponse, ListMappingsRequest, ListMappingsResponse,
    PrefaultMemoryRequest, PrefaultMemoryResponse, RetryPageSourceRequest, Vm,
    paging_service_server::PagingService,
};
use slat_proto::{ApiError, model::CursorName};
use tonic::{Request, Response, Status};

use super::{
    endpoint::VmEndpoint,
    monitor::{HarvestOrder, Monitor},
    vm::named,
};

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
        let order = harvest_order(&request)?;
        let harvested = self.on(named!(&request, name), move |monitor| {
            monitor.harvest_working_set(order)
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

    async fn prefault_memory(
        &self,
        request: Request<PrefaultMemoryRequest>,
    ) -> Result<Response<PrefaultMemoryResponse>, Status> {
        let request = request.into_inner();
        let prefaulted = self.on(named!(&request, name), move |monitor| {
            monitor.prefault_memory(request.gfn, request.pages)
        });
        Ok(Response::new(prefaulted.await?))
    }
}

fn harvest_order(request: &HarvestWorkingSetRequest) -> Result<HarvestOrder, ApiError> {
    let reader = match request.cursor.as_str() {
        "" => None,
        name => Some(CursorName::parse(name)?),
    };
    if reader.is_none() && request.end {
        return Err(ApiError::bad_parameter("end", "there is no cursor to end"));
    }
    Ok(HarvestOrder {
        range: request.range,
        reader,
        end: request.end,
    })
}
