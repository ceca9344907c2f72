//! The daemon of one hypervisor host.
//!
//! It starts one `slat vm` process per VM, finds them again after its own restart, routes requests
//! to them and reports to the server. It holds no guest and decides nothing about ownership: an
//! agent can crash, restart or be upgraded and no guest notices.
//!
//! | file | what |
//! |---|---|
//! | `supervisor` | VM processes: found, made, watched to their end, cleared away |
//! | `process` | one process: spawn, pidfd, lock |
//! | `helper` | the processes beside it: its pager, a save's writer |
//! | `paged`, `pager` | what a VM says of its paging; its pager kept |
//! | `source` | page sources on their way between processes |
//! | `saves` | the saves of this host |
//! | `registry` | which VMs are held, by uid, and the memory they have reserved |
//! | `identity` | whose a directory is, and which agent this is |
//! | `announce` | a side known on disk before it begins |
//! | `living`, `follow` | a VM with a process: channel and cache, the tasks that keep it |
//! | `silence` | a VM whose process does not answer: what its journal says |
//! | `dead`, `remains` | a VM without one: what its journal and records say |
//! | `grants` | the server's leave for migrations, checked |
//! | `doubt` | a destination in doubt: its source's agent asked |
//! | `sighting` | source sides seen to have given their VM away |
//! | `ended` | sides of migrations that outlived their VM's directory |
//! | `vm_api`, `memory_api`, `transfer_api`, `host_api` | the services |
//! | `snapshot_api`, `paging_api` | those of saves, copies and pagers |
//! | `report` | upcalls to the server |
//! | `traffic` | bytes that migrations moved, over all sides |
//! | `usage` | CPU time and memory of VM processes |
//! | `counts`, `metrics` | `/metrics` |
//!
//! # State directory
//! ```text
//! <state>/agent.lock            held with flock by the agent
//! <state>/agent-id              the agent's identity, made once
//! <state>/grant-keys.json       the server's public keys, as it announced them
//! <state>/grants-used.json      grants that were used, until they end
//! <state>/vms/<uid>/            one VM's directory (slat_record::dir), and in it
//! <state>/vms/<uid>/seen.pb     the VM as the agent first saw it, for when its process is gone
//! <state>/vms/<uid>/received-*   by what grant the VM was received, and from where
//! <state>/vms/<uid>/sighted/    source sides the agent saw RELINQUISHED or COMPLETED
//! <state>/vms/<uid>/saves       ids of saves that its memory comes from
//! <state>/vms/<uid>/pager.log   what its pager said
//! <state>/saves/                saves, unless the configuration has another place
//! <state>/transfers/            sides nobody has released whose VM directory is gone
//! ```
//! Directories of older versions are called by the VM's name. They are found again all the same:
//! the uid is in the journal.
//!
//! # Tasks and locks
//! Every task runs on one tracker and ends with one token ([`Agent::stop`]), or is bounded work on
//! a directory that is waited for. Locks are leaf mutexes, each in its own file's contract; none is
//! held across an `.await`.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};
use slat_proto::{
    model::{HostName, Labels},
    transport::{Access, Address, Endpoint, EndpointHandle, Link, connect_by},
    v1::{
        self, host_service_server::HostServiceServer, memory_service_server::MemoryServiceServer,
        paging_service_server::PagingServiceServer, snapshot_service_server::SnapshotServiceServer,
        transfer_service_server::TransferServiceServer, vm_service_server::VmServiceServer,
    },
};
use slat_trust::{Credentials, Expects, Kind};
use tokio::net::TcpListener;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

mod admission;
mod announce;
mod beginning;
mod cgroup;
mod counts;
mod dead;
mod disk;
mod doubt;
mod ended;
mod error;
mod fenced;
mod follow;
mod grants;
mod helper;
mod host_api;
mod identity;
mod living;
mod memory_api;
mod metrics;
mod paged;
mod pager;
mod paging_api;
mod pools;
mod process;
mod registry;
mod remains;
mod report;
mod saves;
mod side;
mod sighting;
mod silence;
mod snapshot_api;
mod source;
mod supervisor;
mod traffic;
mod transfer_api;
mod unanswered;
mod usage;
mod vm_api;

pub use error::HostError;

pub use self::{
    admission::{Admit, Fits, Look},
    cgroup::VmCgroup,
    host_api::Trust,
};

use self::{
    admission::Backends, cgroup::Cgroups, disk::Disk, ended::EndedSides, grants::Grants,
    helper::Programs, host_api::HostCard, pools::Pools, registry::Registry, saves::Saves,
    supervisor::Supervisor, usage::Usage,
};

