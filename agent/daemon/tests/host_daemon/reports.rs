//! The report loop against a server that remembers what it was told.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use slat_daemon::HostConfig;
use slat_proto::{
    ApiError, Reason,
    model::{now, std_duration, timestamp_nanos},
    transport::{Endpoint, EndpointHandle},
    v1::{
        self,
        fleet_service_server::{FleetService, FleetServiceServer},
    },
};
use tonic::{Request, Response, Status};

use crate::rig::{MIB, Rig, kill, until};

#[derive(Default)]
struct Heard {
    registered: Vec<v1::Host>,
    /// Another agent has the name.
    taken: bool,
    reports: Vec<v1::ReportHostRequest>,
}

/// Knows only agents that registered with this very server.
struct Fleet(Arc<Mutex<Heard>>);

const INTERVAL: u32 = 30_000;

#[tonic::async_trait]
impl FleetService for Fleet {
    async fn register_host(
        &self,
        request: Request<v1::RegisterHostRequest>,
    ) -> Result<Response<v1::RegisterHostResponse>, Status> {
        let mut heard = self.0.lock().unwrap();
        if heard.taken {
            return Err(ApiError::new(Reason::HostNameTaken, "10.0.0.9:7401 has it").into());
        }
        heard.registered.extend(request.into_inner().host);
        Ok(Response::new(v1::RegisterHostResponse {
            report_interval_millis: INTERVAL,
            ..Default::default()
        }))
    }

    async fn report_host(
        &self,
        request: Request<v1::ReportHostRequest>,
    ) -> Result<Response<v1::ReportHostResponse>, Status> {
        let request = request.into_inner();
        let mut heard = self.0.lock().unwrap();
        if heard
            .registered
            .last()
            .is_none_or(|host| host.incarnation != request.incarnation)
        {
            return Err(ApiError::new(Reason::StaleIncarnation, "who are you?").into());
        }
        heard.reports.push(request);
        Ok(Response::new(v1::ReportHostResponse {
            report_interval_millis: INTERVAL,
            ..Default::default()
        }))
    }
}

struct Server {
    heard: Arc<Mutex<Heard>>,
    endpoint: EndpointHandle,
}

impl Server {
    async fn start(address: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let heard = Arc::<Mutex<Heard>>::default();
        let endpoint = Endpoint::new().service(FleetServiceServer::new(Fleet(Arc::clone(&heard))));
        Self {
            heard,
            endpoint: endpoint.serve_tcp(listener).await.unwrap(),
        }
    }

    /// Waits for a report of which `ask` makes something.
    async fn report<T>(&self, ask: impl Fn(&v1::ReportHostRequest) -> Option<T>) -> T {
        until(async || self.heard.lock().unwrap().reports.last().and_then(&ask)).await
    }

    fn registered(&self) -> Vec<v1::Host> {
        self.heard.lock().unwrap().registered.clone()
    }
}

fn anywhere() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test]
async fn kvm_that_comes_and_goes_is_told_to_the_server() {
    use slat_proto::model::BackendKind;
    use std::sync::atomic::{AtomicBool, Ordering};
    static KVM: AtomicBool = AtomicBool::new(false);
    let server = Server::start(anywhere()).await;
    let address = server.endpoint.address().unwrap();
    let mut rig = Rig::new();
    rig.server = Some(address.to_string().parse().unwrap());
    let mut config = rig.config();
    config.backends = || match KVM.load(Ordering::Relaxed) {
        true => (vec![BackendKind::Kvm, BackendKind::Software], None),
        false => (vec![BackendKind::Software], Some("not there".to_owned())),
    };
    rig.start_with(config).await.unwrap();
    server.report(|_| Some(())).await;
    assert_eq!(server.registered().len(), 1);
    KVM.store(true, Ordering::Relaxed);
    // By the agent's own look: nobody asks for anything.
    until(async || (server.registered().len() > 1).then_some(())).await;
    let (before, after) = (server.registered().remove(0), server.registered().remove(1));
    assert_eq!(before.backend_message, "not there");
    assert_eq!(after.backends().next(), Some(v1::Backend::Kvm));
    assert_eq!(after.backend_message, "");
    assert_eq!(after.incarnation, before.incarnation);
}

