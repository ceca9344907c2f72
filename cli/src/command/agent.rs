//! `slat agent`: the daemon of one hypervisor host.

use std::{ffi::OsString, net::IpAddr, net::SocketAddr, path::PathBuf, sync::Arc};

use slat_proto::{
    model::{HostName, Labels, PortRange},
    transport::Address,
};
use slat_trust::Kind;

use crate::{
    daemon::{
        self, DaemonArgs, listen, memory, notify,
        recorder::Recorder,
        secrecy, state, stop, telemetry,
        trust::{self, Trust, TrustArgs},
    },
    failure::Failure,
    roles::{self, AgentRole, VmCgroup, VmSeccomp},
    term::units::Size,
};

const EXAMPLES: &str = "\
Examples:
  slat agent --tls-dir /etc/slat/tls --listen 192.0.2.10:7401 --server 192.0.2.1:7400
  slat agent --tls-dir /etc/slat/tls --memory 16GiB --label rack=r1
  slat agent --name host-a --server 127.0.0.1:7400 --insecure-plaintext   anyone is in control

Without --server the agent serves its own VMs and reports to nobody: slat get vms --server 127.0.0.1:7401
--agent host-a.
VMs run in processes of their own and outlive the agent; it finds them again when it starts.
One line on standard output says `listening on IP:PORT` when the agent is ready.";

/// Least size at which a VM's log may be rotated: a line of it, and some more.
const LEAST_LOG: Size = Size(64 << 10);

/// Options of `slat agent`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AgentArgs {
    /// This host's name in the fleet, as host-a [default: the certificate's, or else the host name,
    /// made DNS-like]
    #[arg(long, env = "SLAT_HOST_NAME", value_name = "NAME")]
    name: Option<HostName>,
    /// Address to listen on, as 192.0.2.10:7401; port 0 takes a free one
    #[arg(
        long,
        env = "SLAT_LISTEN",
        default_value = "127.0.0.1:7401",
        value_name = "IP:PORT"
    )]
    listen: SocketAddr,
    /// Server to report to, as 192.0.2.1:7400; without it the agent works alone
    #[arg(long, env = "SLAT_SERVER", value_name = "ADDR")]
    server: Option<Address>,
    /// Address at which server and other agents reach this one, as a.example:7401 [default: the
    /// address it listens on]
    #[arg(long, env = "SLAT_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Address at which other hosts send pages of migrating VMs, as 192.0.2.10 [default: the IP it
    /// listens on]
    #[arg(long, env = "SLAT_DATA_IP", value_name = "IP")]
    data_ip: Option<IpAddr>,
    /// TCP ports on that address for pages, as 7410-7473, one for each VM that arrives at a time;
    /// 0: any
    #[arg(
        long,
        env = "SLAT_DATA_PORTS",
        default_value = "7410-7473",
        value_name = "FIRST-LAST"
    )]
    data_ports: PortRange,
    /// Send and receive the pages of migrating VMs in the clear, to and from agents that were
    /// started so too; without it they travel by TLS
    #[arg(long, env = "SLAT_INSECURE_PAGES")]
    insecure_pages: bool,
    /// Memory VMs may use, as 16GiB; never more than this machine has or its cgroup allows
    /// [default: that, less a sixteenth and at least 1GiB]
    #[arg(long, env = "SLAT_MEMORY", value_name = "SIZE")]
    memory: Option<Size>,
    /// Rotate the log of a VM's process at this size, as 8MiB; one older file is kept
    #[arg(
        long,
        env = "SLAT_VM_LOG_SIZE",
        default_value = "8MiB",
        value_name = "SIZE"
    )]
    vm_log_size: Size,
    #[command(flatten)]
    confinement: ConfinementArgs,
    /// Where to keep VMs' sockets and journals, as /srv/slat [default: /var/lib/slat/agent, or the
    /// XDG state directory]
    #[arg(long, env = "SLAT_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where saved VMs' files are, as /srv/saves; as large as the memory that is saved [default:
    /// saves in the state directory]
    #[arg(long, env = "SLAT_SAVE_DIR", value_name = "DIR")]
    save_dir: Option<PathBuf>,
    /// What this host is called by, as rack=r1,disk=nvme; who may see and use it can be told by
    /// them
    #[arg(
        long = "label",
        env = "SLAT_LABELS",
        value_name = "KEY=VALUE",
        default_value = ""
    )]
    labels: Labels,
    #[command(flatten)]
    trust: TrustArgs,
    /// VMs do not end with the process of --die-with
    #[arg(long, hide = true)]
    vms_stay: bool,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// How VM processes are confined.
