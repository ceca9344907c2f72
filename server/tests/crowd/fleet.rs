//! Many fake agents, whose VMs count faults and flushes each at a rate of its own, and migrations
//! in every phase.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{now, proto_duration},
    v1::{self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role},
};
use slat_server::{Server, ServerConfig};
use slat_test_dir::TestDir;
use tokio::task::JoinHandle;

use super::support::{Agent, Clients, Fake, hand_over, vm};

/// Neither the first nor the last by any order.
pub(crate) const BUSIEST: &str = "vms/vm-0713";
pub(crate) const BUSIEST_HOST: &str = "hosts/h071";
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Two crowds at a time would only wait for each other.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub(crate) struct Crowd {
    _one: tokio::sync::MutexGuard<'static, ()>,
    server: Server,
    /// By the host's number.
    agents: BTreeMap<usize, Agent>,
    ticking: Arc<Mutex<Vec<(usize, Fake)>>>,
    begun: Instant,
    ticker: JoinHandle<()>,
    movers: Vec<JoinHandle<()>>,
    _state: TestDir,
}

/// Hosts that a migration begins or ends at, and others that something is wrong with.
const BUSY: [usize; 25] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 50, 51, 60, 61, 70, 71, 80, 81, 90, 91, 123, 150, 180, 181,
];

fn vms_of(host: usize) -> std::ops::Range<usize> {
    host * 10..host * 10 + 10
}

fn name(number: usize) -> String {
    format!("vms/vm-{number:04}")
}

/// Faults a second of a VM: from none to 400, and one that stands out.
fn rate(number: usize, seconds: f64) -> f64 {
    let own = (number * 7919 % 400) as f64;
    let wave = 1.0 + 0.4 * (seconds / 7.0 + number as f64).sin();
    let own = if number.is_multiple_of(5) {
        0.0
    } else {
        own * wave
    };
    if name(number) == BUSIEST {
        9000.0 * wave
    } else {
        own
    }
}

/// Everything a VM has counted in `elapsed`; each rate is summed in steps of a second.
fn counted(number: usize, elapsed: Duration) -> v1::Vm {
    let seconds = elapsed.as_secs_f64();
    let whole = seconds as u32;
    let mut faults: f64 = (0..whole)
        .map(|second| rate(number, f64::from(second)))
        .sum();
    faults += rate(number, seconds) * seconds.fract();
    let mut vm = vm(&name(number), 64);
    vm.uid = format!("0198c0de-{number:04}-7000-8000-000000000000");
    vm.pid = 1000 + number as u32;
    vm.mmu_stats = Some(v1::MmuStats {
        faults_taken: Some(faults as u64),
        remote_tlb_flush_requests: Some((faults / 3.0) as u64),
        // Some backends do not offer it.
        remote_tlb_flushes: (!number.is_multiple_of(4)).then_some((faults / 5.0) as u64),
        ..Default::default()
    });
    vm
}