#[tokio::test]
async fn the_server_hears_of_changes_at_once_and_again_after_its_restart() {
    let server = Server::start(anywhere()).await;
    let address = server.endpoint.address().unwrap();
    let mut rig = Rig::new();
    rig.server = Some(address.to_string().parse().unwrap());
    rig.start().await;
    server
        .report(|report| report.vms.is_empty().then_some(()))
        .await;
    let host = server.registered().remove(0);
    assert_eq!(
        (host.name.as_str(), host.memory_bytes),
        ("hosts/a", 256 * MIB)
    );
    assert_eq!(host.address, rig.address().to_string());
    assert!(!host.backends.is_empty());

    // The interval is longer than the test may take: what follows are reports of changes.
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let pid = server.report(|report| Some(report.vms.first()?.pid)).await;
    assert_eq!(pid, made.pid);
    rig.send("m1", "web").await.unwrap();
    let side = server
        .report(|report| report.transfers.first().cloned())
        .await;
    assert_eq!(
        (side.migration.as_str(), side.phase()),
        ("migrations/m1", v1::TransferPhase::Precopy)
    );
    server
        .report(|report| (report.vms.first()?.migration == "migrations/m1").then_some(()))
        .await;
    assert_eq!(
        server.report(|report| Some(report.memory_used_bytes)).await,
        16 * MIB
    );
    let pages = server.report(|report| report.huge_pages.clone()).await;
    assert_eq!(pages, crate::fake::huge_pages());
    assert_eq!(server.registered()[0].huge_pages, Some(pages));

    // Another server at the same address knows nobody.
    let incarnation = server.registered()[0].incarnation.clone();
    server.endpoint.stop().await;
    let server = Server::start(address).await;
    rig.create("db", 16 * MIB).await.unwrap();
    server
        .report(|report| (report.vms.len() == 2).then_some(()))
        .await;
    assert_eq!(
        server.registered()[0].incarnation,
        incarnation,
        "the same agent"
    );

    kill(made.pid);
    server
        .report(|report| (report.vms.get(1)?.state() == v1::vm::State::Lost).then_some(()))
        .await;
    let side = server
        .report(|report| report.transfers.first().cloned())
        .await;
    assert_eq!(side.phase(), v1::TransferPhase::Failed);
    assert!(side.vm_lost);

    rig.stop().await;
    rig.start().await;
    until(async || {
        server
            .registered()
            .last()
            .is_some_and(|host| host.incarnation != incarnation)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_agent_does_not_need_its_server() {
    // A port that nobody listens on: bound once and given back.
    let gone = tokio::net::TcpListener::bind(anywhere())
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let mut rig = Rig::new();
    rig.server = Some(gone.to_string().parse().unwrap());
    rig.start().await;
    rig.create("web", 16 * MIB).await.unwrap();
    let server = Server::start(gone).await;
    server.report(|report| report.vms.first().map(drop)).await;
    let stopped = tokio::time::timeout(Duration::from_secs(10), rig.stop()).await;
    assert!(stopped.is_ok(), "a stop does not wait for the server");
}

/// A host whose clock is two hours ahead.
fn ahead() -> SystemTime {
    SystemTime::now() + Duration::from_secs(7200)
}

#[tokio::test]
async fn a_report_says_by_the_hosts_clock_when_it_was_sent_and_how_long_the_last_one_took() {
    let server = Server::start(anywhere()).await;
    let mut rig = Rig::new();
    rig.server = Some(
        server
            .endpoint
            .address()
            .unwrap()
            .to_string()
            .parse()
            .unwrap(),
    );
    let config = HostConfig {
        clock: ahead,
        ..rig.config()
    };
    rig.start_with(config).await.unwrap();
    let first = server.report(|report| Some(report.clone())).await;
    // How far the clock is ahead, less what the report was on its way.
    let early = timestamp_nanos(first.send_time.as_ref().unwrap()) - timestamp_nanos(&now());
    let hours = 7200 * 1_000_000_000_i128;
    assert!((hours - 20_000_000_000..=hours).contains(&early), "{early}");
    assert_eq!(first.last_round_trip, None);

    rig.create("web", 16 * MIB).await.unwrap();
    let took = server.report(|report| report.last_round_trip).await;
    assert!(std_duration(Some(&took)) > Duration::ZERO);
    rig.stop().await;

    // After a new registration there is no last one.
    rig.start().await;
    let incarnation = first.incarnation;
    let again = server
        .report(|report| (report.incarnation != incarnation).then(|| report.clone()))
        .await;
    assert_eq!(again.last_round_trip, None);
}

#[tokio::test]
async fn an_agent_whose_name_is_taken_says_so_and_takes_it_once_it_is_free() {
    let server = Server::start(anywhere()).await;
    let address = server.endpoint.address().unwrap();
    server.heard.lock().unwrap().taken = true;
    let mut rig = Rig::new();
    rig.server = Some(address.to_string().parse().unwrap());
    rig.start().await;
    let own = async || {
        let request = v1::GetHostRequest {
            name: "hosts/a".into(),
        };
        rig.hosts().get_host(request).await.unwrap().into_inner()
    };
    let refused = async || {
        let host = own().await;
        host.state_message.contains("10.0.0.9:7401").then_some(host)
    };
    let host = until(refused).await;
    assert!(host.state_message.contains("refuses"), "{host:?}");
    server.heard.lock().unwrap().taken = false;
    until(async || own().await.state_message.is_empty().then_some(())).await;
    let registered = server.registered().remove(0);
    assert_eq!(registered.uid, host.uid);
    assert!(!host.uid.is_empty());
    let report = server
        .report(|report| Some((report.send_time.is_some(), report.leftovers.len())))
        .await;
    assert_eq!(report, (true, 0));
    rig.prepare("m1", "web", 16 * MIB).await.unwrap();
    server
        .report(|report| (report.leftovers.len() == 1).then_some(()))
        .await;

    rig.stop().await;
    rig.start().await;
    let again = || server.registered().get(1).map(|host| host.uid.clone());
    assert_eq!(until(async || again()).await, host.uid, "the same agent");
}
