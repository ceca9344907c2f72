//! One daemon of a fleet on this machine: this binary in another role, on a loopback port, its log
//! in a file.
//!
//! It gets a process group of its own, so that Ctrl-C reaches the command alone, which then ends
//! its daemons in order. It is told to end when the command's process ends (`--die-with`), and is
//! killed when the handle is dropped without a stop.

use std::{
    ffi::OsString,
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
};

use crate::failure::Failure;

/// A daemon must be ready within this time.
const READY: Duration = Duration::from_secs(30);
/// And gone this long after it was asked to go.
const GONE: Duration = Duration::from_secs(25);

/// A running daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: String,
    child: Child,
    address: SocketAddr,
    log: PathBuf,
    /// Kept open: a daemon that prints must not die of it.
    _stdout: BufReader<ChildStdout>,
}

impl Daemon {
    /// Starts `slat ARGUMENTS` and waits for its ready line.
    pub(crate) async fn start(
        name: &str,
        arguments: Vec<OsString>,
        log: PathBuf,
    ) -> Result<Self, Failure> {
        let failed = |what: &str, error: std::io::Error| {
            Failure::local(format!("cannot start {name}: {what}: {error}"))
        };
        let program = std::env::current_exe().map_err(|error| failed("this program", error))?;
        let stderr = File::create(&log).map_err(|error| failed("its log", error))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(["--die-with", &std::process::id().to_string()])
            .args(["--log-format", "text"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true)
            .env_remove("NOTIFY_SOCKET");
        // What the operator set for daemons of their own does not hold here.
        for (variable, _) in std::env::vars_os() {
            let text = variable.to_string_lossy();
            if text.starts_with("SLAT_") && text != "SLAT_LOG_FILTER" {
                command.env_remove(&variable);
            }
        }
        let mut child = command.spawn().map_err(|error| failed("spawn", error))?;
        let stdout = child.stdout.take().ok_or_else(|| {
            Failure::local(format!("cannot start {name}: it has no standard output"))
        })?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        let read = tokio::time::timeout(READY, stdout.read_line(&mut line)).await;
        match (read, address(&line)) {
            (Ok(Ok(_)), Some(address)) => Ok(Self {
                name: name.to_owned(),
                child,
                address,
                log,
                _stdout: stdout,
            }),
            (Err(_), _) => Err(Failure::local(format!(
                "{name} was not ready after {} s{}",
                READY.as_secs(),
                tail(&log)
            ))),
            _ => Err(Failure::local(format!(
                "{name} did not start{}",
                tail(&log)
            ))),
        }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it says.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Waits for its end, which nobody asked for; says how it ended.
    pub(crate) async fn ended(&mut self) -> String {
        match self.child.wait().await {
            Ok(status) => format!("{} ended by itself: {status}", self.name),
            Err(error) => format!("{} could not be waited for: {error}", self.name),
        }
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        // Not reaped yet, so the number is still this child's.
        let pid = self
            .child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, Signal::TERM)
        {
            tracing::debug!(name = self.name, %error, "SIGTERM");
        }
    }

    /// Waits for its end after [`Daemon::terminate`]; kills it when that takes too long. `Some`
    /// says what was wrong.
    pub(crate) async fn join(mut self) -> Option<String> {
        match tokio::time::timeout(GONE, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => None,
            Ok(Ok(status)) => Some(format!("{} ended with {status}", self.name)),
            Ok(Err(error)) => Some(format!("{} could not be waited for: {error}", self.name)),
            Err(_) => {
                if let Err(error) = self.child.kill().await {
                    tracing::debug!(name = self.name, %error, "SIGKILL");
                }
                Some(format!(
                    "{} had to be killed {} s after SIGTERM",
                    self.name,
                    GONE.as_secs()
                ))
            }
        }
    }
}

/// The address in `listening on IP:PORT`.
fn address(line: &str) -> Option<SocketAddr> {
    line.strip_prefix("listening on ")?.trim().parse().ok()
}

/// The last lines of a log, to be put behind a sentence.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(5)..];
    last.iter().map(|line| format!("\n  | {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_has_the_address() {
        assert_eq!(
            address("listening on 127.0.0.1:7400\n"),
            Some("127.0.0.1:7400".parse().unwrap())
        );
        for line in ["", "listening on\n", "listening on port 80\n", "ready\n"] {
            assert_eq!(address(line), None, "{line}");
        }
    }

    #[test]
    fn a_tail_is_short() {
        let dir = slat_test_dir::TestDir::new();
        let log = dir.path().join("log");
        assert_eq!(tail(&log), "");
        std::fs::write(&log, "1\n2\n3\n4\n5\n6\n").unwrap();
        assert_eq!(tail(&log), "\n  | 2\n  | 3\n  | 4\n  | 5\n  | 6");
    }
}
