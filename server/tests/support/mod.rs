//! A fake agent: an in-process gRPC server that holds VMs and sides of migrations as data and lets
//! a test move them. It behaves as `transfer.proto` says: idempotent calls, sides that stay until
//! they are released, refusals with reasons.

#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test file uses its part of what is no library"
)]

mod services;
mod transfers;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{key_from_message, now, proto_duration, refused_grant, signed_grant, system_time},
    transport::{Endpoint, EndpointHandle, TracedChannel, connect},
    v1::{
        self, TransferPhase as SidePhase, TransferRole as Role,
        fleet_service_client::FleetServiceClient, host_service_client::HostServiceClient,
        host_service_server::HostServiceServer, memory_service_server::MemoryServiceServer,
        migration_service_client::MigrationServiceClient,
        transfer_service_server::TransferServiceServer, vm::State,
        vm_service_client::VmServiceClient, vm_service_server::VmServiceServer,
    },
};
use slat_server::{FenceHook, Retention, Server, ServerConfig};
use slat_trust::grant::{Grant, GrantKey, KeyRing};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tokio_stream::Stream;
use tonic::{Response, Status};

/// Nothing a test waits for takes this long.
pub const PATIENCE: Duration = Duration::from_secs(20);

type Key = (String, i32);

#[derive(Default)]
struct Inner {
    vms: BTreeMap<String, v1::Vm>,
    sides: HashMap<Key, watch::Sender<v1::Transfer>>,
    refuse_describe: Option<Status>,
    refuse_prepare: Option<ApiError>,
    forget_versions: bool,
    refuse_start: Option<ApiError>,
    keep_sides: bool,
    stopping: bool,
    leftovers: Vec<v1::Leftover>,
    /// Which start of its agent this is, when not the first.
    incarnation: Option<String>,
    /// As whom GetHost answers, when not as itself.
    answers_as: Option<v1::Host>,
    /// Of its host's clock, seconds ahead of the machine's.
    clock_ahead: i64,
    /// The server's keys, as it announced them last.
    keys: KeyRing,
    /// What it was given leave for, in order.
    leave: Vec<Grant>,
    /// What its VM processes say of their page streams.
    channel_key: Vec<u8>,
    /// Channels that StartOutgoing named.
    channels: Vec<i32>,
}

/// What the agent was asked, in order: the call and its migration or VM.
#[derive(Clone)]
pub struct Fake {
    pub name: String,
    pub arch: String,
    /// Of its state directory; empty: an agent that has none.
    pub uid: String,
    /// What it says of paging; its host has KVM, too, when it says anything.
    pub paging: Option<v1::HostPaging>,
    inner: Arc<Mutex<Inner>>,
    calls: watch::Sender<Vec<String>>,
    held: watch::Sender<BTreeSet<String>>,
}

/// A fake agent that serves and reports.
pub struct Agent {
    pub fake: Fake,
    pub address: SocketAddr,
    endpoint: EndpointHandle,
    reporter: Option<JoinHandle<()>>,
}

fn key(migration: &str, role: Role) -> Key {
    (migration.to_owned(), role.into())
}

/// Enters a phase and says when it did.
fn enter(side: &mut v1::Transfer, phase: SidePhase, time: Option<prost_types::Timestamp>) {
    side.phase = phase.into();
    side.phase_times.push(v1::TransferPhaseTime {
        phase: phase.into(),
        time,
    });
}

fn ended(phase: SidePhase) -> bool {
    matches!(
        phase,
        SidePhase::Completed | SidePhase::Cancelled | SidePhase::Failed
    )
}

