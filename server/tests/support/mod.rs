//! A fake agent: an in-process gRPC server that holds VMs and migration halves as data and lets a test move them. It
//! behaves as `transfer.proto` says: idempotent calls, halves that stay until they are released, refusals with reasons.

#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test file uses its part of what is no library"
)]

mod doors;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::proto_duration,
    transport::{Door, DoorHandle, TracedChannel, connect, traced},
    v1::{
        self, TransferPhase as Half, TransferRole as Role,
        fleet_service_client::FleetServiceClient,
        host_service_server::HostServiceServer,
        memory_service_server::MemoryServiceServer,
        migration_service_client::MigrationServiceClient,
        resolve_transfer_request::Decision,
        transfer_service_server::{TransferService, TransferServiceServer},
        vm::State,
        vm_service_client::VmServiceClient,
        vm_service_server::VmServiceServer,
    },
};
use slat_server::{Server, ServerConfig};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Request, Response, Status};

/// Nothing a test waits for takes this long.
pub const PATIENCE: Duration = Duration::from_secs(20);

type Key = (String, i32);

#[derive(Default)]
struct Inner {
    vms: BTreeMap<String, v1::Vm>,
    halves: HashMap<Key, watch::Sender<v1::Transfer>>,
    refuse_prepare: Option<ApiError>,
    refuse_start: Option<ApiError>,
    keep_halves: bool,
    stopping: bool,
}

/// What the agent was asked, in order: the call and its migration or VM.
#[derive(Clone)]
pub struct Fake {
    pub name: String,
    pub arch: String,
    inner: Arc<Mutex<Inner>>,
    calls: watch::Sender<Vec<String>>,
}

/// A fake agent that serves and reports.
pub struct Agent {
    pub fake: Fake,
    pub address: SocketAddr,
    door: DoorHandle,
    reporter: Option<JoinHandle<()>>,
}

fn key(migration: &str, role: Role) -> Key {
    (migration.to_owned(), role.into())
}

fn ended(phase: Half) -> bool {
    matches!(phase, Half::Completed | Half::Cancelled | Half::Failed)
}

impl Fake {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            arch: "x86_64".into(),
            inner: Arc::default(),
            calls: watch::channel(Vec::new()).0,
        }
    }

    fn called(&self, call: &str, what: &str) {
        self.calls
            .send_modify(|calls| calls.push(format!("{call} {what}")));
    }

    pub fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    /// Waits until a call that starts with `prefix` was made.
    pub async fn wait_call(&self, prefix: &str) -> String {
        let mut calls = self.calls.subscribe();
        let found = timeout(
            PATIENCE,
            calls.wait_for(|calls| calls.iter().any(|call| call.starts_with(prefix))),
        )
        .await;
        let calls = match found {
            Ok(found) => found.unwrap().clone(),
            Err(_) => panic!("{}: no call {prefix}, only {:?}", self.name, self.calls()),
        };
        calls
            .into_iter()
            .find(|call| call.starts_with(prefix))
            .unwrap()
    }

    pub fn refuse_prepare(&self, error: ApiError) {
        self.inner.lock().unwrap().refuse_prepare = Some(error);
    }

    pub fn refuse_start(&self, error: ApiError) {
        self.inner.lock().unwrap().refuse_start = Some(error);
    }

    /// Whether ReleaseTransfer is refused.
    pub fn keep_halves(&self, keep: bool) {
        self.inner.lock().unwrap().keep_halves = keep;
    }

    pub fn put_vm(&self, vm: v1::Vm) {
        self.inner.lock().unwrap().vms.insert(vm.name.clone(), vm);
    }

    pub fn remove_vm(&self, name: &str) {
        self.inner.lock().unwrap().vms.remove(name);
    }

    pub fn vm(&self, name: &str) -> Option<v1::Vm> {
        self.inner.lock().unwrap().vms.get(name).cloned()
    }

    /// The VM for who watches it; none when the agent stops.
    fn watched(&self, name: &str) -> Option<v1::Vm> {
        let inner = self.inner.lock().unwrap();
        let vm = inner.vms.get(name);
        vm.filter(|_| !inner.stopping).cloned()
    }

    pub fn half(&self, migration: &str, role: Role) -> Option<v1::Transfer> {
        let inner = self.inner.lock().unwrap();
        inner
            .halves
            .get(&key(migration, role))
            .map(|half| half.borrow().clone())
    }

    /// Moves a half on.
    pub fn set(&self, migration: &str, role: Role, change: impl FnOnce(&mut v1::Transfer)) {
        let inner = self.inner.lock().unwrap();
        inner.halves[&key(migration, role)].send_modify(change);
    }

    pub fn phase(&self, migration: &str, role: Role, phase: Half) {
        self.set(migration, role, |half| half.phase = phase.into());
    }

    /// A half as if an earlier life had made it.
    pub fn put_half(&self, half: v1::Transfer) {
        let key = key(&half.migration, half.role());
        self.inner
            .lock()
            .unwrap()
            .halves
            .insert(key, watch::channel(half).0);
    }

    fn change_vm(
        &self,
        name: &str,
        change: impl FnOnce(&mut v1::Vm),
    ) -> Result<Response<v1::Vm>, Status> {
        let mut inner = self.inner.lock().unwrap();
        let vm = inner
            .vms
            .get_mut(name)
            .ok_or_else(|| ApiError::no_such_vm(name))?;
        change(vm);
        Ok(Response::new(vm.clone()))
    }

    fn find(&self, migration: &str, role: i32) -> Result<watch::Sender<v1::Transfer>, Status> {
        let inner = self.inner.lock().unwrap();
        inner
            .halves
            .get(&(migration.to_owned(), role))
            .cloned()
            .ok_or_else(|| {
                ApiError::new(Reason::NoSuchMigration, format!("no half of {migration}")).into()
            })
    }

    fn report(&self) -> v1::ReportHostRequest {
        let inner = self.inner.lock().unwrap();
        let used = inner
            .vms
            .values()
            .map(|vm| vm.spec.clone().unwrap_or_default().memory_bytes);
        v1::ReportHostRequest {
            host: self.name.clone(),
            incarnation: "1".into(),
            vms: inner.vms.values().cloned().collect(),
            memory_used_bytes: used.sum(),
            ..Default::default()
        }
    }
}