/// How long [`Agent::stop`] waits for work on directories.
const FINISH: Duration = Duration::from_secs(20);

/// Renders the process-wide metrics, which the owner of the process installed, as Prometheus text.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// What an agent needs to know.
#[derive(Clone)]
pub struct HostConfig {
    /// This host's name.
    pub name: HostName,
    /// Where to serve gRPC, `/metrics` and `/healthz`.
    pub listen: SocketAddr,
    /// `host:port` under which the server and other agents reach this one; `None`: the bound
    /// address.
    pub advertise: Option<String>,
    /// The server to report to; `None`: to nobody.
    pub server: Option<Address>,
    /// Where VM directories and records are; made when missing.
    pub state_dir: PathBuf,
    /// Memory that VMs may use, bytes.
    pub memory_bytes: u64,
    /// Where VM processes listen for pages.
    pub data_ip: IpAddr,
    /// Program and leading arguments of a VM process; the agent adds `--dir --vm --uid --host
    /// --data-ip`.
    pub vm_program: Vec<OsString>,
    /// Program and leading arguments of a VM's pager; the agent adds `--dir`.
    pub pager_program: Vec<OsString>,
    /// Program and arguments of the process that writes a save; it finds its socket as descriptor
    /// 3.
    pub writer_program: Vec<OsString>,
    /// Where saves are; made when missing. `None`: `saves` in the state directory.
    pub save_dir: Option<PathBuf>,
    /// How `vm_program` confines its process, for people to see; the agent adds what it knows of
    /// cgroups.
    pub confinement: v1::VmConfinement,
    /// Where VM processes get cgroups of their own.
    pub vm_cgroup: VmCgroup,
    /// Who this agent is, and whom it takes; `None`: it serves anybody, in the clear.
    pub credentials: Option<Credentials>,
    /// What callers may do.
    pub access: Access,
    /// Which backends work here; asked again and again.
    pub backends: Look,
    /// Whether VMs on KVM can have dirty rings here; asked when KVM works. May ask the kernel.
    pub dirty_rings: fn() -> bool,
    /// What this host's kernel can do for VMs whose memory is watched; asked whenever `backends`
    /// is. May ask the kernel.
    pub paging: fn() -> v1::HostPaging,
    /// The pages that this host set aside, now; asked again and again. May block.
    pub huge_pages: fn() -> v1::HugePages,
    /// Whether a VM that is announced could live here; asked before anything is reserved. May
    /// block.
    pub admit: Admit,
    /// Whether memory for a new VM could be made here; asked for a trial, a VM's own process asks
    /// for itself. May block.
    pub fits: Fits,
    /// The host's wall clock; [`SystemTime::now`] unless a test has its own.
    pub clock: fn() -> SystemTime,
    /// How this host's endpoint and page streams are protected; asked again and again.
    pub trust: Trust,
    /// What its operator calls this host by.
    pub labels: Labels,
    /// Slat's version, for people and metrics.
    pub version: String,
    /// Process-wide metrics to put before this agent's own on `/metrics`.
    pub render: Option<Render>,
}

impl fmt::Debug for HostConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostConfig")
            .field("name", &self.name)
            .field("listen", &self.listen)
            .field("advertise", &self.advertise)
            .field("server", &self.server)
            .field("state_dir", &self.state_dir)
            .field("memory_bytes", &self.memory_bytes)
            .field("data_ip", &self.data_ip)
            .field("vm_program", &self.vm_program)
            .field("save_dir", &self.save_dir)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    address: SocketAddr,
    endpoint: EndpointHandle,
    supervisor: Arc<Supervisor>,
    lock: StateLock,
    /// Ends the tasks of an agent that is dropped without a stop.
    _guard: DropGuard,
}

