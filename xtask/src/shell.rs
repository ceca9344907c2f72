//! Running other programs: shown before they run, bounded where they may hang, their failure an
//! error.

use std::{
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let mut line = String::from("$");
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            line.push_str(&format!(" {}={value:?}", key.display()));
        }
    }
    let program = std::path::Path::new(command.get_program());
    let program = program.file_name().unwrap_or(command.get_program());
    line.push_str(&format!(" {}", program.display()));
    for argument in command.get_args() {
        line.push_str(&format!(" {}", argument.display()));
    }
    line
}

/// Shows the command and runs it, with its output going where ours goes.
///
/// # Errors
/// When it cannot be started or does not end with 0.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = line(command);
    println!("{shown}");
    ended_well(command, shown)
}

/// Like [`run`], but shown on standard error: standard output is the program's alone.
///
/// # Errors
/// As for [`run`].
pub(crate) fn run_aside(command: &mut Command) -> anyhow::Result<()> {
    let shown = line(command);
    eprintln!("{shown}");
    ended_well(command, shown)
}

fn ended_well(command: &mut Command, shown: String) -> anyhow::Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| shown.clone())?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Runs a command quietly and gives its standard output back.
///
/// # Errors
/// When it cannot be started, does not end with 0, or does not speak UTF-8.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let shown = line(command);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| shown.clone())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}\n{}", output.status, said.trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| shown)
}

/// How a bounded run ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

fn reader(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            // What came before an error is still worth showing.
            drop(source.read_to_end(&mut bytes));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child, bound: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begin.elapsed() > bound {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command for at most `bound`; after that it is killed and the run is an error.
///
/// # Errors
/// When it cannot be started or does not end in time.
pub(crate) fn bounded(command: &mut Command, bound: Duration) -> anyhow::Result<Ended> {
    let shown = line(command);
    println!("{shown}");
    limited(command, bound)?.map_err(|stderr| {
        let (limit, said) = (bound.as_secs(), stderr.trim_end());
        anyhow!("{shown}: still running after {limit} s, killed\n{said}")
    })
}

/// Runs a command for at most `bound`, quietly. When it had to be killed, `Err` has what it said on
/// standard error.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn limited(
    command: &mut Command,
    bound: Duration,
) -> anyhow::Result<Result<Ended, String>> {
    let shown = line(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| shown.clone())?;
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let status = wait(&mut child, bound)?;
    if status.is_none() {
        child.kill()?;
        child.wait()?;
    }
    let join = |reader: thread::JoinHandle<String>| reader.join().unwrap_or_default();
    let (stdout, stderr) = (join(stdout), join(stderr));
    Ok(match status {
        Some(status) => Ok(Ended {
            status,
            stdout,
            stderr,
        }),
        None => Err(stderr),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended() {
        let begin = Instant::now();
        let error =
            bounded(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("still running"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn both_outputs_and_the_code_come_back() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let ended = bounded(&mut command, Duration::from_secs(30)).unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!(
            (ended.stdout.as_str(), ended.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert!(output(&mut command).is_err());
    }
}