/// A VM as an agent shows it.
pub fn vm(name: &str, memory_mib: u64) -> v1::Vm {
    v1::Vm {
        name: name.into(),
        uid: format!("uid-{name}"),
        spec: Some(v1::VmSpec {
            memory_bytes: memory_mib << 20,
            vcpus: 1,
            backend: v1::Backend::Software.into(),
            format: v1::Format::Ept4.into(),
            guest: None,
        }),
        state: State::Running.into(),
        epoch: 1,
        capabilities: vec![
            v1::Capability::DirtyLog.into(),
            v1::Capability::VcpuState.into(),
        ],
        mmu_stats: Some(v1::MmuStats {
            faults_taken: Some(10),
            ..Default::default()
        }),
        pid: 1,
        ..Default::default()
    }
}

impl Agent {
    /// Serves on a free port and reports to `server` until stopped.
    pub async fn start(fake: Fake, server: SocketAddr) -> Self {
        let mut agent = Self::serve(fake).await;
        agent.report_to(server).await;
        agent
    }

    pub async fn serve(fake: Fake) -> Self {
        Self::serve_at(fake, "127.0.0.1:0".parse().unwrap()).await
    }

    /// Serves where an agent was before.
    pub async fn serve_at(fake: Fake, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let door = Door::new()
            .service(VmServiceServer::new(fake.clone()))
            .service(MemoryServiceServer::new(fake.clone()))
            .service(HostServiceServer::new(fake.clone()))
            .service(TransferServiceServer::new(fake.clone()))
            .serve_tcp(listener)
            .await
            .unwrap();
        Self {
            address: door.address().unwrap(),
            fake,
            door,
            reporter: None,
        }
    }

    /// Registers, reports once, and goes on reporting.
    pub async fn report_to(&mut self, server: SocketAddr) {
        let mut fleet = FleetServiceClient::new(channel(server));
        let host = v1::Host {
            name: self.fake.name.clone(),
            address: self.address.to_string(),
            incarnation: "1".into(),
            arch: self.fake.arch.clone(),
            backends: vec![v1::Backend::Software.into()],
            memory_bytes: 1 << 30,
            ..Default::default()
        };
        let register = v1::RegisterHostRequest { host: Some(host) };
        let interval = fleet
            .register_host(register)
            .await
            .unwrap()
            .into_inner()
            .report_interval_millis;
        fleet.report_host(self.fake.report()).await.unwrap();
        let fake = self.fake.clone();
        let reporter = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(interval.into()));
            loop {
                tick.tick().await;
                if fleet.report_host(fake.report()).await.is_err() {
                    return;
                }
            }
        });
        if let Some(old) = self.reporter.replace(reporter) {
            old.abort();
        }
    }

    /// Ends it as a crash would: nobody answers at its address.
    pub async fn stop(mut self) -> (Fake, SocketAddr) {
        if let Some(reporter) = self.reporter.take() {
            reporter.abort();
        }
        // Open watches would hold the door for its drain time.
        let halves: Vec<v1::Transfer> = {
            let mut inner = self.fake.inner.lock().unwrap();
            let halves = inner
                .halves
                .values()
                .map(|half| half.borrow().clone())
                .collect();
            inner.halves.clear();
            inner.stopping = true;
            halves
        };
        self.door.stop().await;
        self.fake.inner.lock().unwrap().stopping = false;
        for half in halves {
            self.fake.put_half(half);
        }
        (self.fake, self.address)
    }
}

