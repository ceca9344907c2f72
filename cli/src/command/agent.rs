//! `slat agent`: the daemon of one hypervisor host.

use std::{ffi::OsString, net::IpAddr, net::SocketAddr, path::PathBuf};

use slat_proto::{model::HostName, transport::Address};

use crate::{
    daemon::{self, DaemonArgs, listen, notify, recorder::Recorder, state, stop, telemetry},
    failure::Failure,
    roles::{self, AgentRole},
    term::units::Size,
};

const EXAMPLES: &str = "\
Examples:
  slat agent --server 127.0.0.1:7400
  slat agent --name host-a --listen 127.0.0.1:7401 --memory 16GiB
  slat agent --listen 192.0.2.10:7401 --server 192.0.2.1:7400 --insecure-listen

Without --server the agent serves its own VMs and reports to nobody: slat get vms --server 127.0.0.1:7401.
VMs run in processes of their own and outlive the agent; it finds them again when it starts.
One line on standard output says `listening on IP:PORT` when the agent is ready.";

/// Memory that VMs leave to the host, at least, unless `--memory` says otherwise.
const HOST_SHARE: u64 = 1 << 30;
/// Of a large host, one part in so many.
const HOST_PART: u64 = 16;

/// Options of `slat agent`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AgentArgs {
    /// This host's name in the fleet, as host-a [default: the host name, made DNS-like]
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
    /// Memory VMs may use, as 16GiB [default: the host's, less a sixteenth and at least 1GiB]
    #[arg(long, env = "SLAT_MEMORY", value_name = "SIZE")]
    memory: Option<Size>,
    /// Where to keep VMs' sockets and journals, as /srv/slat [default: /var/lib/slat/agent, or the
    /// XDG state directory]
    #[arg(long, env = "SLAT_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    insecure: listen::InsecureArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Runs until told to stop. The VMs stay.
pub(crate) async fn run(args: AgentArgs) -> Result<(), Failure> {
    let mut stop = stop::Stop::listen()?;
    let telemetry = telemetry::install("agent", &args.daemon.log, "info")?;
    stop::die_with(args.daemon.die_with)?;
    listen::check("--listen", args.listen.ip(), args.insecure)?;
    let data_ip = listen::data_ip(args.listen, args.data_ip)?;
    listen::check("--data-ip", data_ip, args.insecure)?;
    if args.listen.ip().is_unspecified() && args.advertise.is_none() {
        return Err(Failure::advised(
            format!(
                "--listen {} does not say at which address the server reaches this host",
                args.listen
            ),
            "add --advertise ADDRESS:PORT",
        ));
    }
    let name = args.name.map_or_else(own_name, Ok)?;
    let memory_bytes = match args.memory {
        Some(Size(0)) => return Err(Failure::Usage("--memory 0 leaves no VM any memory".into())),
        Some(Size(bytes)) => bytes,
        None => host_memory()?,
    };
    let state_dir = state::directory(args.state_dir, "agent")?;
    state::prepare(&state_dir)?;
    let recorder = Recorder::install()?;
    let agent = AgentRole {
        name,
        listen: args.listen,
        advertise: args.advertise,
        server: args.server,
        state_dir,
        memory_bytes,
        data_ip,
        vm_program: vm_program(args.daemon.die_with)?,
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

/// What the agent runs for one VM: this binary's `vm` role.
fn vm_program(die_with: Option<u32>) -> Result<Vec<OsString>, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::local(format!("cannot find this program's file: {error}")))?;
    let mut command = vec![program.into_os_string(), "vm".into()];
    if let Some(pid) = die_with {
        command.extend(["--die-with".into(), pid.to_string().into()]);
    }
    Ok(command)
}

fn own_name() -> Result<HostName, Failure> {
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

/// What VMs may use when nobody says. Counted from all the memory of the host, not from what is
/// free: when an agent starts again, its VMs run already and their memory is reserved by name, so
/// it would count twice.
fn host_memory() -> Result<u64, Failure> {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| default_memory(&text))
        .ok_or_else(|| {
            Failure::advised(
                "cannot read from /proc/meminfo how much memory this host has",
                "say how much VMs may use with --memory",
            )
        })
}

fn default_memory(meminfo: &str) -> Option<u64> {
    meminfo_bytes(meminfo, "MemTotal:").map(share)
}

/// `MemAvailable` in bytes.
pub(crate) fn available(meminfo: &str) -> Option<u64> {
    meminfo_bytes(meminfo, "MemAvailable:")
}

fn meminfo_bytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What VMs may use of all: a sixteenth less and at least 1 GiB less, but never less
/// than every second byte, which matters on a small host.
fn share(total: u64) -> u64 {
    let reserve = HOST_SHARE.max(total / HOST_PART);
    total.saturating_sub(reserve).max(total / 2)
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

    #[test]
    fn running_vms_do_not_shrink_the_default_memory() {
        let text = |available: u64| {
            format!("MemTotal:        8388608 kB\nMemAvailable:    {available} kB\nBuffers: 1 kB\n")
        };
        assert_eq!(default_memory(&text(8_000_000)), Some(7 << 30));
        assert_eq!(
            default_memory(&text(1)),
            Some(7 << 30),
            "an agent that starts again over its VMs"
        );
        assert_eq!(default_memory("MemAvailable: 1 kB"), None);
        assert_eq!(share(64 << 30), 60 << 30);
        assert_eq!(share(1 << 30), 1 << 29);
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    8388608 kB\nBuffers: 1 kB\n";
        assert_eq!(available(text), Some(8 << 30));
        assert_eq!(available("MemTotal: 1 kB"), None);
    }
}