#[derive(Clone, Debug, clap::Args)]
struct ConfinementArgs {
    /// What becomes of system calls that a VM's process has no leave to make
    #[arg(
        long,
        env = "SLAT_VM_SECCOMP",
        value_enum,
        default_value_t,
        value_name = "MODE"
    )]
    vm_seccomp: VmSeccomp,
    /// Let VMs' processes leave core dumps, which have their guests' memory in them
    #[arg(long, env = "SLAT_VM_CORE_DUMPS")]
    vm_core_dumps: bool,
    /// Cgroup in which each VM gets one of its own, as /sys/fs/cgroup/slat; `auto`: the agent's, if
    /// it was delegated to it; `none`
    #[arg(
        long,
        env = "SLAT_VM_CGROUP",
        default_value = "auto",
        value_name = "CGROUP"
    )]
    vm_cgroup: VmCgroup,
}

/// Runs until told to stop. The VMs stay.
pub(crate) async fn run(args: AgentArgs) -> Result<(), Failure> {
    let mut stop = stop::Stop::listen()?;
    let telemetry = telemetry::install("agent", &args.daemon.log, "info")?;
    stop::die_with(args.daemon.die_with)?;
    secrecy::begin()?;
    let trust = Trust::open(args.trust, Kind::Agent)?;
    let data_ip = listen::data_ip(args.listen, args.data_ip)?;
    if args.listen.ip().is_unspecified() && args.advertise.is_none() {
        return Err(Failure::value(
            format!(
                "--listen {} does not say at which address the server reaches this host",
                args.listen
            ),
            "add --advertise ADDRESS:PORT",
        ));
    }
    let name = own_name(args.name, &trust)?;
    let memory_bytes = memory::for_vms(args.memory)?;
    if args.vm_log_size < LEAST_LOG {
        return Err(Failure::Usage(format!(
            "--vm-log-size {} is less than {LEAST_LOG}",
            args.vm_log_size
        )));
    }
    let state_dir = state::directory(args.state_dir, "agent")?;
    state::prepare(&state_dir)?;
    let recorder = Recorder::install()?;
    trust.keep();
    let agent = AgentRole {
        name,
        host_trust: host_trust(&trust, !args.insecure_pages),
        credentials: trust.credentials,
        access: trust.access,
        labels: args.labels,
        listen: args.listen,
        advertise: args.advertise,
        server: args.server,
        state_dir,
        save_dir: args.save_dir,
        pager_program: own_program("pager", args.vm_log_size)?,
        writer_program: own_program("save-writer", args.vm_log_size)?,
        memory_bytes,
        data_ip,
        insecure_pages: args.insecure_pages,
        vm_program: vm_program(
            args.data_ports,
            args.insecure_pages,
            args.vm_log_size,
            &args.confinement,
            args.daemon.die_with.filter(|_| !args.vms_stay),
        )?,
        vm_confinement: (args.confinement.vm_seccomp, args.confinement.vm_core_dumps),
        vm_cgroup: args.confinement.vm_cgroup,
        render: recorder.render(),
    }
    .start()
    .await
    .map_err(|error| roles::start_failure("agent", args.listen, &*error))?;
    daemon::announce(agent.address())?;
    let cause = stop.wait().await;
    tracing::info!(?cause, "stopping; VMs stay");
    notify::notify("STOPPING=1");
    daemon::bounded(&mut stop, agent.stop()).await?;
    telemetry.shutdown().await;
    Ok(())
}

