//! `cargo xtask soak`: random steps over a fleet of four hosts, and whether all that is said of it
//! is true, with its own arguments and its own standard output: `--output json` is one JSON object.

use std::process::Command;

use crate::{shell, tally::Tally, workspace::Workspace};

/// What CI does each time: the same steps, so that a failure is of the change.
const BOUNDED: [&str; 4] = ["--minutes", "1.2", "--seed", "9"];

fn command(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo();
    command.args(["run", "--locked", "--quiet", "--release"]);
    command.args(["--package", "slat-tests", "--bin", "soak", "--"]);
    command
}

/// Builds it with optimisations and runs it.
///
/// # Errors
/// When it cannot be built, or finds a disagreement.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    shell::run_aside(command(workspace).args(args))
}

/// The bounded form.
///
/// # Errors
/// As [`run`].
pub(crate) fn bounded(workspace: &Workspace) -> anyhow::Result<Tally> {
    shell::run(command(workspace).args(BOUNDED)).map(|()| Tally::passed())
}
