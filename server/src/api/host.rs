//! HostService for the fleet.

use slat_proto::{
    model::{HostName, PageRequest, paginate},
    v1::{self, host_service_server::HostService},
};
use tonic::{Request, Response, Status};

use super::services::Services;

#[tonic::async_trait]
impl HostService for Services {
    async fn get_host(
        &self,
        request: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let name = HostName::parse(&request.into_inner().name)?;
        Ok(Response::new(self.fleet.host(&name.to_string())?))
    }

    async fn list_hosts(
        &self,
        request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let (hosts, next_page_token) =
            paginate(self.fleet.hosts(), &page, |host| host.name.clone());
        Ok(Response::new(v1::ListHostsResponse {
            hosts,
            next_page_token,
        }))
    }

    async fn cordon_host(
        &self,
        _request: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(Status::internal("not built yet"))
    }

    async fn uncordon_host(
        &self,
        _request: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(Status::internal("not built yet"))
    }

    async fn delete_host(
        &self,
        _request: Request<v1::DeleteHostRequest>,
    ) -> Result<Response<v1::DeleteHostResponse>, Status> {
        Err(Status::internal("not built yet"))
    }

    async fn list_leftovers(
        &self,
        _request: Request<v1::ListLeftoversRequest>,
    ) -> Result<Response<v1::ListLeftoversResponse>, Status> {
        Err(Status::internal("not built yet"))
    }

    async fn adopt_leftover(
        &self,
        _request: Request<v1::AdoptLeftoverRequest>,
    ) -> Result<Response<v1::AdoptLeftoverResponse>, Status> {
        Err(Status::internal("not built yet"))
    }

    async fn delete_leftover(
        &self,
        _request: Request<v1::DeleteLeftoverRequest>,
    ) -> Result<Response<v1::DeleteLeftoverResponse>, Status> {
        Err(Status::internal("not built yet"))
    }
}
