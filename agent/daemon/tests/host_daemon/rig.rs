//! One agent under test: its state directory, its clients, and the end of every process it started.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use slat_daemon::{Agent, HostConfig, HostError};
use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, HostName},
    transport::{Address, TracedChannel, connect},
    v1::{
        self, host_service_client::HostServiceClient, memory_service_client::MemoryServiceClient,
        paging_service_client::PagingServiceClient, snapshot_service_client::SnapshotServiceClient,
        transfer_service_client::TransferServiceClient, vm_service_client::VmServiceClient,
    },
};
use slat_record::{dir::VmDir, journal::Journal};
use slat_trust::grant::{Grant, Party, Purpose, Signer};
use tonic::{Response, Status};

use crate::{beside, fake, grants};

pub(crate) const MIB: u64 = 1 << 20;
/// Everything awaited here happens within this or the test fails.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) struct Rig {
    state: slat_test_dir::TestDir,
    /// The server's key, as the agent has heard of it.
    pub(crate) signer: Signer,
    agent: Option<Agent>,
    channel: Option<TracedChannel>,
    pub(crate) server: Option<Address>,
}

impl Drop for Rig {
    /// Ends all that may write below `state`, which is removed after this.
    fn drop(&mut self) {
        self.abandon();
        for entry in std::fs::read_dir(self.state.path().join("vms"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Ok(Some(pid)) = VmDir::new(entry.path()).living_pid() {
                kill_and_wait(pid);
            }
        }
    }
}

/// Returns when the process can write nothing any more, reaped or not.
fn kill_and_wait(pid: u32) {
    use rustix::{
        event::{PollFd, PollFlags, poll},
        process::{Pid, PidfdFlags, pidfd_open},
    };
    let process = Pid::from_raw(pid.cast_signed()).unwrap();
    let Ok(process) = pidfd_open(process, PidfdFlags::empty()) else {
        // It has ended already.
        return;
    };
    kill(pid);
    let limit = SOON.try_into().ok();
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], limit.as_ref());
    if ended != Ok(1) {
        eprintln!("process {pid} does not end: {ended:?}");
    }
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    assert_ne!(pid, rustix::process::getpid());
    // It may have ended already.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

impl Rig {
    /// A state directory without an agent.
    pub(crate) fn new() -> Self {
        let state = slat_test_dir::TestDir::new();
        let signer = Signer::generate().unwrap();
        grants::announce(state.path(), &[signer.public_key()]);
        Self {
            state,
            signer,
            agent: None,
            channel: None,
            server: None,
        }
    }

    /// With an agent.
    pub(crate) async fn started() -> Self {
        let mut rig = Self::new();
        rig.start().await;
        rig
    }

    pub(crate) fn config(&self) -> HostConfig {
        HostConfig {
            name: HostName::parse("a").unwrap(),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            server: self.server.clone(),
            state_dir: self.state.path().to_owned(),
            memory_bytes: 256 * MIB,
            data_ip: "127.0.0.1".parse().unwrap(),
            vm_program: fake::program(),
            pager_program: beside::program("pager"),
            writer_program: beside::program("writer"),
            save_dir: None,
            confinement: slat_proto::v1::VmConfinement::default(),
            vm_cgroup: slat_daemon::VmCgroup::None,
            credentials: None,
            access: slat_proto::transport::Access::default(),
            dirty_rings: || false,
            paging: fake::paging,
            huge_pages: fake::huge_pages,
            backends: || (vec![BackendKind::Software], Some("a test".to_owned())),
            admit: Arc::new(fake::admit),
            fits: |_| Ok(()),
            clock: SystemTime::now,
            trust: Arc::new(v1::HostTrust::default),
            labels: slat_proto::model::Labels::default(),
            version: "9.9.9".into(),
            render: None,
        }
    }

    pub(crate) async fn start(&mut self) {
        self.start_with(self.config()).await.unwrap();
    }

    pub(crate) async fn start_with(&mut self, config: HostConfig) -> Result<(), HostError> {
        let agent = Agent::start(config).await?;
        self.channel = Some(connect(&self.address_of(&agent)).unwrap());
        self.agent = Some(agent);
        Ok(())
    }

    fn address_of(&self, agent: &Agent) -> Address {
        agent.address().to_string().parse().unwrap()
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        self.agent.as_ref().unwrap().address()
    }

    /// Ends the agent in the middle of whatever it does.
    pub(crate) fn abandon(&mut self) {
        self.channel = None;
        drop(self.agent.take());
    }

    pub(crate) async fn stop(&mut self) {
        self.channel = None;
        self.agent.take().unwrap().stop().await;
    }

    pub(crate) fn state(&self) -> &std::path::Path {
        self.state.path()
    }

    pub(crate) fn dir(&self, vm: &str) -> VmDir {
        VmDir::new(self.path(vm))
    }

