//! HostService at the agent: a collection of one, its own host.

use std::{sync::Arc, time::SystemTime};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, PageRequest, paginate, timestamp},
    v1::{self, host_service_server::HostService},
};
use tonic::{Request, Response, Status};

use super::supervisor::Supervisor;

/// What this agent says of its host.
#[derive(Debug)]
pub(super) struct HostCard {
    pub(super) address: String,
    pub(super) incarnation: String,
    pub(super) version: String,
    pub(super) clock: fn() -> SystemTime,
    pub(super) supervisor: Arc<Supervisor>,
}

impl HostCard {
    /// The host now.
    pub(super) fn host(&self) -> v1::Host {
        let (memory_bytes, memory_used_bytes) = self.supervisor.registry.memory();
        v1::Host {
            name: self.supervisor.host.to_string(),
            address: self.address.clone(),
            state: v1::host::State::Ready.into(),
            incarnation: self.incarnation.clone(),
            arch: std::env::consts::ARCH.to_owned(),
            backends: self
                .supervisor
                .backends
                .iter()
                .map(|kind| kind.to_message().into())
                .collect(),
            memory_bytes,
            memory_used_bytes,
            vms: u32::try_from(self.supervisor.snapshots().len()).unwrap_or(u32::MAX),
            last_seen_time: Some(timestamp((self.clock)())),
            version: self.version.clone(),
            backend_message: self.supervisor.backend_message.clone().unwrap_or_default(),
            ..Default::default()
        }
    }
}

/// The service.
#[derive(Debug)]
pub(super) struct Hosts(pub(super) Arc<HostCard>);

#[tonic::async_trait]
impl HostService for Hosts {
    async fn get_host(
        &self,
        request: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let name = HostName::parse(&request.into_inner().name)?;
        let own = &self.0.supervisor.host;
        if name != *own {
            return Err(
                ApiError::new(Reason::NoSuchHost, format!("this is {own}, not {name}"))
                    .with("host", name)
                    .with("advice", "ask the server")
                    .into(),
            );
        }
        Ok(Response::new(self.0.host()))
    }

    async fn list_hosts(
        &self,
        request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let (hosts, next_page_token) =
            paginate(vec![self.0.host()], &page, |host| host.name.clone());
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
