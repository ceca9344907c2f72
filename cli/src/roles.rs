//! The libraries behind the roles: the one place where `slat` meets the server, the agent and
//! the CA.

use std::{
    error::Error,
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub(crate) use slat_daemon::VmCgroup;
use slat_proto::{
    model::{HostName, Labels, PortRange, VmName},
    transport::{Access, Address},
    v1,
};
use slat_record::uid::VmUid;
use slat_trust::Credentials;
pub(crate) use slat_trust::{
    Kind,
    pki::{Ca, Issued, PkiError, RootInfo, Validity, usual_lifetime},
};
pub(crate) use slat_vmm::{FaultEvents, confine::Confined, count_faults};
use slat_vmm::{
    confine::{Confinement, Seccomp},
    handover::preamble::admit_on_host,
};

use crate::failure::{self, Failure};

/// Version of this build, as agents and servers report it.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Renders a process's metrics as Prometheus text.
pub(crate) type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// What a role's library may fail with.
pub(crate) type RoleError = Box<dyn Error + Send + Sync>;

/// The control plane, configured.
pub(crate) struct ServerRole {
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// What survives restarts.
    pub(crate) state_dir: PathBuf,
    /// How often agents report.
    pub(crate) report_interval: Duration,
    /// How long a host may be quiet; `None` for three reports.
    pub(crate) host_silence: Option<Duration>,
    /// The program that fences hosts, and how long it may take.
    pub(crate) fence: Option<(PathBuf, Duration)>,
    /// Ended migrations to keep: how many, and for how long.
    pub(crate) keep_migrations: (usize, Duration),
    /// Who it is, and whom it takes; `None`: anybody.
    pub(crate) credentials: Option<Credentials>,
    /// What callers may do.
    pub(crate) access: Access,
    /// For `/metrics`.
    pub(crate) render: Render,
}

/// The control plane, serving.
pub(crate) struct RunningServer(slat_server::Server);

impl ServerRole {
    /// Opens the store and begins to serve.
    pub(crate) async fn start(self) -> Result<RunningServer, RoleError> {
        let config = slat_server::ServerConfig {
            listen: self.listen,
            state_dir: self.state_dir,
            report_interval: self.report_interval,
            host_silence: self.host_silence,
            retention: slat_server::Retention {
                keep: self.keep_migrations.0,
                keep_for: self.keep_migrations.1,
            },
            credentials: self.credentials,
            access: self.access,
            fence: self
                .fence
                .map(|(program, timeout)| slat_server::FenceHook { program, timeout }),
            render: Some(self.render),
            version: VERSION.to_owned(),
        };
        Ok(RunningServer(slat_server::Server::start(config).await?))
    }
}

impl RunningServer {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Closes it.
    pub(crate) async fn stop(self) {
        self.0.stop().await;
    }
}

/// One host's agent, configured.
pub(crate) struct AgentRole {
    /// The host.
    pub(crate) name: HostName,
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// Where others reach it.
    pub(crate) advertise: Option<String>,
    /// Where to report.
    pub(crate) server: Option<Address>,
    /// VMs' directories.
    pub(crate) state_dir: PathBuf,
    /// Saves, where not in the state directory.
    pub(crate) save_dir: Option<PathBuf>,
    /// Program and first arguments of a VM's pager.
    pub(crate) pager_program: Vec<OsString>,
    /// Program and arguments of a save's writer.
    pub(crate) writer_program: Vec<OsString>,
    /// What VMs may use.
    pub(crate) memory_bytes: u64,
    /// Where pages arrive.
    pub(crate) data_ip: IpAddr,
    /// Pages travel in the clear, to and from hosts that have it so too.
    pub(crate) insecure_pages: bool,
    /// Program and first arguments of a VM's process.
    pub(crate) vm_program: Vec<OsString>,
    /// How it confines that process: what becomes of unlisted system calls, core dumps.
    pub(crate) vm_confinement: (VmSeccomp, bool),
    /// Where such processes get cgroups of their own.
    pub(crate) vm_cgroup: VmCgroup,
    /// Who it is, and whom it takes; `None`: anybody.
    pub(crate) credentials: Option<Credentials>,
    /// What callers may do.
    pub(crate) access: Access,
    /// How it is protected, asked again and again.
    pub(crate) host_trust: Arc<dyn Fn() -> v1::HostTrust + Send + Sync>,
    /// What the host is called by.
    pub(crate) labels: Labels,
    /// For `/metrics`.
    pub(crate) render: Render,
}

/// One host's agent, serving.
pub(crate) struct RunningAgent(slat_daemon::Agent);

impl AgentRole {
    /// Finds the host's VMs again and begins to serve.
    pub(crate) async fn start(self) -> Result<RunningAgent, RoleError> {
        let insecure_pages = self.insecure_pages;
        let config = slat_daemon::HostConfig {
            name: self.name,
            listen: self.listen,
            advertise: self.advertise,
            server: self.server,
            state_dir: self.state_dir,
            memory_bytes: self.memory_bytes,
            data_ip: self.data_ip,
            vm_program: self.vm_program,
            pager_program: self.pager_program,
            writer_program: self.writer_program,
            save_dir: self.save_dir,
            confinement: v1::VmConfinement {
                seccomp: self.vm_confinement.0.message().into(),
                landlock: slat_vmm::confine::landlock_supported(),
                core_dumps: self.vm_confinement.1,
                ..Default::default()
            },
            vm_cgroup: self.vm_cgroup,
            credentials: self.credentials,
            access: self.access,
            backends: slat_vmm::available_backends,
            dirty_rings: slat_vmm::kvm_offers_dirty_rings,
            paging: slat_vmm::host_paging,
            huge_pages: slat_vmm::huge_page_pools,
            admit: Arc::new(move |request| admit_on_host(request, insecure_pages)),
            fits: slat_vmm::fits_here,
            clock: std::time::SystemTime::now,
            trust: self.host_trust,
            labels: self.labels,
            version: VERSION.to_owned(),
            render: Some(self.render),
        };
        Ok(RunningAgent(slat_daemon::Agent::start(config).await?))
    }
}

impl RunningAgent {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Closes it. VMs stay.
    pub(crate) async fn stop(self) {
        self.0.stop().await;
    }
}

/// What becomes of a system call that a VM process has no leave to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum VmSeccomp {
    /// The process ends
    Kill,
    /// It is refused, and the VM's log says so
    #[default]
    Refuse,
    /// It is made, and the kernel's audit log says so
    Log,
    /// There is no filter
    Off,
}