/// What the agent runs for one VM: this binary's `vm` role, with what concerns VM processes alone.
fn vm_program(
    data_ports: PortRange,
    insecure_pages: bool,
    log_size: Size,
    confinement: &ConfinementArgs,
    die_with: Option<u32>,
) -> Result<Vec<OsString>, Failure> {
    let mut command = vec![own_file()?, "vm".into()];
    command.extend(["--data-ports".into(), data_ports.to_string().into()]);
    if insecure_pages {
        command.push("--insecure-pages".into());
    }
    command.extend(["--log-size".into(), format!("{}B", log_size.0).into()]);
    command.extend(["--seccomp".into(), confinement.vm_seccomp.word().into()]);
    if confinement.vm_core_dumps {
        command.push("--core-dumps".into());
    }
    if let Some(pid) = die_with {
        command.extend(["--die-with".into(), pid.to_string().into()]);
    }
    Ok(command)
}

/// What the agent runs beside a VM: this binary's role of that name.
fn own_program(role: &str, log_size: Size) -> Result<Vec<OsString>, Failure> {
    let mut command = vec![own_file()?, role.into()];
    if role == "pager" {
        command.extend(["--log-size".into(), format!("{}B", log_size.0).into()]);
    }
    Ok(command)
}

fn own_file() -> Result<OsString, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::local(format!("cannot find this program's file: {error}")))?;
    Ok(program.into_os_string())
}

/// What the host says of its protection, whenever it is asked.
fn host_trust(
    trust: &Trust,
    pages_tls: bool,
) -> Arc<dyn Fn() -> slat_proto::v1::HostTrust + Send + Sync> {
    let credentials = trust.credentials.clone();
    Arc::new(move || trust::host_trust(credentials.as_ref(), pages_tls))
}

/// The name that was given, the certificate's, or the machine's.
fn own_name(given: Option<HostName>, trust: &Trust) -> Result<HostName, Failure> {
    let Some(credentials) = &trust.credentials else {
        return given.map_or_else(machines_name, Ok);
    };
    let identity = credentials.identity();
    let named = HostName::from_id(identity.name())?;
    match given {
        Some(given) if given != named => Err(Failure::value(
            format!(
                "--name {} is not the name in the certificate of {}: {identity}",
                given.id(),
                credentials.dir().display()
            ),
            format!(
                "leave --name out, or issue one for it: slat pki issue agent {}",
                given.id()
            ),
        )),
        _ => Ok(named),
    }
}

/// This machine's name, made one of a host.
pub(super) fn machines_name() -> Result<HostName, Failure> {
    let uname = rustix::system::uname();
    let node = uname.nodename().to_string_lossy();
    sanitised(&node).ok_or_else(|| {
        Failure::advised(
            format!("the host name \"{}\" makes no name", node.escape_default()),
            "say one with --name",
        )
    })
}

/// A host name as a DNS-like id: lower case, everything else a dash, cut to its length.
fn sanitised(node: &str) -> Option<HostName> {
    let dashed: String = node
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(63)
        .collect();
    HostName::from_id(dashed.trim_matches('-')).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_become_ids() {
        let name = |node: &str| sanitised(node).map(|name| name.id().to_owned());
        assert_eq!(name("node7").as_deref(), Some("node7"));
        assert_eq!(
            name("Rack_1.example.COM").as_deref(),
            Some("rack-1-example-com")
        );
        assert_eq!(name("-x-").as_deref(), Some("x"));
        assert_eq!(name(&"a".repeat(99)).map(|id| id.len()), Some(63));
        assert_eq!(name("..."), None);
    }
}