impl Crowd {
    /// A server nobody reports to yet.
    pub(crate) async fn start(listen: &str) -> Self {
        let one = ONE.lock().await;
        // In memory where there is such a place: two hundred registrations are as many syncs.
        let state = TestDir::within("/dev/shm".as_ref()).unwrap_or_else(|_| TestDir::new());
        let server = Server::start(ServerConfig {
            credentials: None,
            access: slat_proto::transport::Access::default(),
            listen: listen.parse().unwrap(),
            state_dir: state.path().to_owned(),
            report_interval: Duration::from_secs(2),
            host_silence: None,
            render: Some(Arc::new(String::new)),
            version: "0.0.0-crowd".into(),
            retention: slat_server::Retention::default(),
            fence: None,
        })
        .await
        .unwrap();
        let ticking: Arc<Mutex<Vec<(usize, Fake)>>> = Arc::default();
        let fakes = Arc::clone(&ticking);
        let begun = Instant::now();
        let ticker = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            loop {
                tick.tick().await;
                for (host, fake) in &*fakes.lock().unwrap() {
                    for number in vms_of(*host) {
                        let Some(known) = fake.vm(&name(number)) else {
                            continue;
                        };
                        let stats = counted(number, begun.elapsed()).mmu_stats;
                        fake.put_vm(v1::Vm {
                            mmu_stats: stats,
                            ..known
                        });
                    }
                }
            }
        });
        Self {
            _one: one,
            server,
            agents: BTreeMap::new(),
            ticking,
            begun,
            ticker,
            movers: Vec::new(),
            _state: state,
        }
    }

    /// Has these hosts join, each with ten VMs that have been reported then.
    pub(crate) async fn join(&mut self, hosts: impl IntoIterator<Item = usize>) {
        for host in hosts {
            if self.agents.contains_key(&host) {
                continue;
            }
            let fake = Fake::new(&format!("hosts/h{host:03}"));
            for number in vms_of(host) {
                fake.put_vm(counted(number, self.begun.elapsed()));
            }
            let agent = Agent::start(fake.clone(), self.server.address()).await;
            self.ticking.lock().unwrap().push((host, fake));
            self.agents.insert(host, agent);
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    fn fake(&self, host: usize) -> Fake {
        self.agents[&host].fake.clone()
    }

    /// Begins to move a VM to the host after its own, with these figures once pages flow.
    async fn begin(&mut self, number: usize, params: v1::MigrationParams) -> String {
        let (from, to) = (number / 10, number / 10 + 1);
        let mut clients = Clients::new(self.address());
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: name(number),
                destination: format!("hosts/h{to:03}"),
                params: Some(params),
                ..Default::default()
            }),
            migration_id: format!("move-{number:04}"),
            ..Default::default()
        };
        let made = clients.migrations.create_migration(request).await.unwrap();
        let made = made.into_inner().name;
        self.fake(from).wait_call(&format!("start {made}")).await;
        made
    }

    /// A migration that runs with figures of `figures(seconds)`.
    async fn running(
        &mut self,
        number: usize,
        params: v1::MigrationParams,
        figures: fn(f64) -> v1::MigrationProgress,
    ) {
        let made = self.begin(number, params).await;
        let fake = self.fake(number / 10);
        let begun = Instant::now();
        self.movers.push(tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(250));
            loop {
                tick.tick().await;
                fake.set(&made, Role::Source, |side| {
                    side.phase = SidePhase::Precopy.into();
                    side.progress = Some(figures(begun.elapsed().as_secs_f64()));
                });
            }
        }));
    }

    /// Migrations that ended, ended badly, run well, run badly; a twin, VMs that are lost and that
    /// do not answer, a leftover; hosts that are silent, cordoned, of another time. Before the many
    /// join: an unoptimised server is slow with them.
    pub(crate) async fn migrations(&mut self) {
        self.join(BUSY).await;
        let mut clients = Clients::new(self.address());
        for number in [15, 25, 35, 45, 55, 65, 75, 85, 95] {
            let made = self.begin(number, allowed(300)).await;
            let (source, destination) = (self.fake(number / 10), self.fake(number / 10 + 1));
            source.set(&made, Role::Source, |side| {
                side.phase = SidePhase::Precopy.into()
            });
            if number == 35 {
                source.set(&made, Role::Source, |side| {
                    side.phase = SidePhase::Failed.into();
                    side.error = Some(lost_connection());
                });
                clients.wait_phase(&made, Phase::Failed).await;
                continue;
            }
            hand_over(&source, &destination, &made, &name(number));
            source.set(&made, Role::Source, |side| {
                let progress = side.progress.get_or_insert_default();
                whole(progress, number as u64);
            });
            clients.wait_phase(&made, Phase::Completed).await;
        }
        let cancelled = self.begin(105, allowed(300)).await;
        clients.cancel(&cancelled).await.unwrap();
        self.running(505, allowed(300), |seconds| first_copy(seconds, 64 * MIB))
            .await;
        let capped = v1::MigrationParams {
            max_bandwidth_bytes_per_second: 20 * MIB,
            ..allowed(300)
        };
        self.running(605, capped, |seconds| first_copy(seconds, 20 * MIB))
            .await;
        self.running(705, allowed(100), too_busy).await;
        self.running(805, allowed(300), |_| first_copy(3.0, 64 * MIB))
            .await;
        self.fake(91).hold("prepare");
        let mut waits = clients.migrations.clone();
        let request = v1::CreateMigrationRequest {
            migration: Some(v1::Migration {
                vm: name(905),
                destination: "hosts/h091".into(),
                ..Default::default()
            }),
            migration_id: "move-0905".into(),
            ..Default::default()
        };
        waits.create_migration(request).await.unwrap();
        // A twin: the same name, another VM.
        let mut twin = counted(1234, Duration::from_secs(1));
        twin.uid = "0198c0de-ffff-7000-8000-00000000beef".into();
        self.fake(5).put_vm(twin);
        let mut lost = counted(1501, Duration::ZERO);
        lost.set_state(v1::vm::State::Lost);
        lost.state_message = "its process (pid 2501) is gone: killed by signal 9".into();
        self.fake(150).put_vm(lost);
        let mut silent = counted(1502, Duration::ZERO);
        silent.set_state(v1::vm::State::Unresponsive);
        silent.state_message = "its process (pid 2502, stopped by a signal) does not answer".into();
        self.fake(150).put_vm(silent);
        self.fake(150).put_leftover(v1::Leftover {
            uid: "0198c0de-eeee-7000-8000-00000000beef".into(),
            vm: "vms/vm-1999".into(),
            kind: v1::leftover::Kind::RelinquishedSource.into(),
            ..Default::default()
        });
        self.fake(123).set_clock(7200);
        let cordon = v1::CordonHostRequest {
            name: "hosts/h051".into(),
        };
        clients.hosts.cordon_host(cordon).await.unwrap();
        self.agents.remove(&180).unwrap().stop().await;
    }

    pub(crate) async fn stop(self) {
        self.ticker.abort();
        for mover in self.movers {
            mover.abort();
        }
        self.server.stop().await;
        for agent in self.agents.into_values() {
            agent.stop().await;
        }
    }
}

