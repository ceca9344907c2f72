//! `slat vm`: the process of one VM. Agents start it. It prints `ready` on standard output when it
//! serves.

use std::{net::IpAddr, path::PathBuf};

use slat_proto::model::{HostName, PortRange, VmName};
use slat_record::{dir::VmDir, uid::VmUid};
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::{
    daemon::{DaemonArgs, stop, telemetry, vm_log::VmLog},
    failure::{self, Failure},
    roles::{self, Confined, FaultEvents, VmRole, VmSeccomp},
    term::units::Size,
};

/// Options of `slat vm`, given by the agent.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct VmArgs {
    /// The VM's directory: lock, socket, journal
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The VM's name
    #[arg(long, value_name = "NAME")]
    vm: VmName,
    /// The VM's identity; without it a created VM gets a new one
    #[arg(long, value_name = "UID")]
    uid: Option<VmUid>,
    /// The host it is on
    #[arg(long, value_name = "NAME")]
    host: HostName,
    /// Address at which it receives pages
    #[arg(long, value_name = "IP")]
    data_ip: IpAddr,
    /// Ports on which it receives pages; 0: any
    #[arg(long, default_value = "0", value_name = "FIRST-LAST")]
    data_ports: PortRange,
    /// Send and receive pages in the clear
    #[arg(long)]
    insecure_pages: bool,
    /// How long its log may become before it is rotated
    #[arg(long, default_value = "8MiB", value_name = "SIZE")]
    log_size: Size,
    /// What becomes of system calls that it has no leave to make
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    seccomp: VmSeccomp,
    /// Leave core dumps, which have the guest's memory in them
    #[arg(long)]
    core_dumps: bool,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Confines the process, before there is a runtime: its threads inherit all of it.
pub(crate) fn confine(args: &VmArgs) -> Result<Confined, Failure> {
    let (dir, traces) = (args.dir.clone(), telemetry::exports_traces());
    roles::confine(dir, args.seccomp, args.core_dumps, traces).map_err(|error| {
        Failure::local(format!(
            "the process of {} cannot be confined: {}",
            args.vm,
            failure::chain(&*error)
        ))
    })
}

/// Runs until the VM is deleted, handed over, or the process told to stop.
pub(crate) async fn run(
    args: VmArgs,
    confined: Confined,
    faults: FaultEvents,
) -> Result<(), Failure> {
    let log = VmLog::on_stderr(VmDir::new(&args.dir).log(), args.log_size.0);
    let log = log.map_or_else(|| BoxMakeWriter::new(std::io::stderr), BoxMakeWriter::new);
    let telemetry = telemetry::install_to(log, "vm", &args.daemon.log, "info")?;
    stop::die_with(args.daemon.die_with)?;
    let vm = args.vm.clone();
    let landlock = confined.landlock;
    let (seccomp, descriptors) = (confined.seccomp, confined.descriptors);
    tracing::info!(%vm, %seccomp, ?landlock, descriptors, lacks = ?confined.lacks, "confined");
    let result = VmRole {
        dir: args.dir,
        vm: args.vm,
        uid: args.uid,
        host: args.host,
        data_ip: args.data_ip,
        data_ports: args.data_ports,
        insecure_pages: args.insecure_pages,
        faults,
    }
    .run()
    .await;
    telemetry.shutdown().await;
    result.map_err(|error| {
        Failure::local(format!(
            "the process of {vm} failed: {}",
            failure::chain(&*error)
        ))
    })
}
