//! `slat save-writer`: writes one save's file. Agents start it, with one end of a socket pair as
//! descriptor 3, by which it is told everything. It ends when the file is written, and when the
//! socket closes: then nobody wants the file any more. Its log is the agent's.

use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};

use slat_paging::wire::WRITER_FD;

use crate::{
    daemon::telemetry::{self, LogArgs},
    failure::{self, Failure},
    roles,
};

/// Options of `slat save-writer`, given by the agent.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SaveWriterArgs {
    #[command(flatten)]
    log: LogArgs,
}

/// The socket that this process was started with. Call it before anything else opens a file.
pub(crate) fn socket() -> Result<OwnedFd, Failure> {
    // SAFETY: the number is borrowed for one call, which fails when it names nothing.
    let known = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(WRITER_FD) });
    known.map_err(|_| Failure::Usage("agents start this, with a socket as descriptor 3".into()))?;
    // SAFETY: it is open, the agent put it there, and nobody in this process has opened anything
    // yet.
    Ok(unsafe { OwnedFd::from_raw_fd(WRITER_FD) })
}

/// Runs until the file is written or given up. `lacks`: what could not be given up.
pub(crate) async fn run(
    args: SaveWriterArgs,
    socket: OwnedFd,
    lacks: Vec<String>,
) -> Result<(), Failure> {
    let telemetry = telemetry::install("save-writer", &args.log, "info")?;
    tracing::debug!(?lacks, "a writer begins");
    // It has threads of its own; this one waits for them.
    let ran = tokio::task::spawn_blocking(move || roles::run_save_writer(socket)).await;
    let ran = ran.unwrap_or_else(|error| Err(error.into()));
    let failed = ran.map_err(|error| {
        Failure::local(format!(
            "the writer of a save failed: {}",
            failure::chain(&*error)
        ))
    });
    telemetry.shutdown().await;
    failed
}