fn allowed(millis: u64) -> v1::MigrationParams {
    v1::MigrationParams {
        max_downtime: Some(proto_duration(Duration::from_millis(millis))),
        ..Default::default()
    }
}

fn lost_connection() -> v1::MigrationError {
    let error = ApiError::new(
        Reason::ConnectionLost,
        "stream 3 of 4 broke: connection reset",
    );
    v1::MigrationError {
        reason: error.reason.as_str().into(),
        message: error.message,
        side: "source".into(),
        advice: "migrate again; look at the network between the hosts' data addresses".into(),
        ..Default::default()
    }
}

/// A whole migration's figures.
fn whole(progress: &mut v1::MigrationProgress, number: u64) {
    let millis = |millis| Some(proto_duration(Duration::from_millis(millis)));
    let scale = 1 + number % 4;
    progress.total_bytes = 512 * MIB;
    progress.bytes_transferred = 700 * MIB;
    progress.pages_normal = 170_000;
    progress.throughput_bytes_per_second = 900 * MIB;
    progress.dirty_rate_bytes_per_second = 90 * MIB;
    progress.iteration = 3;
    progress.downtime = millis(22 * scale + 11);
    progress.downtime_breakdown = Some(v1::DowntimeBreakdown {
        pause: millis(2),
        final_copy: millis(18 * scale),
        state: millis(3 * scale),
        commit: millis(4),
        resume: millis(3),
    });
    progress.iterations = (0..=3)
        .map(|iteration| v1::MigrationIteration {
            iteration,
            bytes_transferred: (512 * MIB) >> (3 * iteration),
            pages_normal: 131_072 >> (3 * iteration),
            pages_zero: 0,
            duration: millis(600 >> (3 * iteration)),
            dirty_pages: 16_384 >> (3 * iteration),
            expected_downtime: millis(220 >> iteration),
            r#final: iteration == 3,
            remaining_bytes_start: (512 * MIB) >> (3 * iteration),
        })
        .collect();
    progress.decisions = [
        (
            0,
            v1::migration_decision::Action::Continue,
            "64.0 MiB dirty, estimated downtime 220 ms above 150 ms",
        ),
        (
            1,
            v1::migration_decision::Action::Continue,
            "8.0 MiB dirty, estimated downtime 110 ms; one more gains",
        ),
        (
            2,
            v1::migration_decision::Action::Switchover,
            "1.0 MiB dirty, estimated downtime 55 ms fits 300 ms",
        ),
    ]
    .into_iter()
    .map(|(iteration, action, cause)| v1::MigrationDecision {
        time: Some(now()),
        iteration,
        action: action.into(),
        cause: cause.into(),
    })
    .collect();
}

fn first_copy(seconds: f64, rate: u64) -> v1::MigrationProgress {
    let sent = ((seconds * rate as f64) as u64) % (8 * GIB);
    v1::MigrationProgress {
        total_bytes: 8 * GIB,
        remaining_bytes: 8 * GIB - sent,
        bytes_transferred: sent,
        throughput_bytes_per_second: rate,
        ..Default::default()
    }
}

/// A guest that dirties as fast as it is sent: a saw tooth of four seconds.
fn too_busy(seconds: f64) -> v1::MigrationProgress {
    let iteration = (seconds / 4.0) as u32;
    let rate = 500 * MIB;
    let iterations: Vec<_> = (0..iteration)
        .map(|iteration| v1::MigrationIteration {
            iteration,
            bytes_transferred: 2 * GIB,
            pages_normal: 524_288,
            duration: Some(proto_duration(Duration::from_secs(4))),
            dirty_pages: 480_000,
            expected_downtime: Some(proto_duration(Duration::from_millis(3900))),
            remaining_bytes_start: 2 * GIB,
            ..Default::default()
        })
        .collect();
    v1::MigrationProgress {
        iteration,
        total_bytes: 2 * GIB,
        remaining_bytes: 2 * GIB - ((seconds % 4.0) * rate as f64) as u64,
        bytes_transferred: (seconds * rate as f64) as u64,
        throughput_bytes_per_second: rate,
        dirty_rate_bytes_per_second: 470 * MIB,
        expected_downtime: Some(proto_duration(Duration::from_millis(3900))),
        decisions: iterations
            .iter()
            .map(|done| v1::MigrationDecision {
                time: Some(now()),
                iteration: done.iteration,
                action: v1::migration_decision::Action::Continue.into(),
                cause: "1.8 GiB dirty, estimated downtime 3.9 s above 100 ms".into(),
            })
            .collect(),
        iterations,
        ..Default::default()
    }
}