pub fn channel(address: SocketAddr) -> TracedChannel {
    traced(connect(&address.to_string().parse().unwrap()).unwrap())
}

/// A server with a short interval on `state`.
pub async fn server(state: &std::path::Path) -> Server {
    let config = ServerConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: state.to_owned(),
        report_interval: Duration::from_millis(100),
        render: Some(Arc::new(|| "slat_test 1\n".to_owned())),
        version: "0.0.0-test".into(),
    };
    Server::start(config).await.unwrap()
}

pub struct Clients {
    pub vms: VmServiceClient<TracedChannel>,
    pub migrations: MigrationServiceClient<TracedChannel>,
}

impl Clients {
    pub fn new(server: SocketAddr) -> Self {
        Self {
            vms: VmServiceClient::new(channel(server)),
            migrations: MigrationServiceClient::new(channel(server)),
        }
    }

    pub async fn migrate(
        &mut self,
        vm: &str,
        destination: &str,
    ) -> Result<v1::Migration, ApiError> {
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: vm.into(),
                destination: destination.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        answer(self.migrations.create_migration(request).await)
    }

    pub async fn migration(&mut self, name: &str) -> v1::Migration {
        let request = v1::GetMigrationRequest { name: name.into() };
        self.migrations
            .get_migration(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Watches until the migration is as wanted; the watch ends by itself after a terminal phase.
    pub async fn wait(
        &mut self,
        name: &str,
        wanted: impl Fn(&v1::Migration) -> bool,
    ) -> v1::Migration {
        let request = v1::WatchMigrationRequest { name: name.into() };
        let mut updates = self
            .migrations
            .watch_migration(request)
            .await
            .unwrap()
            .into_inner();
        let mut last = None;
        let search = async {
            while let Some(update) = updates.message().await.unwrap() {
                if wanted(&update) {
                    return Some(update);
                }
                last = Some(update);
            }
            None
        };
        match timeout(PATIENCE, search).await {
            Ok(Some(found)) => found,
            Ok(None) => panic!("the watch ended with {last:?}"),
            Err(_) => panic!("still {last:?}"),
        }
    }

    pub async fn wait_phase(&mut self, name: &str, phase: v1::MigrationPhase) -> v1::Migration {
        self.wait(name, |migration| migration.phase() == phase)
            .await
    }

    pub async fn cancel(&mut self, name: &str) -> Result<v1::Migration, ApiError> {
        let request = v1::CancelMigrationRequest { name: name.into() };
        answer(self.migrations.cancel_migration(request).await)
    }

    pub async fn vm(&mut self, name: &str) -> Result<v1::Vm, ApiError> {
        let request = v1::GetVmRequest { name: name.into() };
        answer(self.vms.get_vm(request).await)
    }
}

pub fn answer<T>(result: Result<Response<T>, Status>) -> Result<T, ApiError> {
    result.map(Response::into_inner).map_err(ApiError::from)
}

/// Waits until `check` holds, asking again as fast as the server answers.
pub async fn until<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let search = async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(PATIENCE, search).await.is_ok(), "never: {what}");
}

/// Both halves of a handover as the two processes would do it, up to the end.
pub fn hand_over(source: &Fake, destination: &Fake, migration: &str, vm: &str) {
    destination.phase(migration, Role::Destination, Half::Ready);
    source.set(migration, Role::Source, |half| {
        half.phase = Half::Relinquished.into();
    });
    let mut moved = source.vm(vm).unwrap();
    let mut left = moved.clone();
    left.state = State::Relinquished.into();
    source.put_vm(left);
    moved.epoch += 1;
    moved.pid += 1;
    moved.state = State::Running.into();
    destination.put_vm(moved);
    destination.set(migration, Role::Destination, |half| {
        half.phase = Half::Completed.into();
        let progress = half.progress.get_or_insert_default();
        progress.cpu_time = Some(proto_duration(Duration::from_millis(7)));
    });
    source.set(migration, Role::Source, |half| {
        half.phase = Half::Completed.into();
        let progress = half.progress.get_or_insert_default();
        progress.downtime = Some(proto_duration(Duration::from_millis(12)));
        progress.iterations = vec![v1::MigrationIteration::default(); 3];
        progress.verification = v1::Verification::Match.into();
    });
}

