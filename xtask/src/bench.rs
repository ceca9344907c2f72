//! `cargo xtask bench`: builds what is measured and what measures with optimisations, and runs it.
//! Its output is the benchmark's alone, so that `--output json` is one JSON object on standard
//! output.

use std::process::Command;

use clap::Subcommand;

use crate::{shell, workspace::Workspace};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// An idle 2 GiB VM migrated with 1 and 4 streams, in the clear and by TLS, beside a bare loop
    /// over as many loopback connections, and beside QEMU where it is installed
    Migration {
        /// Passed on: `--output json`, `--update-docs`, `--runs N`, `--memory-mib N`, `--backing
        /// small`, `--backend kvm|software`, `--no-qemu`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Readers of dirty pages, none, one and four, beside a guest that writes as fast as it can
    Dirty {
        /// Passed on: `--output json`, `--runs N`, `--memory-mib N`, `--window-ms N`, `--pace-ms N`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Slot calls, harvests, new memory and random access beside the plain kernel calls below them
    Kvm {
        /// Passed on: `--output json`, `--update-docs`, `--runs N`, `--memory-mib N`, `--only
        /// slots,clean,dirty,populate,readers,access`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Faults resolved by the pager beside a bare handler of faults, and what its death costs;
    /// restores and forks beside reading files
    Paging {
        /// Passed on: `--output json`, `--update-docs`, `--runs N`, `--memory-mib N`, `--only
        /// faults,mirror,deaths,restores,forks,children`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// A saved VM's file written and read, raw and compressed, beside plain writes and reads of the
    /// same bytes
    Image {
        /// Passed on: `--output json`, `--update-docs`, `--runs N`, `--memory-mib N`, `--dir DIR`
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
        Bench::Migration { args } => through_fleet(workspace, "bench-migration", args),
        Bench::Dirty { args } => through_fleet(workspace, "bench-dirty", args),
        Bench::Kvm { args } => through_fleet(workspace, "bench-kvm", args),
        Bench::Paging { args } => through_fleet(workspace, "bench-paging", args),
        Bench::Image { args } => image(workspace, args),
        Bench::Mmu { args } => mmu(workspace, args),
    }
}

/// A benchmark that drives real processes, built as they are installed (`[profile.dist]`).
fn through_fleet(workspace: &Workspace, program: &str, args: &[String]) -> anyhow::Result<()> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--profile", "dist"]);
    build.args(["--package", "slat", "--package", "slat-tests"]);
    build.args(["--bin", "slat", "--bin", program]);
    shell::run_aside(&mut build)?;
    let built = workspace.target_dir()?.join("dist");
    let mut measure = Command::new(built.join(program));
    measure.env("SLAT_BIN", built.join("slat")).args(args);
    shell::run_aside(&mut measure)
}

/// One that needs no other program, built as what uses it is installed.
fn image(workspace: &Workspace, args: &[String]) -> anyhow::Result<()> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--profile", "dist"]);
    build.args(["--package", "slat-tests", "--bin", "bench-image"]);
    shell::run_aside(&mut build)?;
    let built = workspace.target_dir()?.join("dist").join("bench-image");
    shell::run_aside(Command::new(built).args(args))
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
