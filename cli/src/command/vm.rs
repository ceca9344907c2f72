//! `slat vm`: the process of one VM. Agents start it. It prints `ready` on standard output when it
//! serves.

use std::{net::IpAddr, path::PathBuf};

use slat_proto::model::{HostName, VmName};
use slat_record::uid::VmUid;

use crate::{
    daemon::{DaemonArgs, stop, telemetry},
    failure::{self, Failure},
    roles::VmRole,
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
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Runs until the VM is deleted, handed over, or the process told to stop.
pub(crate) async fn run(args: VmArgs) -> Result<(), Failure> {
    let telemetry = telemetry::install("vm", &args.daemon.log, "info")?;
    stop::die_with(args.daemon.die_with)?;
    let vm = args.vm.clone();
    let result = VmRole {
        dir: args.dir,
        vm: args.vm,
        uid: args.uid,
        host: args.host,
        data_ip: args.data_ip,
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
