//! Runs the program that fences a host: bounded in time, in what it may say and in what it is told.
//!
//! It is no shell's: its arguments are the program and the host's name. Its environment is what is
//! listed here and nothing of the server's. It leads a process group of its own, which is killed as
//! a whole when it takes too long or the server stops. Success is exit code 0 and nothing else.

use std::{
    io,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use slat_proto::{ApiError, Reason};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::fleet::Fenceable;

/// Bytes kept of what it prints, from the beginning.
const PROOF: usize = 4096;
/// Bytes kept of what it says is wrong, from the end.
const SAID: usize = 1024;
/// How long its output is read on after it has ended: others may hold it open.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a killed process is waited for.
const REAP: Duration = Duration::from_secs(2);
/// Where programs are looked for when the server's environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The program that fences hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceHook {
    /// An absolute path.
    pub program: PathBuf,
    /// How long it may take.
    pub timeout: Duration,
}

/// What it did.
#[derive(Debug)]
pub(super) struct Done {
    /// What it printed.
    pub(super) proof: String,
    pub(super) took: Duration,
}

/// Why a host is not fenced.
#[derive(Debug, thiserror::Error)]
pub(super) enum HookError {
    #[error("the hook cannot be run: {0}")]
    Run(#[source] io::Error),
    #[error("the hook failed: {exit}")]
    Failed {
        exit: ExitStatus,
        said: String,
        took: Duration,
    },
    #[error("the hook did not end within {} s and was killed", took.as_secs())]
    Late { said: String, took: Duration },
    #[error("the server stops; the hook was killed")]
    Stopped,
}

impl HookError {
    /// FENCE_FAILED.
    pub(super) fn to_api(&self, hook: &FenceHook, host: &str) -> ApiError {
        let error = ApiError::new(Reason::FenceFailed, format!("{host} is not fenced: {self}"))
            .with("host", host)
            .with("hook", hook.program.display());
        let (exit, said, took) = match self {
            Self::Run(source) => (source.to_string(), "", Duration::ZERO),
            Self::Failed { exit, said, took } => (exit.to_string(), said.as_str(), *took),
            Self::Late { said, took } => ("killed".to_owned(), said.as_str(), *took),
            Self::Stopped => ("killed".to_owned(), "", Duration::ZERO),
        };
        error
            .with("exit", exit)
            .with("said", said)
            .with("seconds", format_args!("{:.1}", took.as_secs_f64()))
            .with(
                "advice",
                "nothing was decided: mend the hook, or see that the host is off, and fence it again",
            )
    }
}

/// Keeps the first bytes of a stream, or the last; all of it is read.
struct Kept {
    bytes: Mutex<Vec<u8>>,
    limit: usize,
    last: bool,
}

impl Kept {
    const fn new(limit: usize, last: bool) -> Self {
        Self {
            bytes: Mutex::new(Vec::new()),
            limit,
            last,
        }
    }

    fn take(&self, chunk: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if self.last {
            bytes.extend_from_slice(chunk);
            let over = bytes.len().saturating_sub(self.limit);
            bytes.drain(..over);
        } else {
            let room = self.limit - bytes.len();
            bytes.extend_from_slice(&chunk[..chunk.len().min(room)]);
        }
    }

    async fn read(&self, stream: Option<impl AsyncRead + Unpin>) {
        let Some(mut stream) = stream else { return };
        let mut chunk = vec![0; 8192];
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            self.take(&chunk[..count]);
        }
    }

    /// As text of no more bytes than were to be kept, whatever they were.
    fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        let mut end = text.len().min(self.limit);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.trim_end().to_owned()
    }
}

enum End {
    Exited(io::Result<ExitStatus>),
    Late,
    Stopped,
}

/// Runs it for a host; `id` is the fence's, should it succeed.
///
/// # Errors
/// See [`HookError`]: the host is not fenced, or nobody knows.
pub(super) async fn run(
    hook: &FenceHook,
    host: &Fenceable,
    id: &str,
    stop: &CancellationToken,
) -> Result<Done, HookError> {
    let begun = Instant::now();
    let mut child = spawn(hook, host, id).map_err(HookError::Run)?;
    let (out, err) = (Kept::new(PROOF, false), Kept::new(SAID, true));
    let streams = (child.stdout.take(), child.stderr.take());
    let reading = async {
        tokio::join!(out.read(streams.0), err.read(streams.1));
    };
    tokio::pin!(reading);
    let mut read = false;
    let end = loop {
        tokio::select! {
            () = &mut reading, if !read => read = true,
            status = child.wait() => break End::Exited(status),
            () = sleep_until(begun + hook.timeout) => break End::Late,
            () = stop.cancelled() => break End::Stopped,
        }
    };
    let took = begun.elapsed();
    match end {
        End::Exited(status) => {
            if !read {
                drop(timeout(DRAIN, &mut reading).await);
            }
            let exit = status.map_err(HookError::Run)?;
            if exit.success() {
                let proof = out.text();
                return Ok(Done { proof, took });
            }
            let said = err.text();
            Err(HookError::Failed { exit, said, took })
        }
        End::Late => {
            kill(&mut child).await;
            drop(timeout(DRAIN, &mut reading).await);
            let said = err.text();
            Err(HookError::Late { said, took })
        }
        End::Stopped => {
            kill(&mut child).await;
            Err(HookError::Stopped)
        }
    }
}

fn spawn(hook: &FenceHook, host: &Fenceable, id: &str) -> io::Result<Child> {
    let name = host.host.trim_start_matches("hosts/");
    // An agent said them. One that no environment can have must not save its host from a fence.
    let told = [
        ("SLAT_FENCE_ADDRESS", host.address.as_str()),
        ("SLAT_FENCE_INCARNATION", host.incarnation.as_str()),
        ("SLAT_FENCE_UID", host.uid.as_str()),
    ];
    let told = told.into_iter();
    Command::new(&hook.program)
        .arg(name)
        .env_clear()
        .env(
            "PATH",
            std::env::var_os("PATH").unwrap_or_else(|| PATH.into()),
        )
        .env("SLAT_FENCE_HOST", name)
        .envs(told.filter(|(_, value)| !value.chars().any(char::is_control)))
        .env("SLAT_FENCE_ID", id)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Ends the whole group. Its leader is not reaped yet, so the number is still the group's.
async fn kill(child: &mut Child) {
    let leader = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    if let Some(leader) = leader
        && let Err(error) = kill_process_group(leader, Signal::KILL)
    {
        tracing::warn!(%error, "a fence's hook cannot be killed");
    }
    drop(timeout(REAP, child.wait()).await);
}

#[cfg(test)]
mod tests;