#[tonic::async_trait]
impl TransferService for Fake {
    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        let request = request.into_inner();
        let mut inner = self.inner.lock().unwrap();
        if let Some(error) = inner.refuse_prepare.take() {
            self.called("prepare", &request.migration);
            return Err(error.into());
        }
        let vm = request.vm.unwrap();
        assert!(!request.slots.is_empty());
        assert!(!request.source_agent_address.is_empty());
        let half = v1::Transfer {
            migration: request.migration.clone(),
            vm: vm.name.clone(),
            role: Role::Destination.into(),
            phase: Half::Preparing.into(),
            epoch: vm.epoch,
            ..Default::default()
        };
        let incoming = v1::Vm {
            state: State::Incoming.into(),
            ..vm
        };
        inner.vms.insert(incoming.name.clone(), incoming);
        let half = inner
            .halves
            .entry(key(&request.migration, Role::Destination))
            .or_insert_with(|| watch::channel(half).0)
            .borrow()
            .clone();
        // Told when it is done: who waits for the call finds the half.
        self.called("prepare", &request.migration);
        Ok(Response::new(v1::PrepareIncomingResponse {
            transfer: Some(half),
            data_address: "127.0.0.1:1".into(),
            ticket: vec![7; 32],
        }))
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        assert_eq!(request.ticket, vec![7; 32]);
        let mut inner = self.inner.lock().unwrap();
        if let Some(error) = inner.refuse_start.take() {
            self.called("start", &request.migration);
            return Err(error.into());
        }
        let half = v1::Transfer {
            migration: request.migration.clone(),
            vm: request.vm,
            role: Role::Source.into(),
            phase: Half::Preparing.into(),
            epoch: request.epoch,
            ..Default::default()
        };
        let half = inner
            .halves
            .entry(key(&request.migration, Role::Source))
            .or_insert_with(|| watch::channel(half).0)
            .borrow()
            .clone();
        // Told when it is done: who waits for the call finds the half.
        self.called("start", &request.migration);
        Ok(Response::new(half))
    }

    async fn get_transfer(
        &self,
        request: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let half = self.find(&request.migration, request.role)?;
        let now = half.borrow().clone();
        Ok(Response::new(now))
    }

    type WatchTransferStream = Pin<Box<dyn Stream<Item = Result<v1::Transfer, Status>> + Send>>;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<Self::WatchTransferStream>, Status> {
        let request = request.into_inner();
        let half = self.find(&request.migration, request.role)?;
        let updates = WatchStream::new(half.subscribe()).map(Ok);
        Ok(Response::new(Box::pin(updates)))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let role = request.role();
        self.called(
            &format!("cancel {}", role.as_str_name()),
            &request.migration,
        );
        let half = self.find(&request.migration, request.role)?;
        let now = half.borrow().clone();
        if matches!(now.phase(), Half::Relinquished | Half::Ready) || now.phase() == Half::Completed
        {
            return Err(ApiError::new(Reason::PastPointOfNoReturn, "too late").into());
        }
        if !ended(now.phase()) {
            half.send_modify(|half| {
                half.phase = if request.error.is_some() {
                    Half::Failed.into()
                } else {
                    Half::Cancelled.into()
                };
                half.error = request.error;
            });
            if role == Role::Destination {
                self.remove_vm(&now.vm);
            }
        }
        let now = half.borrow().clone();
        Ok(Response::new(now))
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let decision = request.decision();
        self.called(
            &format!("resolve {}", decision.as_str_name()),
            &request.migration,
        );
        let half = self.find(&request.migration, Role::Destination.into())?;
        let now = half.borrow().clone();
        if now.phase() == Half::Ready {
            match decision {
                Decision::Commit => {
                    let mut vm = self.vm(&now.vm).unwrap();
                    vm.state = State::Running.into();
                    vm.epoch = now.epoch + 1;
                    self.put_vm(vm);
                    half.send_modify(|half| half.phase = Half::Completed.into());
                }
                _ => {
                    self.remove_vm(&now.vm);
                    half.send_modify(|half| half.phase = Half::Failed.into());
                }
            }
        }
        let now = half.borrow().clone();
        Ok(Response::new(now))
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        let request = request.into_inner();
        let role = request.role();
        self.called(
            &format!("release {}", role.as_str_name()),
            &request.migration,
        );
        let half = self.find(&request.migration, request.role)?;
        let now = half.borrow().clone();
        let mut inner = self.inner.lock().unwrap();
        if inner.keep_halves {
            return Err(ApiError::new(Reason::Store, "the disk is full").into());
        }
        let gone = inner
            .vms
            .get(&now.vm)
            .is_some_and(|vm| vm.state() == State::Relinquished);
        if gone {
            inner.vms.remove(&now.vm);
        }
        inner.halves.remove(&(request.migration, request.role));
        Ok(Response::new(v1::ReleaseTransferResponse {}))
    }
}
