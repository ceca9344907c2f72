//! Programs that are run for a bounded time: one that is not done by then is killed, and that is an
//! error.

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

/// SIGKILL.
const KILLED: i32 = 9;

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
#[must_use]
pub fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed() {
        let folder = slat_test_dir::TestDir::new();
        let begin = Instant::now();
        let mut sleep = Command::new("sleep");
        let bound = Duration::from_millis(50);
        let error = bounded(sleep.arg("60"), folder.path(), "sleep", bound).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn what_a_failing_program_said_is_told() {
        let folder = slat_test_dir::TestDir::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo why >&2; exit 3"]);
        let error = succeeds(&command, folder.path(), "sh", Duration::from_secs(30)).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }
}