impl Agent {
    /// Takes the state directory, finds the VM processes there are, then opens the endpoint and
    /// begins to report.
    ///
    /// # Errors
    /// See [`HostError`]. Nothing is left running; VM processes that were there go on.
    pub async fn start(config: HostConfig) -> Result<Self, HostError> {
        let advertise = config
            .advertise
            .as_deref()
            .map(str::parse::<Address>)
            .transpose();
        if let Err(error) = &advertise {
            return Err(HostError::Config {
                message: format!("the advertised address: {error}"),
            });
        }
        if config.server.is_some()
            && config.advertise.is_none()
            && config.listen.ip().is_unspecified()
        {
            return Err(HostError::Config {
                message: format!(
                    "listening on {}, every address of this host: say which one others use (advertise)",
                    config.listen
                ),
            });
        }
        if config.vm_program.is_empty() {
            return Err(HostError::Config {
                message: "no program for VM processes is configured".to_owned(),
            });
        }
        if let Err(error) = process::keep_inherited() {
            tracing::warn!(%error, "VM processes inherit this process's open descriptors");
        }
        let channel = match &config.server {
            Some(server) => {
                let link = Link::new(config.credentials.as_ref(), Expects::Kinds(&[Kind::Server]));
                let channel =
                    connect_by(server, &link).map_err(|source| HostError::Server { source })?;
                Some((server.clone(), channel))
            }
            None => None,
        };
        // VM processes get the directory as an argument and may be asked for it from anywhere.
        let state_dir = make_dir(&config.state_dir)
            .and_then(|()| config.state_dir.canonicalize())
            .map_err(|source| HostError::StateDir {
                path: config.state_dir.clone(),
                source,
            })?;
        let lock = StateLock::take(&state_dir)?;
        let uid = identity::agent_uid(&state_dir).map_err(|source| HostError::StateDir {
            path: state_dir.join("agent-id"),
            source,
        })?;
        let vms_dir = state_dir.join("vms");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| HostError::StateDir { path, source }
        };
        make_dir(&vms_dir).map_err(failed(&vms_dir))?;
        let transfers_dir = state_dir.join("transfers");
        let ended = EndedSides::open(&transfers_dir).map_err(failed(&transfers_dir))?;
        let incarnation = uuid::Uuid::now_v7().to_string();
        let grants = Grants::open(&state_dir, &config.name, &incarnation, config.clock)
            .map_err(failed(&state_dir))?;
        let save_dir = config.save_dir.unwrap_or_else(|| state_dir.join("saves"));
        let (host, opened) = (config.name.clone(), save_dir.clone());
        let saves = tokio::task::spawn_blocking(move || Saves::open(&host, &opened)).await;
        let saves = saves
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(failed(&save_dir))?;
        let backends = Backends::new(config.backends, config.dirty_rings, config.paging);
        backends.fresh().await;
        let cgroups = tokio::task::spawn_blocking(move || Cgroups::find(&config.vm_cgroup))
            .await
            .unwrap_or_else(|error| {
                let message = format!("looking for cgroups failed: {error}");
                Err(HostError::Config { message })
            })?;
        let pools = Pools::default();
        let first = pools.clone();
        let looked = tokio::task::spawn_blocking(move || first.look(config.huge_pages)).await;
        if let Err(error) = looked {
            tracing::error!(%error, "the pages set aside could not be read");
        }
        // Bound before VMs are looked for, so that a wrong address costs nothing; served after.
        let listen = |source| HostError::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;

