//! The workspace's tests, with what they skipped brought to the end, and a look at what they left
//! behind.
//!
//! A test that lacks something (`/dev/kvm`) prints a line `SKIPPED: <why>` and returns. libtest
//! hides what passing tests print, so the run asks for it (`--show-output`) and this command keeps
//! everything else of it back.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::Context as _;

use crate::{
    leftovers::{self, Scratch},
    shell,
    tally::{Skip, Tally},
    workspace::Workspace,
};

/// What the lines of a test run add up to.
#[derive(Debug, Default)]
struct Reader {
    tally: Tally,
    /// Within the output of tests that passed.
    in_successes: bool,
    /// Whose output this is.
    test: String,
}

impl Reader {
    /// Takes one line; true when it is worth showing.
    fn line(&mut self, line: &str) -> bool {
        // A test's line may follow libtest's own on the same line when it was written past the
        // capture.
        if let Some(at) = line.find("SKIPPED:") {
            let why = line[at + "SKIPPED:".len()..].trim();
            let started = line
                .strip_prefix("test ")
                .and_then(|rest| rest.split_once(" ..."));
            let name = started.map_or(self.test.as_str(), |(name, _)| name);
            self.tally.skipped.push(Skip {
                name: format!("test {name}"),
                why: why.to_owned(),
            });
            return false;
        }
        let header = line.trim_end().strip_prefix("---- ");
        if let Some(name) = header.and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.test = name.to_owned();
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.in_successes = false;
            let count = |word: &str| {
                let before = result.split(word).next()?;
                before
                    .trim_end()
                    .rsplit([' ', ';'])
                    .next()?
                    .parse::<usize>()
                    .ok()
            };
            self.tally.passed += count("passed").unwrap_or(0);
            self.tally.failed += count("failed").unwrap_or(0);
            return true;
        }
        match line.trim_end() {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ => {}
        }
        let plain = line.starts_with("test ") && line.ends_with("... ok");
        !(self.in_successes || plain)
    }
}

/// The tests beside the code: those that need no other process and no built binary.
///
/// # Errors
/// As for [`run`].
pub(crate) fn beside_the_code(workspace: &Workspace) -> anyhow::Result<Tally> {
    run(workspace, &["--lib".to_owned(), "--bins".to_owned()])
}

/// `cargo test --workspace`, or of what `args` choose.
///
/// # Errors
/// When cargo cannot be started.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> anyhow::Result<Tally> {
    let mut command = workspace.cargo();
    let (own, to_tests) = match args.iter().position(|arg| arg == "--") {
        Some(at) => (&args[..at], &args[at + 1..]),
        None => (args, &[][..]),
    };
    command.args(["test", "--locked"]);
    if !own
        .iter()
        .any(|arg| arg == "-p" || arg.starts_with("--package"))
    {
        command.arg("--workspace");
    }
    // All of them, so that one failure does not hide another.
    command.args(["--no-fail-fast"]).args(own);
    command.args(["--", "--show-output"]).args(to_tests);
    let scratch = Scratch::new("test")?;
    scratch.give(&mut command);
    let (mut tally, status) = counted(&mut command)?;
    // A test that failed may have stopped before it cleaned up; one that passed may not.
    if status.success() {
        let mut left = scratch.remains();
        left.extend(leftovers::processes(&workspace.target_dir()?));
        tally.add(Tally::of_faults(&left));
    }
    Ok(tally)
}

/// Shows a `cargo test`, runs it, shows what of its lines is worth it, and counts its tests by the
/// lines that libtest ends each program with. A run that failed without a test that did counts as
/// one that failed.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn counted(command: &mut Command) -> anyhow::Result<(Tally, ExitStatus)> {
    let shown = shell::line(command);
    println!("{shown}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| shown.clone())?;
    let mut reader = Reader::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            if reader.line(&line) {
                println!("{line}");
            }
        }
    }
    let status = child.wait()?;
    let mut tally = reader.tally;
    if !status.success() && tally.failed == 0 {
        eprintln!("fault: {shown}: {status}");
        tally.add(Tally::failed());
    }
    // A skipped test returned normally, so libtest counted it as passed.
    tally.passed = tally.passed.saturating_sub(tally.skipped.len());
    Ok((tally, status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_counted_and_what_was_skipped_is_kept() {
        let text = "\nrunning 3 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\n\nsuccesses:\n\n---- b stdout ----\n\
                    SKIPPED: /dev/kvm cannot be opened\nnoise\n\nfailures:\n\n---- c stdout ----\nwhy\n\n\
                    test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
                    test result: ok. 14 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let mut reader = Reader::default();
        let shown: Vec<&str> = text.lines().filter(|line| reader.line(line)).collect();
        assert_eq!((reader.tally.passed, reader.tally.failed), (16, 1));
        assert_eq!(
            reader.tally.skip_lines(),
            ["SKIPPED: test b: /dev/kvm cannot be opened"]
        );
        assert!(!reader.line("test a::d ... SKIPPED: no network"));
        assert_eq!(reader.tally.skipped[1].name, "test a::d");
        assert!(shown.contains(&"why") && shown.contains(&"test c ... FAILED"));
        assert!(!shown.contains(&"noise") && !shown.contains(&"test a ... ok"));
    }
}
