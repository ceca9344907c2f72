//! The stand-in hypervisor of `examples/bare`: a package outside the workspace, so each command
//! that covers the workspace must be told of it. It is always built into a folder of its own below
//! the workspace's target directory: its panic strategy and features differ, and would push the
//! workspace's artefacts out.

use std::{path::PathBuf, process::Command};

use crate::workspace::Workspace;

/// The package's name, and its program's.
pub(crate) const NAME: &str = "slat-bare";
/// Its manifest, from the workspace's root.
pub(crate) const MANIFEST: &str = "examples/bare/Cargo.toml";
/// Its lock file, from the workspace's root.
pub(crate) const LOCK: &str = "examples/bare/Cargo.lock";

/// Where it is built.
///
/// # Errors
/// When cargo cannot say where the workspace is.
pub(crate) fn target_dir(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    Ok(workspace.target_dir()?.join("xtask/bare"))
}

/// `cargo <sub>` on the example, with its own lock file as it is.
///
/// # Errors
/// As for [`target_dir`].
pub(crate) fn cargo(workspace: &Workspace, sub: &str) -> anyhow::Result<Command> {
    let mut command = workspace.cargo();
    command.args([sub, "--locked", "--manifest-path", MANIFEST, "--target-dir"]);
    command.arg(target_dir(workspace)?);
    Ok(command)
}
