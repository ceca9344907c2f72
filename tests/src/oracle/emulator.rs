//! Programs out of the unpacked packages, run for a bounded time.
//!
//! The packages are of a Debian release of their own, so their programs run by their own loader
//! with their own libraries and nothing of the machine's. A program that is not done in time is
//! killed, and that is an error.

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

/// SIGKILL.
const KILLED: i32 = 9;

/// The directory that packages are unpacked into.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// What is in `folder`.
    pub fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// A path below it, without a leading slash.
    pub fn path(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }

    fn libraries(&self) -> PathBuf {
        self.path("usr/lib/x86_64-linux-gnu")
    }

    /// A program of it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(self.libraries());
        command.arg(self.path(program));
        // Another build's modules make QEMU abort; Bochs looks for its own where the package would
        // have put them.
        command.env("QEMU_MODULE_DIR", self.libraries().join("qemu"));
        command.env("LTDL_LIBRARY_PATH", self.libraries().join("bochs/plugins"));
        command
    }
}

/// Runs `command` in `folder` for at most `bound`, with what it says in `folder/name.log`; gives
/// that and its exit code back.
///
/// # Errors
/// When it cannot be started, or was killed because its time was up.
pub fn bounded(
    command: &Command,
    folder: &Path,
    name: &str,
    bound: Duration,
) -> anyhow::Result<(Option<i32>, String)> {
    let path = folder.join(format!("{name}.log"));
    let log = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    // coreutils' timeout, and not a loop here: it ends the program in time also when this process
    // was killed.
    let mut guarded = Command::new("timeout");
    guarded.arg("--signal=KILL");
    guarded.arg(format!("{:.3}", bound.as_secs_f64()));
    guarded.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => guarded.env(key, value),
            None => guarded.env_remove(key),
        };
    }
    let begin = Instant::now();
    let status = guarded
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .with_context(|| format!("starting {name}"))?;
    let said = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
    // It dies of the signal it sends, or says so by its exit code.
    let killed = status.signal() == Some(KILLED) || status.code() == Some(128 + KILLED);
    if killed && begin.elapsed() >= bound {
        bail!(
            "{name}: killed after {} s\n{}",
            bound.as_secs(),
            tail(&said)
        );
    }
    Ok((status.code(), said))
}

/// `command` in a network of its own, where the machine lets one be made: for a program that opens
/// a port unasked.
pub fn without_network(command: Command) -> Command {
    let mut alone = Command::new("unshare");
    alone.args(["--map-root-user", "--net"]);
    let possible = Command::new("unshare")
        .args(["--map-root-user", "--net", "true"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !possible.is_ok_and(|status| status.success()) {
        return command;
    }
    alone.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            alone.env(key, value);
        }
    }
    alone
}

/// As [`bounded`], for a program that must end with 0.
///
/// # Errors
/// Also when it does not.
pub fn succeeds(
    command: &Command,
    folder: &Path,
    name: &str,
    bound: Duration,
) -> anyhow::Result<String> {
    let (code, said) = bounded(command, folder, name, bound)?;
    ensure!(
        code == Some(0),
        "{name} ended with {code:?}: {}",
        tail(&said)
    );
    Ok(said)
}

/// The last lines of what a program said.
pub fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let begin = Instant::now();
        let mut sleep = Command::new("sleep");
        let bound = Duration::from_millis(50);
        let error = bounded(sleep.arg("60"), folder.path(), "sleep", bound).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn what_a_failing_program_said_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo why >&2; exit 3"]);
        let error = succeeds(&command, folder.path(), "sh", Duration::from_secs(30)).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }
}