    /// The directory of the VM of that name; where an older version would have it when there is
    /// none.
    pub(crate) fn path(&self, vm: &str) -> PathBuf {
        let vms = self.state.path().join("vms");
        let dirs = std::fs::read_dir(&vms).into_iter().flatten().flatten();
        let is_its = |path: &PathBuf| {
            Journal::read(&path.join("journal"))
                .is_ok_and(|state| state.is_some_and(|state| state.vm == vm))
        };
        dirs.map(|entry| entry.path())
            .find(is_its)
            .unwrap_or_else(|| vms.join(vm))
    }

    /// The directory of the VM of that uid.
    pub(crate) fn path_of(&self, uid: &str) -> PathBuf {
        self.state.path().join("vms").join(uid)
    }

    /// A directory as a dead process left it.
    pub(crate) fn dead_dir(&self, vm: &str) -> VmDir {
        std::fs::create_dir_all(self.path(vm)).unwrap();
        self.dir(vm)
    }

    pub(crate) fn vms(&self) -> VmServiceClient<TracedChannel> {
        VmServiceClient::new(self.channel.clone().unwrap())
    }

    pub(crate) fn memory(&self) -> MemoryServiceClient<TracedChannel> {
        MemoryServiceClient::new(self.channel.clone().unwrap())
    }

    pub(crate) fn transfers(&self) -> TransferServiceClient<TracedChannel> {
        TransferServiceClient::new(self.channel.clone().unwrap())
    }

    pub(crate) fn snapshots(&self) -> SnapshotServiceClient<TracedChannel> {
        SnapshotServiceClient::new(self.channel.clone().unwrap())
    }

    pub(crate) fn pagings(&self) -> PagingServiceClient<TracedChannel> {
        PagingServiceClient::new(self.channel.clone().unwrap())
    }

    pub(crate) fn hosts(&self) -> HostServiceClient<TracedChannel> {
        HostServiceClient::new(self.channel.clone().unwrap())
    }

    pub(crate) async fn create(&self, vm: &str, memory_bytes: u64) -> Result<v1::Vm, ApiError> {
        let spec = v1::VmSpec {
            memory_bytes,
            vcpus: 1,
            ..Default::default()
        };
        let request = v1::CreateVmRequest {
            vm_id: vm.into(),
            spec: Some(spec),
            ..Default::default()
        };
        answer(self.vms().create_vm(request).await)
    }

    pub(crate) async fn get(&self, vm: &str) -> Result<v1::Vm, ApiError> {
        answer(
            self.vms()
                .get_vm(v1::GetVmRequest {
                    name: format!("vms/{vm}"),
                    ..Default::default()
                })
                .await,
        )
    }

    pub(crate) async fn delete(&self, vm: &str) -> Result<(), ApiError> {
        answer(
            self.vms()
                .delete_vm(v1::DeleteVmRequest {
                    name: format!("vms/{vm}"),
                    ..Default::default()
                })
                .await,
        )
        .map(drop)
    }

    pub(crate) async fn names(&self) -> Vec<String> {
        let list = answer(self.vms().list_vms(v1::ListVmsRequest::default()).await).unwrap();
        list.vms.into_iter().map(|vm| vm.name).collect()
    }

    pub(crate) async fn used(&self) -> u64 {
        let request = v1::GetHostRequest {
            name: "hosts/a".into(),
        };
        answer(self.hosts().get_host(request).await)
            .unwrap()
            .memory_used_bytes
    }

    pub(crate) async fn prepare(
        &self,
        migration: &str,
        vm: &str,
        memory_bytes: u64,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        self.prepare_from("fake", migration, vm, memory_bytes).await
    }

