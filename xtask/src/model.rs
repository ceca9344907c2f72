//! `cargo xtask model`: the model checker of the handover, with its own arguments and its own
//! standard output, so that `--output json` is one JSON object.

use crate::{shell, workspace::Workspace};

/// Builds it with optimisations and runs it.
///
/// # Errors
/// When it cannot be built, or finds a violation.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    let mut command = workspace.cargo();
    command.args(["run", "--locked", "--quiet", "--release"]);
    command.args(["--package", "slat-tests", "--bin", "model", "--"]);
    shell::run_aside(command.args(args))
}
