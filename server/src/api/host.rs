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
}
