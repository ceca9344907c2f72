//! Each crate alone: a workspace build unites the features all members ask for, and so hides that
//! one of them forgot its own. Tests are not built here; the workspace's test run does that.

use std::process::Command;

use crate::{example, shell, tally::Tally, workspace::Workspace};

/// `cargo check -p` for every package of the workspace, and `cargo check` for the example, which is
/// outside it.
///
/// # Errors
/// When cargo's metadata cannot be had. A package that does not build counts as failed, and the
/// others are still tried.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    for package in workspace.metadata()?.own() {
        let mut command = workspace.cargo();
        command.args(["check", "--locked", "--quiet", "-p", &package.name]);
        tally.add(check(&mut command));
    }
    tally.add(check(example::cargo(workspace, "check")?.arg("--quiet")));
    Ok(tally)
}

fn check(command: &mut Command) -> Tally {
    match shell::run(command) {
        Ok(()) => Tally::passed(),
        Err(error) => Tally::of_faults(&[error.to_string()]),
    }
}
