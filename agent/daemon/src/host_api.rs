//! HostService at the agent: a collection of one, its own host.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, Labels, PageRequest, paginate, timestamp},
    v1::{self, host_service_server::HostService},
};
use tonic::{Request, Response, Status};

use super::{disk::Disk, fenced::Fenced, pools::Pools, supervisor::Supervisor};
use slat_record::uid::VmUid;

/// Says how a host is protected, now.
pub type Trust = Arc<dyn Fn() -> v1::HostTrust + Send + Sync>;

/// What this agent says of its host.
pub(super) struct HostCard {
    pub(super) address: String,
    pub(super) incarnation: String,
    pub(super) version: String,
    pub(super) trust: Trust,
    pub(super) labels: Labels,
    pub(super) clock: fn() -> SystemTime,
    /// Identity of the agent's state directory.
    pub(super) uid: String,
    /// What is wrong between this agent and its server; empty when nothing is. A leaf mutex.
    pub(super) trouble: Mutex<String>,
    /// Whether the server refuses this start of it.
    pub(super) fenced: Fenced,
    /// Whether its state directory can be written.
    pub(super) disk: Disk,
    /// The pages that the host set aside.
    pub(super) pools: Pools,
    pub(super) supervisor: Arc<Supervisor>,
}

impl fmt::Debug for HostCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostCard")
            .field("address", &self.address)
            .field("incarnation", &self.incarnation)
            .field("uid", &self.uid)
            .finish_non_exhaustive()
    }
}

impl HostCard {
    /// The host now.
    pub(super) fn host(&self) -> v1::Host {
        let (memory_bytes, memory_used_bytes) = self.supervisor.registry.memory();
        let backends = self.supervisor.backends.get();
        v1::Host {
            name: self.supervisor.host.to_string(),
            address: self.address.clone(),
            state: v1::host::State::Ready.into(),
            incarnation: self.incarnation.clone(),
            arch: std::env::consts::ARCH.to_owned(),
            backends: backends
                .kinds
                .iter()
                .map(|kind| kind.to_message().into())
                .collect(),
            dirty_rings: backends.dirty_rings,
            paging: Some(backends.paging),
            memory_bytes,
            memory_used_bytes,
            vms: u32::try_from(self.supervisor.snapshots().len()).unwrap_or(u32::MAX),
            last_seen_time: Some(timestamp((self.clock)())),
            version: self.version.clone(),
            backend_message: backends.why_not_kvm.unwrap_or_default(),
            state_message: self.state_message(),
            uid: self.uid.clone(),
            vm_confinement: Some(self.supervisor.confinement.clone()),
            huge_pages: self.pools.get(),
            leftovers: u32::try_from(self.supervisor.leftovers().len()).unwrap_or(u32::MAX),
            trust: Some((self.trust)()),
            labels: self.labels.to_field(),
            ..Default::default()
        }
    }

    /// What is wrong, in words; empty when nothing is.
    fn state_message(&self) -> String {
        let disk = self.disk_message();
        let server = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let words = [disk.as_str(), server.as_str()];
        let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
        words.join("; ")
    }

    /// Why the host can take no VM; empty when it can.
    pub(super) fn disk_message(&self) -> String {
        let trouble = self.disk.trouble();
        trouble.map_or_else(String::new, |error| {
            let why = error
                .metadata
                .get("cause")
                .map(|cause| format!(": {cause}"));
            format!(
                "{}{} ({})",
                error.message,
                why.unwrap_or_default(),
                error.reason
            )
        })
    }

    /// Says what is wrong between this agent and its server, or that nothing is.
    pub(super) fn set_trouble(&self, what: String) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

/// The service.
#[derive(Debug)]
pub(super) struct Hosts(pub(super) Arc<HostCard>);

impl Hosts {
    /// Refuses another host's name.
    fn is_own(&self, name: &str) -> Result<(), ApiError> {
        let name = HostName::parse(name)?;
        let own = &self.0.supervisor.host;
        if name == *own {
            return Ok(());
        }
        Err(
            ApiError::new(Reason::NoSuchHost, format!("this is {own}, not {name}"))
                .with("host", name)
                .with("advice", "ask the server"),
        )
    }
}

#[tonic::async_trait]
impl HostService for Hosts {
    async fn get_host(
        &self,
        request: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.is_own(&request.into_inner().name)?;
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
        _: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(server_s("CordonHost").into())
    }

    async fn fence_host(
        &self,
        _: Request<v1::FenceHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(server_s("FenceHost").into())
    }

    async fn uncordon_host(
        &self,
        _: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(server_s("UncordonHost").into())
    }

    async fn delete_host(
        &self,
        _: Request<v1::DeleteHostRequest>,
    ) -> Result<Response<v1::DeleteHostResponse>, Status> {
        Err(server_s("DeleteHost").into())
    }

    async fn list_leftovers(
        &self,
        request: Request<v1::ListLeftoversRequest>,
    ) -> Result<Response<v1::ListLeftoversResponse>, Status> {
        let host = request.into_inner().host;
        if !host.is_empty() {
            self.is_own(&host)?;
        }
        let supervisor = &self.0.supervisor;
        supervisor.reread().await;
        Ok(Response::new(v1::ListLeftoversResponse {
            leftovers: supervisor.leftovers(),
            unreachable: Vec::new(),
        }))
    }

    async fn adopt_leftover(
        &self,
        request: Request<v1::AdoptLeftoverRequest>,
    ) -> Result<Response<v1::AdoptLeftoverResponse>, Status> {
        let request = request.into_inner();
        self.is_own(&request.host)?;
        let supervisor = &self.0.supervisor;
        let uid = VmUid::parse(&request.uid)?;
        let adopt = Arc::clone(supervisor).adopt_leftover(uid, request.give_up, request.epoch);
        Ok(Response::new(v1::AdoptLeftoverResponse {
            vm: Some(supervisor.finish(adopt).await?),
        }))
    }

    async fn delete_leftover(
        &self,
        request: Request<v1::DeleteLeftoverRequest>,
    ) -> Result<Response<v1::DeleteLeftoverResponse>, Status> {
        let request = request.into_inner();
        self.is_own(&request.host)?;
        let supervisor = &self.0.supervisor;
        let uid = VmUid::parse(&request.uid)?;
        let delete = Arc::clone(supervisor).delete_leftover(uid, request.give_up);
        supervisor.finish(delete).await?;
        Ok(Response::new(v1::DeleteLeftoverResponse {}))
    }
}

/// A call that only the server can answer.
fn server_s(method: &str) -> ApiError {
    ApiError::new(
        Reason::NoSuchMethod,
        format!("{method} is the server's, and this is an agent"),
    )
    .with("advice", "ask the server")
}
