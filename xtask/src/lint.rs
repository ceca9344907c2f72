//! Formatting, clippy and rustdoc, all with warnings denied.

use crate::{example, shell, tally::Tally, workspace::Workspace};

/// `cargo fmt`, or its check.
///
/// # Errors
/// When something is not formatted (`check`) or rustfmt fails.
pub(crate) fn format(workspace: &Workspace, check: bool) -> anyhow::Result<Tally> {
    let mut command = workspace.cargo();
    command.args(["fmt", "--all"]);
    if check {
        command.arg("--check");
    }
    shell::run(&mut command)?;
    // No `--all`: it would format the crates that the example depends on once more.
    let mut command = workspace.cargo();
    command.args(["fmt", "--manifest-path", example::MANIFEST]);
    if check {
        command.arg("--check");
    }
    shell::run(&mut command)?;
    Ok(Tally::passed())
}

/// `cargo clippy` over everything, the example too.
///
/// # Errors
/// When it warns.
pub(crate) fn clippy(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut command = workspace.cargo();
    command.args(["clippy", "--locked", "--workspace", "--all-targets"]);
    command.args(["--", "-D", "warnings"]);
    shell::run(&mut command)?;
    let mut command = example::cargo(workspace, "clippy")?;
    shell::run(command.args(["--all-targets", "--", "-D", "warnings"]))?;
    Ok(Tally::passed())
}

/// `cargo doc` over our own crates and the example.
///
/// # Errors
/// When it warns.
pub(crate) fn doc(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut command = workspace.cargo();
    command.args(["doc", "--locked", "--workspace", "--no-deps"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    shell::run(&mut command)?;
    let mut command = example::cargo(workspace, "doc")?;
    command.arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings");
    shell::run(&mut command)?;
    Ok(Tally::passed())
}
