//! How a process is told to stop: SIGTERM, SIGINT, or the end of the process it must not outlive.
//!
//! [`Stop`] takes the signals over from the moment it is made, so make it before anything that must
//! be cleaned up. [`die_with`] watches another process from a thread of its own that lives as long
//! as this process: when the other ends, however it ends, this one gets SIGTERM, and is killed when
//! it has not stopped in time.

use std::{io, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal as Number, getpid, kill_process, pidfd_open},
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// How long an orderly stop may take once the watched process has ended.
const LAST_WILL: Duration = Duration::from_secs(10);

/// Why to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopCause {
    /// SIGINT, usually Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

impl StopCause {
    /// What a shell shows for a process ended by this signal.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// Receives the signals that stop a process.
#[derive(Debug)]
pub(crate) struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    /// Takes SIGINT and SIGTERM over.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let take = |kind| {
            signal(kind).map_err(|error| Failure::local(format!("cannot handle signals: {error}")))
        };
        Ok(Self {
            interrupt: take(SignalKind::interrupt())?,
            terminate: take(SignalKind::terminate())?,
        })
    }

    /// Waits for the next of them. Cancel safe.
    pub(crate) async fn wait(&mut self) -> StopCause {
        tokio::select! {
            _ = self.interrupt.recv() => StopCause::Interrupt,
            _ = self.terminate.recv() => StopCause::Terminate,
        }
    }
}

/// Ends this process when process `pid` ends; at once when there is no such process.
pub(crate) fn die_with(pid: Option<u32>) -> Result<(), Failure> {
    let Some(pid) = pid else { return Ok(()) };
    let gone = || Failure::local(format!("process {pid}, given by --die-with, is not there"));
    let raw = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(gone)?;
    let watched = pidfd_open(raw, PidfdFlags::empty()).map_err(|_| gone())?;
    let watch = move || {
        let mut fds = [PollFd::new(&watched, PollFlags::IN)];
        while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
        tracing::info!(pid, "the process this one belongs to has ended");
        if let Err(error) = kill_process(getpid(), Number::TERM) {
            tracing::warn!(%error, "no orderly stop");
        }
        std::thread::sleep(LAST_WILL);
        std::process::exit(1);
    };
    std::thread::Builder::new()
        .name("die-with".to_owned())
        .spawn(watch)
        .map(drop)
        .map_err(|error: io::Error| Failure::local(format!("cannot start a thread: {error}")))
}
