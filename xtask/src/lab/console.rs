//! Commands on a host, over a port that its emulator joins to our pipes.
//!
//! One at a time: a line with a bound and a command goes in; an exit code, standard output and
//! standard error come back (`init.sh` is the other end). The host ends the command at the bound.
//! When the answer is late all the same, the host hangs, and that is an error. Nothing waits
//! without a bound.

use std::{
    io::{Read as _, Write as _},
    process::{ChildStdin, ChildStdout},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

/// What a host may take for an answer longer than the command's own bound.
const GRACE: Duration = Duration::from_secs(30);
/// Exit code of a command that was killed.
const KILLED: i32 = 128 + 9;

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The near end of a host's port.
#[derive(Debug)]
pub(crate) struct Console {
    to: ChildStdin,
    from: Receiver<Vec<u8>>,
    /// Read and not used yet.
    rest: Vec<u8>,
}

impl Console {
    /// Over the pipes of an emulator.
    pub(crate) fn new(to: ChildStdin, mut from: ChildStdout) -> Self {
        let (heard, received) = mpsc::channel();
        // Ends with the emulator.
        thread::spawn(move || {
            let mut block = vec![0; 1 << 16];
            while let Ok(count @ 1..) = from.read(&mut block) {
                if heard.send(block[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            to,
            from: received,
            rest: Vec::new(),
        }
    }

    fn more(&mut self, deadline: Instant) -> anyhow::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.from.recv_timeout(left) {
            Ok(bytes) => self.rest.extend(bytes),
            Err(RecvTimeoutError::Timeout) => bail!("it does not answer"),
            Err(RecvTimeoutError::Disconnected) => bail!("its emulator ended"),
        }
        Ok(())
    }

    fn line(&mut self, deadline: Instant) -> anyhow::Result<String> {
        loop {
            if let Some(at) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=at).collect();
                return Ok(String::from_utf8_lossy(&line).trim().to_owned());
            }
            self.more(deadline)?;
        }
    }

    fn bytes(&mut self, count: usize, deadline: Instant) -> anyhow::Result<String> {
        while self.rest.len() < count {
            self.more(deadline)?;
        }
        let bytes: Vec<u8> = self.rest.drain(..count).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the host serves.
    ///
    /// # Errors
    /// When it does not by then.
    pub(crate) fn ready(&mut self, deadline: Instant) -> anyhow::Result<()> {
        let line = self.line(deadline)?;
        ensure!(line == "ready", "it said {line:?} and not `ready`");
        Ok(())
    }

    /// Runs a command of the host's shell, whatever its exit code. It has no input, and no line
    /// break.
    ///
    /// # Errors
    /// When the host does not answer in time.
    pub(crate) fn run(&mut self, command: &str, bound: Duration) -> anyhow::Result<Said> {
        ensure!(!command.contains('\n'), "a command is one line: {command}");
        let line = format!("{} {command}\n", bound.as_secs().max(1));
        let deadline = Instant::now() + bound + GRACE;
        self.answer(&line, deadline)
            .with_context(|| format!("running `{command}`"))
    }

    fn answer(&mut self, line: &str, deadline: Instant) -> anyhow::Result<Said> {
        self.to
            .write_all(line.as_bytes())
            .context("its emulator ended")?;
        self.to.flush()?;
        let head = self.line(deadline)?;
        let (code, out, err) = parse(&head).with_context(|| format!("it answered {head:?}"))?;
        Ok(Said {
            code,
            out: self.bytes(out, deadline)?,
            err: self.bytes(err, deadline)?,
        })
    }
}

/// Exit code and lengths in an answer's first line.
fn parse(head: &str) -> Option<(i32, usize, usize)> {
    let mut words = head.strip_prefix("end ")?.split(' ');
    let code = words.next()?.parse().ok()?;
    let out = words.next()?.parse().ok()?;
    let err = words.next()?.parse().ok()?;
    words.next().is_none().then_some((code, out, err))
}

impl Said {
    /// What it printed, when it ended with 0.
    ///
    /// # Errors
    /// When it did not.
    pub(crate) fn good(self, command: &str) -> anyhow::Result<String> {
        ensure!(
            self.code == 0,
            "`{command}` {}\n{}{}",
            self.ending(),
            self.out,
            self.err
        );
        Ok(self.out)
    }

    /// How it ended.
    pub(crate) fn ending(&self) -> String {
        match self.code {
            KILLED => "was killed, because its time was up".to_owned(),
            code => format!("ended with {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// Something that answers as a host does, with its process.
    fn echo(script: &str) -> (Console, Child) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = Console::new(child.stdin.take().unwrap(), child.stdout.take().unwrap());
        (console, child)
    }

    #[test]
    fn an_answer_is_taken_apart() {
        let (mut console, mut child) =
            echo("echo ready; read line; echo end 3 4 2; printf 'out\\ne\\n'");
        let soon = Instant::now() + Duration::from_secs(30);
        console.ready(soon).unwrap();
        let said = console.run("anything", Duration::from_secs(1)).unwrap();
        let expected = Said {
            code: 3,
            out: "out\n".into(),
            err: "e\n".into(),
        };
        assert_eq!(said, expected);
        assert!(said.good("anything").is_err());
        let error = console.run("more", Duration::from_secs(1)).unwrap_err();
        assert!(format!("{error:#}").contains("ended"), "{error:#}");
        child.wait().unwrap();
    }

    #[test]
    fn a_head_that_is_none_is_refused() {
        assert_eq!(parse("end 0 12 0"), Some((0, 12, 0)));
        for head in ["", "end", "end 0 1", "end 0 1 2 3", "end x 1 2", "ready"] {
            assert_eq!(parse(head), None, "{head}");
        }
    }

    #[test]
    fn a_host_that_is_silent_is_not_waited_for() {
        let (mut console, mut child) = echo("sleep 30");
        let error = console.ready(Instant::now()).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
