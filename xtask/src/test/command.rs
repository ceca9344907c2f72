//! A run of `cargo test`: its command, and what its lines add up to.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::Context as _;

use super::reader::Reader;
use crate::{shell, tally::Tally, workspace::Workspace};

/// `cargo test` of the workspace, or of the packages that `own` names.
pub(super) fn cargo_test(workspace: &Workspace, own: &[String]) -> Command {
    let mut command = workspace.cargo();
    command.args(["test", "--locked"]);
    if !own
        .iter()
        .any(|arg| arg == "-p" || arg.starts_with("--package"))
    {
        command.arg("--workspace");
    }
    // All of them, so that one failure does not hide another.
    command.arg("--no-fail-fast").args(own);
    command
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