    /// As `prepare`, of a VM on a host of that architecture.
    pub(crate) async fn prepare_from(
        &self,
        architecture: &str,
        migration: &str,
        vm: &str,
        memory_bytes: u64,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        let spec = v1::VmSpec {
            memory_bytes,
            vcpus: 1,
            ..Default::default()
        };
        let vm = v1::Vm {
            uid: format!("u-{vm}"),
            name: format!("vms/{vm}"),
            epoch: 4,
            spec: Some(spec),
            ..Default::default()
        };
        let about = (vm.uid.as_str(), vm.epoch);
        let grant = self.grant(Purpose::Receive, migration, about).await;
        let request = v1::PrepareIncomingRequest {
            migration: format!("migrations/{migration}"),
            grant,
            vm: Some(vm),
            source_agent_address: "127.0.0.1:1".into(),
            preamble: Some(v1::Preamble {
                architecture: architecture.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        answer(self.transfers().prepare_incoming(request).await)
    }

    pub(crate) async fn describe(
        &self,
        migration: &str,
        vm: &str,
        epoch: u64,
    ) -> Result<v1::DescribeOutgoingResponse, ApiError> {
        let request = v1::DescribeOutgoingRequest {
            migration: format!("migrations/{migration}"),
            vm: format!("vms/{vm}"),
            epoch,
            ..Default::default()
        };
        answer(self.transfers().describe_outgoing(request).await)
    }

    pub(crate) async fn send(&self, migration: &str, vm: &str) -> Result<v1::Transfer, ApiError> {
        let request = self.sending(migration, vm).await;
        answer(self.transfers().start_outgoing(request).await)
    }

    /// What StartOutgoing takes.
    pub(crate) async fn sending(&self, migration: &str, vm: &str) -> v1::StartOutgoingRequest {
        // Of one that is not here the call is refused before its grant is looked at.
        let list = self.vms().list_vms(v1::ListVmsRequest::default()).await;
        let named = format!("vms/{vm}");
        let known = answer(list).unwrap().vms.into_iter();
        let uid = known
            .filter(|vm| vm.name == named)
            .map(|vm| vm.uid)
            .next_back();
        let uid = uid.unwrap_or_default();
        v1::StartOutgoingRequest {
            migration: format!("migrations/{migration}"),
            vm: format!("vms/{vm}"),
            grant: self.grant(Purpose::Send, migration, (&uid, 0)).await,
            ..Default::default()
        }
    }

    /// A grant for this agent's start, as its server signs it.
    pub(crate) async fn grant(
        &self,
        purpose: Purpose,
        migration: &str,
        about: (&str, u64),
    ) -> Option<v1::SignedGrant> {
        let grant = self.unsigned(purpose, migration, about).await;
        Some((&self.signer.sign(&grant).unwrap()).into())
    }

    pub(crate) async fn unsigned(
        &self,
        purpose: Purpose,
        migration: &str,
        about: (&str, u64),
    ) -> Grant {
        let request = v1::GetHostRequest {
            name: "hosts/a".into(),
        };
        let host = answer(self.hosts().get_host(request).await).unwrap();
        let own = Party {
            host: "a".to_owned(),
            incarnation: host.incarnation,
        };
        let other = Party {
            host: "other".to_owned(),
            incarnation: "1".to_owned(),
        };
        let parties = match purpose {
            Purpose::Send => (own, other),
            _ => (other, own),
        };
        let lasts = Duration::from_secs(60);
        Grant::new(purpose, migration, about, parties, SystemTime::now(), lasts).unwrap()
    }

    /// What ResolveTransfer takes for a destination here.
    pub(crate) async fn commit(
        &self,
        migration: &str,
        about: (&str, u64),
    ) -> v1::ResolveTransferRequest {
        v1::ResolveTransferRequest {
            migration: format!("migrations/{migration}"),
            decision: v1::resolve_transfer_request::Decision::Commit.into(),
            grant: self.grant(Purpose::Commit, migration, about).await,
            ..Default::default()
        }
    }

    pub(crate) async fn side(
        &self,
        migration: &str,
        role: v1::TransferRole,
    ) -> Result<v1::Transfer, ApiError> {
        let request = v1::GetTransferRequest {
            migration: format!("migrations/{migration}"),
            role: role.into(),
            ..Default::default()
        };
        answer(self.transfers().get_transfer(request).await)
    }

    pub(crate) async fn cancel(
        &self,
        migration: &str,
        role: v1::TransferRole,
    ) -> Result<v1::Transfer, ApiError> {
        let migration = format!("migrations/{migration}");
        let request = v1::CancelTransferRequest {
            migration,
            role: role.into(),
            error: None,
        };
        answer(self.transfers().cancel_transfer(request).await)
    }

    pub(crate) async fn release(
        &self,
        migration: &str,
        role: v1::TransferRole,
    ) -> Result<(), ApiError> {
        let request = v1::ReleaseTransferRequest {
            migration: format!("migrations/{migration}"),
            role: role.into(),
        };
        answer(self.transfers().release_transfer(request).await).map(drop)
    }

    /// Waits until the VM is shown in `state`.
    pub(crate) async fn becomes(&self, vm: &str, state: v1::vm::State) -> v1::Vm {
        until(async || self.get(vm).await.ok().filter(|vm| vm.state() == state)).await
    }

    /// A plain HTTP request.
    pub(crate) async fn scrape(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.address())
            .await
            .unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        tokio::time::timeout(SOON, stream.read_to_string(&mut text))
            .await
            .unwrap()
            .unwrap();
        text
    }
}

pub(crate) fn answer<T>(result: Result<Response<T>, Status>) -> Result<T, ApiError> {
    result.map(Response::into_inner).map_err(ApiError::from)
}

/// Asks until there is an answer.
pub(crate) async fn until<T>(ask: impl AsyncFn() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, asking)
        .await
        .expect("it did not happen in time")
}

pub(crate) fn reason<T: std::fmt::Debug>(result: Result<T, ApiError>) -> Reason {
    result.unwrap_err().reason
}

/// Stops a process. Its threads stop one after the other, so this waits for the last: until then it
/// may still answer.
pub(crate) async fn freeze(pid: u32) {
    let process = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    let is_stopped = |stat: &str| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
    };
    until(async || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        threads
            .map(|thread| std::fs::read_to_string(thread.ok()?.path().join("stat")).ok())
            .all(|stat| stat.as_deref().is_some_and(is_stopped))
            .then_some(())
    })
    .await;
}
