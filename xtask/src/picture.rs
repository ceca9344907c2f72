//! `cargo xtask picture`: draws docs/migration.svg from a migration that it runs.

use std::process::Command;

use crate::{shell, workspace::Workspace};

/// Builds `slat` and the program that draws, with optimisations, and runs it.
///
/// # Errors
/// When one cannot be built, or the migration does not complete.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--release", "--package", "slat"]);
    build.args([
        "--package",
        "slat-tests",
        "--bin",
        "slat",
        "--bin",
        "picture",
    ]);
    shell::run(&mut build)?;
    let release = workspace.target_dir()?.join("release");
    let mut draw = Command::new(release.join("picture"));
    shell::run(draw.env("SLAT_BIN", release.join("slat")))
}