        traffic::begin();
        counts::begin();
        let stop = CancellationToken::new();
        // Until the agent is whole, a failure below ends what was begun.
        let guard = stop.clone().drop_guard();
        let supervisor = Arc::new(Supervisor {
            host: config.name,
            vms_dir: vms_dir.clone(),
            program: config.vm_program,
            data_ip: config.data_ip,
            programs: Arc::new(Programs {
                pager: config.pager_program,
                writer: config.writer_program,
            }),
            saves,
            confinement: v1::VmConfinement {
                cgroup: cgroups.base(),
                cgroup_message: cgroups.message().to_owned(),
                ..config.confinement
            },
            cgroups: Arc::new(cgroups),
            registry: Registry::new(config.memory_bytes),
            ended: Arc::new(ended),
            grants: Arc::new(grants),
            backends,
            admit: config.admit,
            fits: config.fits,
            credentials: config.credentials.clone(),
            stop,
            tasks: TaskTracker::new(),
        });
        supervisor.scan().await.map_err(failed(&vms_dir))?;
        let card = Arc::new(HostCard {
            address: config.advertise.unwrap_or_else(|| address.to_string()),
            incarnation,
            version: config.version,
            trust: config.trust,
            labels: config.labels,
            clock: config.clock,
            uid,
            trouble: std::sync::Mutex::default(),
            fenced: fenced::Fenced::default(),
            disk: Disk::default(),
            pools: pools.clone(),
            supervisor: Arc::clone(&supervisor),
        });
        supervisor
            .tasks
            .spawn(pools.keep(config.huge_pages, supervisor.stop.clone()));
        let looking = Arc::clone(&supervisor.backends).keep(supervisor.stop.clone());
        supervisor.tasks.spawn(looking);
        supervisor.tasks.spawn(cgroup::keep_clean(
            Arc::clone(&supervisor.cgroups),
            supervisor.stop.clone(),
        ));
        let usage = Usage::default();
        let link = Link::new(config.credentials.as_ref(), Expects::Anyone);
        let endpoint = Endpoint::new()
            .gate(link, config.access)
            // Which labels VMs have is known here, but the server's answers are the fleet's.
            .refuses_limited()
            .service(VmServiceServer::new(vm_api::Vms(Arc::clone(&supervisor))))
            .service(MemoryServiceServer::new(memory_api::Memory(Arc::clone(
                &supervisor,
            ))))
            .service(TransferServiceServer::new(transfer_api::Transfers(
                Arc::clone(&supervisor),
            )))
            .service(SnapshotServiceServer::new(snapshot_api::Snapshots(
                Arc::clone(&supervisor),
            )))
            .service(PagingServiceServer::new(paging_api::Pagings(Arc::clone(
                &supervisor,
            ))))
            .service(HostServiceServer::new(host_api::Hosts(Arc::clone(&card))))
            .http(http(Arc::clone(&card), config.render, usage.clone()))
            .serve_tcp(listener)
            .await
            .map_err(listen)?;
        supervisor.tasks.spawn(usage.keep(Arc::clone(&supervisor)));
        let probing = card.disk.clone().keep(state_dir, endpoint.health());
        let ended = supervisor.stop.clone().cancelled_owned();
        supervisor.tasks.spawn(async move {
            tokio::select! {
                biased;
                // What is said of health after this is the endpoint's.
                () = ended => {}
                () = probing => {}
            }
        });
        if let Some((server, channel)) = channel {
            supervisor
                .tasks
                .spawn(report::report(card, server, channel));
        }
        tracing::info!(host = %supervisor.host, %address, "agent ready");
        Ok(Self {
            address,
            endpoint,
            supervisor,
            lock,
            _guard: guard,
        })
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends every task and the endpoint, and gives the state directory back. VM processes go on.
    pub async fn stop(self) {
        self.supervisor.stop.cancel();
        self.endpoint.stop().await;
        self.supervisor.tasks.close();
        if tokio::time::timeout(FINISH, self.supervisor.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("work on VM directories outlived the agent's stop");
        }
        drop(self.lock);
    }
}

/// `/metrics`; health is the endpoint's.
fn http(card: Arc<HostCard>, process: Option<Render>, usage: Usage) -> axum::Router {
    let metrics = move || {
        let text = {
            let supervisor = &card.supervisor;
            let (memory_total, memory_used) = supervisor.registry.memory();
            let own = metrics::render(&metrics::Seen {
                version: &card.version,
                memory_total,
                memory_used,
                vms: &labelled(supervisor.snapshots()),
                transfers: &supervisor.sides(),
                used: &usage.get(),
                disk_up: card.disk.trouble().is_none(),
                fenced: card.fenced.is_set(),
                huge_pages: card.pools.get().as_ref(),
            });
            let mut text = process.as_ref().map_or_else(String::new, |render| render());
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text + &own
        };
        async move {
            (
                [("content-type", "text/plain; version=0.0.4; charset=utf-8")],
                text,
            )
        }
    };
    axum::Router::new().route("/metrics", axum::routing::get(metrics))
}

/// One VM of each name, for series that have the name as their label: the one that is not just what
/// another host left behind here.
fn labelled(mut vms: Vec<v1::Vm>) -> Vec<v1::Vm> {
    let gave_away = |vm: &v1::Vm| vm.state() == v1::vm::State::Relinquished;
    vms.sort_by(|a, b| (&a.name, gave_away(a), &a.uid).cmp(&(&b.name, gave_away(b), &b.uid)));
    vms.dedup_by(|later, first| later.name == first.name);
    vms
}

fn make_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// The state directory's lock, given back explicitly: a copy of the descriptor in a child that is
/// being forked at this moment would keep it otherwise.
#[derive(Debug)]
struct StateLock(File);

impl StateLock {
    fn take(state_dir: &Path) -> Result<Self, HostError> {
        let path = state_dir.join("agent.lock");
        let failed = |source| HostError::StateDir {
            path: path.clone(),
            source,
        };
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = io::read_to_string(&file)
                    .ok()
                    .and_then(|text| text.trim().parse().ok());
                return Err(HostError::StateDirInUse {
                    path: state_dir.to_owned(),
                    pid,
                });
            }
            Err(error) => return Err(failed(error.into())),
        }
        file.set_len(0)
            .and_then(|()| write!(file, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Self(file))
    }
}

impl Drop for StateLock {
    fn drop(&mut self) {
        // The descriptor is ours and open; what follows is only its close.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
