//! What the three roles (`slat server`, `slat agent`, `slat vm`) share around their libraries: logs
//! and traces, the metrics recorder, where they may listen and keep state, how much memory there
//! is, the ready line, systemd, and how they are told to stop.

mod access;
mod audit_log;
pub(crate) mod listen;
pub(crate) mod memory;
pub(crate) mod notify;
mod process;
pub(crate) mod recorder;
pub(crate) mod secrecy;
pub(crate) mod state;
pub(crate) mod stop;
pub(crate) mod telemetry;
pub(crate) mod trust;
pub(crate) mod vm_log;

use std::net::SocketAddr;

use crate::{failure::Failure, term::out};

/// Options of every role.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DaemonArgs {
    #[command(flatten)]
    pub(crate) log: telemetry::LogArgs,
    /// End when the process of this id ends (for tools that start a fleet and must leave nothing
    /// behind)
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) die_with: Option<u32>,
}

/// Says, once, that the role serves: to systemd, and in one line on standard output.
pub(crate) fn announce(address: SocketAddr) -> Result<(), Failure> {
    notify::notify("READY=1");
    match out::line(format!("listening on {address}")) {
        // Nobody reads the line; that is no reason to stop.
        Err(Failure::BrokenPipe) => Ok(()),
        other => other,
    }
}

/// A daemon that does not stop by itself is left after this long.
const STOP_BOUND: std::time::Duration = std::time::Duration::from_secs(30);

/// Waits for an orderly stop; a second signal or the bound ends the wait with an error.
pub(crate) async fn bounded(
    stop: &mut stop::Stop,
    stopping: impl Future<Output = ()>,
) -> Result<(), Failure> {
    tokio::select! {
        () = stopping => Ok(()),
        cause = stop.wait() => Err(Failure::Said(cause.exit_code())),
        () = tokio::time::sleep(STOP_BOUND) => {
            Err(Failure::local(format!("still not stopped after {} s: left as it was", STOP_BOUND.as_secs())))
        }
    }
}