impl VmSeccomp {
    /// As on a command line.
    pub(crate) fn word(self) -> &'static str {
        self.mode().word()
    }

    fn message(self) -> v1::vm_confinement::Seccomp {
        match self {
            Self::Kill => v1::vm_confinement::Seccomp::Kill,
            Self::Refuse => v1::vm_confinement::Seccomp::Refuse,
            Self::Log => v1::vm_confinement::Seccomp::Log,
            Self::Off => v1::vm_confinement::Seccomp::Off,
        }
    }

    fn mode(self) -> Seccomp {
        match self {
            Self::Kill => Seccomp::Kill,
            Self::Refuse => Seccomp::Refuse,
            Self::Log => Seccomp::Log,
            Self::Off => Seccomp::Off,
        }
    }
}

/// Confines this process to what the VM in `dir` takes. There is no second thread yet.
pub(crate) fn confine(
    dir: PathBuf,
    seccomp: VmSeccomp,
    core_dumps: bool,
    looks_up_hosts: bool,
) -> Result<Confined, RoleError> {
    Ok(slat_vmm::confine::apply(&Confinement {
        dir,
        seccomp: seccomp.mode(),
        core_dumps,
        looks_up_hosts,
    })?)
}

/// Gives up what no process beside a VM's needs; says what was not got. There is no second thread
/// yet.
pub(crate) fn give_up() -> Vec<String> {
    slat_vmm::confine::give_up()
}

/// The pager of the VM in `dir`: runs until the VM needs it no more.
pub(crate) fn run_pager(dir: &Path) -> Result<(), RoleError> {
    let socket = slat_pager::connect(dir)?;
    Ok(slat_pager::run(socket)?)
}

/// The writer of a save: runs until its file is written, or nobody wants it any more.
pub(crate) fn run_save_writer(socket: OwnedFd) -> Result<(), RoleError> {
    Ok(slat_pager::writer::run(socket.into())?)
}

/// One VM's process, configured.
pub(crate) struct VmRole {
    /// Its lock, socket and journal.
    pub(crate) dir: PathBuf,
    /// The VM.
    pub(crate) vm: VmName,
    /// Its identity.
    pub(crate) uid: Option<VmUid>,
    /// Where it is.
    pub(crate) host: HostName,
    /// Where pages arrive.
    pub(crate) data_ip: IpAddr,
    /// On which ports.
    pub(crate) data_ports: PortRange,
    /// Pages travel in the clear.
    pub(crate) insecure_pages: bool,
    /// What counts page faults that KVM's statistics lack.
    pub(crate) faults: FaultEvents,
}

impl VmRole {
    /// Runs until the VM is over or SIGTERM comes; prints `ready` on standard output when it
    /// serves.
    pub(crate) async fn run(self) -> Result<(), RoleError> {
        let config = slat_vmm::process::VmProcessConfig {
            dir: self.dir,
            vm: self.vm,
            uid: self.uid,
            host: self.host,
            data_ip: self.data_ip,
            data_ports: self.data_ports,
            insecure_pages: self.insecure_pages,
            faults: self.faults,
        };
        Ok(slat_vmm::process::run(config).await?)
    }
}

/// A daemon that cannot start, in one sentence.
pub(crate) fn start_failure(
    role: &str,
    listen: SocketAddr,
    error: &(dyn Error + Send + Sync + 'static),
) -> Failure {
    match failure::io_cause(error) {
        Some(std::io::ErrorKind::AddrInUse) => Failure::advised(
            format!("cannot start the {role}: {listen} is in use by another process"),
            "stop that one, or choose another address with --listen",
        ),
        Some(std::io::ErrorKind::AddrNotAvailable) => Failure::advised(
            format!("cannot start the {role}: {listen} is no address of this host"),
            "choose another address with --listen",
        ),
        _ => Failure::local(format!(
            "cannot start the {role}: {}",
            failure::chain(error)
        )),
    }
}