impl Fake {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            arch: "x86_64".into(),
            uid: format!("agent-of-{name}"),
            paging: None,
            inner: Arc::default(),
            calls: watch::channel(Vec::new()).0,
            held: watch::channel(BTreeSet::new()).0,
        }
    }

    /// From now on such calls wait before they take effect: `describe`, `prepare`, `start`,
    /// `cancel`, `get`, `watch`, `resolve` or `release`, the last five followed by the role; or,
    /// with `after ` in front, before they answer.
    pub fn hold(&self, call: &str) {
        self.held.send_modify(|held| {
            held.insert(call.to_owned());
        });
    }

    /// Lets go what is held of that call.
    pub fn let_go(&self, call: &str) {
        self.held.send_modify(|held| {
            held.remove(call);
        });
    }

    /// Waits while such calls are held; tells the test that one has come.
    async fn gate(&self, call: &str) {
        if self.held.borrow().contains(call) {
            self.called("held", call);
            let mut held = self.held.subscribe();
            // The fake outlives its calls.
            drop(held.wait_for(|held| !held.contains(call)).await);
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

    pub fn refuse_describe(&self, status: Status) {
        self.inner.lock().unwrap().refuse_describe = Some(status);
    }

    /// Answers PrepareIncoming as an agent does that knows no preamble.
    pub fn forget_versions(&self) {
        self.inner.lock().unwrap().forget_versions = true;
    }

    pub fn refuse_prepare(&self, error: ApiError) {
        self.inner.lock().unwrap().refuse_prepare = Some(error);
    }

    pub fn refuse_start(&self, error: ApiError) {
        self.inner.lock().unwrap().refuse_start = Some(error);
    }

    /// What the server announced.
    fn learn(&self, keys: &[v1::GrantKey]) {
        assert!(!keys.is_empty() && keys.len() <= 8);
        let mut ring = KeyRing::default();
        ring.learn(keys.iter().map(|key| key_from_message(key).unwrap()));
        self.inner.lock().unwrap().keys = ring;
    }

    /// Ids of the server's keys, as it announced them last.
    pub fn keys(&self) -> Vec<[u8; 8]> {
        let inner = self.inner.lock().unwrap();
        inner.keys.keys().iter().map(GrantKey::id).collect()
    }

    /// What it was given leave for, in order.
    pub fn leave(&self) -> Vec<Grant> {
        self.inner.lock().unwrap().leave.clone()
    }

    /// Its processes protect their pages by this key from now on.
    pub fn set_channel_key(&self, key: [u8; 32]) {
        self.inner.lock().unwrap().channel_key = key.to_vec();
    }

    /// Channels that StartOutgoing named.
    pub fn channels(&self) -> Vec<i32> {
        self.inner.lock().unwrap().channels.clone()
    }

    /// Checks a grant as an agent does: by key and time.
    fn take_leave(&self, field: Option<&v1::SignedGrant>) -> Result<Grant, ApiError> {
        let signed = signed_grant(field)?;
        let now = system_time(&self.now()).unwrap();
        let mut inner = self.inner.lock().unwrap();
        let grant = inner.keys.verify(&signed, now);
        let grant = grant.map_err(|error| refused_grant(&error, None))?;
        inner.leave.push(grant.clone());
        Ok(grant)
    }

    /// Whether ReleaseTransfer is refused.
    pub fn keep_sides(&self, keep: bool) {
        self.inner.lock().unwrap().keep_sides = keep;
    }

    /// What it reports as left over from now on.
    pub fn put_leftover(&self, leftover: v1::Leftover) {
        self.inner.lock().unwrap().leftovers.push(leftover);
    }

    /// Answers GetHost as somebody else, or as itself again.
    pub fn answer_as(&self, host: Option<v1::Host>) {
        self.inner.lock().unwrap().answers_as = host;
    }

    /// From now on it is another start of its agent.
    pub fn start_anew(&self, incarnation: &str) {
        self.inner.lock().unwrap().incarnation = Some(incarnation.to_owned());
    }

    fn incarnation(&self) -> String {
        let inner = self.inner.lock().unwrap();
        inner.incarnation.clone().unwrap_or_else(|| "1".to_owned())
    }

    /// Its host as it registers and answers.
    pub fn host(&self) -> v1::Host {
        v1::Host {
            name: self.name.clone(),
            uid: self.uid.clone(),
            incarnation: self.incarnation(),
            arch: self.arch.clone(),
            state: v1::host::State::Ready.into(),
            backends: match self.paging {
                Some(_) => vec![v1::Backend::Kvm.into(), v1::Backend::Software.into()],
                None => vec![v1::Backend::Software.into()],
            },
            paging: self.paging.clone(),
            memory_bytes: 1 << 30,
            ..Default::default()
        }
    }

    /// Sets its host's clock.
    pub fn set_clock(&self, seconds_ahead: i64) {
        self.inner.lock().unwrap().clock_ahead = seconds_ahead;
    }

    /// Its host's clock.
    pub fn now(&self) -> prost_types::Timestamp {
        let ahead = self.inner.lock().unwrap().clock_ahead;
        let now = now();
        prost_types::Timestamp {
            seconds: now.seconds + ahead,
            ..now
        }
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

    pub fn vm_by_uid(&self, uid: &str) -> Option<v1::Vm> {
        let inner = self.inner.lock().unwrap();
        inner.vms.values().find(|vm| vm.uid == uid).cloned()
    }

    /// The VM for who watches it; none when the agent stops.
    fn watched(&self, name: &str) -> Option<v1::Vm> {
        let inner = self.inner.lock().unwrap();
        let vm = inner.vms.get(name);
        vm.filter(|_| !inner.stopping).cloned()
    }

    pub fn side(&self, migration: &str, role: Role) -> Option<v1::Transfer> {
        let inner = self.inner.lock().unwrap();
        inner
            .sides
            .get(&key(migration, role))
            .map(|side| side.borrow().clone())
    }

    /// Moves a side on.
    pub fn set(&self, migration: &str, role: Role, change: impl FnOnce(&mut v1::Transfer)) {
        let inner = self.inner.lock().unwrap();
        inner.sides[&key(migration, role)].send_modify(change);
    }

    pub fn phase(&self, migration: &str, role: Role, phase: SidePhase) {
        let time = Some(self.now());
        self.set(migration, role, |side| enter(side, phase, time));
    }

    /// A side as if an earlier life had made it.
    pub fn put_side(&self, side: v1::Transfer) {
        let key = key(&side.migration, side.role());
        self.inner
            .lock()
            .unwrap()
            .sides
            .insert(key, watch::channel(side).0);
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
        if inner.stopping {
            return Err(Status::unavailable("stopping"));
        }
        inner
            .sides
            .get(&(migration.to_owned(), role))
            .cloned()
            .ok_or_else(|| {
                ApiError::new(Reason::NoSuchMigration, format!("no side of {migration}")).into()
            })
    }

    fn report(&self) -> v1::ReportHostRequest {
        let send_time = Some(self.now());
        let incarnation = self.incarnation();
        let inner = self.inner.lock().unwrap();
        let used = inner
            .vms
            .values()
            .map(|vm| vm.spec.clone().unwrap_or_default().memory_bytes);
        v1::ReportHostRequest {
            host: self.name.clone(),
            incarnation,
            vms: inner.vms.values().cloned().collect(),
            memory_used_bytes: used.sum(),
            send_time,
            transfers: inner
                .sides
                .values()
                // As an agent reports: without figures.
                .map(|side| v1::Transfer {
                    progress: None,
                    ..side.borrow().clone()
                })
                .collect(),
            leftovers: inner.leftovers.clone(),
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
            dirty_engine: 0,
            backing: 0,
            numa_node: None,
            prefault: false,
            paging: 0,
            guest: None,
            ..Default::default()
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
        let endpoint = Endpoint::new()
            .service(VmServiceServer::new(fake.clone()))
            .service(MemoryServiceServer::new(fake.clone()))
            .service(HostServiceServer::new(fake.clone()))
            .service(TransferServiceServer::new(fake.clone()))
            .serve_tcp(listener)
            .await
            .unwrap();
        Self {
            address: endpoint.address().unwrap(),
            fake,
            endpoint,
            reporter: None,
        }
    }

    /// Registers and reports once, or says how the server refuses that.
    pub async fn try_report_to(&mut self, server: SocketAddr) -> Result<(), ApiError> {
        let mut fleet = FleetServiceClient::new(channel(server));
        let host = v1::Host {
            address: self.address.to_string(),
            ..self.fake.host()
        };
        answer(
            fleet
                .register_host(v1::RegisterHostRequest { host: Some(host) })
                .await,
        )?;
        answer(fleet.report_host(self.fake.report()).await).map(drop)
    }

    /// Registers, reports once, and goes on reporting.
    pub async fn report_to(&mut self, server: SocketAddr) {
        let mut fleet = FleetServiceClient::new(channel(server));
        let host = v1::Host {
            address: self.address.to_string(),
            ..self.fake.host()
        };
        let register = v1::RegisterHostRequest { host: Some(host) };
        let answer = fleet.register_host(register).await.unwrap().into_inner();
        self.fake.learn(&answer.grant_keys);
        let interval = answer.report_interval_millis;
        let sent = Instant::now();
        fleet.report_host(self.fake.report()).await.unwrap();
        let mut round_trip = sent.elapsed();
        let fake = self.fake.clone();
        let reporter = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(interval.into()));
            loop {
                tick.tick().await;
                let mut report = fake.report();
                report.last_round_trip = Some(proto_duration(round_trip));
                let sent = Instant::now();
                match fleet.report_host(report).await {
                    Ok(answer) => fake.learn(&answer.into_inner().grant_keys),
                    Err(_) => return,
                }
                round_trip = sent.elapsed();
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
        // Open watches would hold the listener for its drain time.
        let sides: Vec<v1::Transfer> = {
            let mut inner = self.fake.inner.lock().unwrap();
            let sides = inner
                .sides
                .values()
                .map(|side| side.borrow().clone())
                .collect();
            inner.sides.clear();
            inner.stopping = true;
            sides
        };
        self.endpoint.stop().await;
        self.fake.inner.lock().unwrap().stopping = false;
        for side in sides {
            self.fake.put_side(side);
        }
        (self.fake, self.address)
    }
}

pub fn channel(address: SocketAddr) -> TracedChannel {
    connect(&address.to_string().parse().unwrap()).unwrap()
}

/// A server with a short interval on `state`.
pub async fn server(state: &std::path::Path) -> Server {
    server_that_keeps(state, Retention::default()).await
}

/// The same with another retention.
pub async fn server_that_keeps(state: &std::path::Path, retention: Retention) -> Server {
    Server::start(config(state, retention)).await.unwrap()
}

/// The same with a hook that fences hosts.
pub async fn server_that_fences(state: &std::path::Path, hook: FenceHook) -> Server {
    let mut config = config(state, Retention::default());
    config.fence = Some(hook);
    Server::start(config).await.unwrap()
}

fn config(state: &std::path::Path, retention: Retention) -> ServerConfig {
    ServerConfig {
        credentials: None,
        access: slat_proto::transport::Access::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: state.to_owned(),
        report_interval: Duration::from_millis(100),
        host_silence: None,
        retention,
        fence: None,
        render: Some(Arc::new(|| "slat_test 1\n".to_owned())),
        version: "0.0.0-test".into(),
    }
}

#[derive(Clone)]
pub struct Clients {
    pub vms: VmServiceClient<TracedChannel>,
    pub hosts: HostServiceClient<TracedChannel>,
    pub migrations: MigrationServiceClient<TracedChannel>,
}

impl Clients {
    pub fn new(server: SocketAddr) -> Self {
        Self {
            vms: VmServiceClient::new(channel(server)),
            hosts: HostServiceClient::new(channel(server)),
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

    pub async fn host(&mut self, name: &str) -> v1::Host {
        let request = v1::GetHostRequest { name: name.into() };
        answer(self.hosts.get_host(request).await).unwrap()
    }

    pub async fn list(&mut self) -> v1::ListVmsResponse {
        answer(self.vms.list_vms(v1::ListVmsRequest::default()).await).unwrap()
    }

    pub async fn vm(&mut self, name: &str) -> Result<v1::Vm, ApiError> {
        let request = v1::GetVmRequest {
            name: name.into(),
            ..Default::default()
        };
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

/// Both sides of a handover as the two processes would do it, up to the end.
pub fn hand_over(source: &Fake, destination: &Fake, migration: &str, vm: &str) {
    destination.phase(migration, Role::Destination, SidePhase::Ready);
    source.phase(migration, Role::Source, SidePhase::Relinquished);
    let mut moved = source.vm(vm).unwrap();
    let mut left = moved.clone();
    left.state = State::Relinquished.into();
    source.put_vm(left);
    moved.epoch += 1;
    moved.pid += 1;
    moved.state = State::Running.into();
    destination.put_vm(moved);
    let time = Some(destination.now());
    destination.set(migration, Role::Destination, |side| {
        enter(side, SidePhase::Completed, time);
        let progress = side.progress.get_or_insert_default();
        progress.cpu_time = Some(proto_duration(Duration::from_millis(7)));
    });
    let time = Some(source.now());
    source.set(migration, Role::Source, |side| {
        enter(side, SidePhase::Completed, time);
        let progress = side.progress.get_or_insert_default();
        progress.downtime = Some(proto_duration(Duration::from_millis(12)));
        progress.iterations = vec![v1::MigrationIteration::default(); 3];
        progress.verification = v1::Verification::Match.into();
    });
}
