//! `cargo xtask bench`: builds what is measured and what measures with optimisations, and runs it.
//! Its output is the benchmark's alone, so that `--output json` is one JSON object on standard
//! output.

use std::process::Command;

use clap::Subcommand;

use crate::{shell, workspace::Workspace};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// An idle 2 GiB VM migrated with 1 and 4 streams, beside a plain write/read loop over as many
    /// loopback connections
    Migration {
        /// Passed on: `--output json`, `--update-docs`, `--runs N`, `--memory-mib N`, `--backend
        /// kvm|software`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The Common MMU beside other page-table crates and the machine's own limits, at 4 GiB and 64
    /// GiB of guest memory
    // Its own --help says more, so it gets to see it.
    #[command(disable_help_flag = true)]
    Mmu {
        /// Passed on: `--output table|json|markdown`, `--quick`, `--only SUBSTRING`, `--list`,
        /// `--help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Builds and runs one benchmark.
///
/// # Errors
/// When it cannot be built or fails.
pub(crate) fn run(workspace: &Workspace, bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Migration { args } => migration(workspace, args),
        Bench::Mmu { args } => mmu(workspace, args),
    }
}

fn migration(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--release", "--package", "slat"]);
    build.args([
        "--package",
        "slat-tests",
        "--bin",
        "slat",
        "--bin",
        "bench-migration",
    ]);
    shell::run_aside(&mut build)?;
    let release = workspace.target_dir()?.join("release");
    let mut measure = Command::new(release.join("bench-migration"));
    measure.env("SLAT_BIN", release.join("slat")).args(args);
    shell::run_aside(&mut measure)
}

fn mmu(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--profile", "measure"]);
    build.args(["--package", "slat-benches", "--bin", "bench-mmu"]);
    shell::run_aside(&mut build)?;
    let target = workspace.target_dir()?;
    let mut measure = Command::new(target.join("measure").join("bench-mmu"));
    // Or criterion asks cargo where the target directory is.
    measure.env("CARGO_TARGET_DIR", &target).args(args);
    shell::run_aside(&mut measure)
}
