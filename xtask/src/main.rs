//! `cargo xtask`: the one door for everything a developer repeats. Nothing to install beyond a Rust toolchain and a C
//! compiler; each command is one file and one function from the workspace to a [`tally::Tally`].
//!
//! Every command ends with the line `N passed, N failed, N skipped` and exits with 0 only when nothing failed.

mod bench;
mod ci;
mod crates;
mod demo;
mod deny;
mod example;
mod interleavings;
mod leftovers;
mod licence;
mod lint;
mod metrics;
mod no_std;
mod oracles;
mod pages;
mod planted;
mod riscv64;
mod sanitize;
mod shell;
mod structure;
mod tally;
mod test;
mod units;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{tally::Tally, workspace::Workspace};

/// Everything a developer of Slat repeats
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// All checks below in order, with the time each took; what `.ci/run` calls
    Ci,
    /// Format the sources
    Fmt {
        /// Change nothing; fail when something would change
        #[arg(long)]
        check: bool,
    },
    /// clippy over the workspace with all targets, and over the example; warnings denied
    Lint,
    /// rustdoc over the workspace and the example, warnings denied
    Doc,
    /// Check that each crate builds alone, so that none lives on another's features
    Crates,
    /// Check that the agent's crates compile for riscv64, warnings denied
    ///
    /// With the toolchain's own target (rustup target add riscv64gc-unknown-linux-gnu), or else with
    /// a compiler out of Debian's packages, about 190 MB, unpacked into target/riscv64.
    Riscv64,
    /// Prove that slat-mmu and slat-arch need no std: build the hypervisor of examples/bare on them alone, and run it
    NoStd,
    /// `cargo test --workspace`, with a summary of what was skipped and why
    Test {
        /// Passed on to `cargo test`, e.g. `-p slat-mmu` or `-- name`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The models of the Common MMU: loom on its small kernels, shuttle on a whole VM
    Interleavings,
    /// The small tests of slat-mmu and slat-arch under Miri, where a nightly toolchain has it
    Miri,
    /// The threads of slat-arch's tests under ThreadSanitizer, where a nightly toolchain has it
    Tsan,
    /// Runs of `slat demo`, their reports checked: KVM where /dev/kvm opens, software with every format, one at full size
    Demo(demo::Options),
    /// Measure; prints what it measured and nothing else on standard output
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Have emulated hardware walk page tables of every format, and compare each answer with the software's
    ///
    /// QEMU's RISC-V H extension walks Sv39x4, Sv48x4 and Sv57x4 (once faulting on A and D, once setting them), QEMU's SVM
    /// walks NPT, Bochs walks EPT. The first run fetches them as Debian packages into target/oracles, about 90 MB, and
    /// unpacks them there; nothing is installed. Needs apt and dpkg for that, gcc and binutils for the x86 programs.
    /// What cannot be had is SKIPPED with the reason. Before each format's run a corrupted leaf must be caught.
    Oracles(oracles::Options),
    /// Plant known bugs, one at a time, and demand that a test fails
    ///
    /// Each entry of tests/planted/*.toml is planted in a copy of the workspace below target/planted. The test that it
    /// names must pass without it and fail, or hang, with it.
    Planted(planted::Options),
    /// Look for what a run may have left behind: processes, guest memory, sockets, temporary directories
    Leftovers,
    /// Length of files, their opening comment, and the arrows between crates
    Structure,
    /// Bans, sources and licences of deny.toml against Cargo.lock and cargo's metadata (advisories need cargo-deny)
    Deny,
    /// Check that every metric that deploy/ and docs/ name is exported, and every exported one explained
    Metrics,
    /// Check that deploy/ sets only what slat reads, and that systemd accepts the units
    Units,
    /// Check that links between pages lead somewhere and docs/operations.md explains every error reason
    Pages,
}

fn run(command: Command) -> anyhow::Result<Tally> {
    let workspace = Workspace::find()?;
    match command {
        Command::Ci => ci::run(&workspace),
        Command::Fmt { check } => lint::format(&workspace, check),
        Command::Lint => lint::clippy(&workspace),
        Command::Doc => lint::doc(&workspace),
        Command::Crates => crates::run(&workspace),
        Command::Riscv64 => riscv64::run(&workspace),
        Command::NoStd => no_std::run(&workspace),
        Command::Test { args } => test::run(&workspace, &args),
        Command::Interleavings => interleavings::run(&workspace),
        Command::Miri => sanitize::miri(&workspace),
        Command::Tsan => sanitize::tsan(&workspace),
        Command::Demo(options) => demo::run(&workspace, &options),
        Command::Bench { bench } => {
            bench::run(&workspace, &bench)?;
            Ok(Tally::passed())
        }
        Command::Oracles(options) => oracles::run_with(&workspace, &options),
        Command::Planted(options) => planted::run(&workspace, &options),
        Command::Leftovers => leftovers::run(&workspace),
        Command::Structure => structure::run(&workspace),
        Command::Deny => deny::run(&workspace),
        Command::Metrics => metrics::run(&workspace),
        Command::Units => units::run(&workspace),
        Command::Pages => pages::run(&workspace),
    }
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // What a benchmark prints is its own; the closing lines would make its JSON none.
    let measures = matches!(command, Command::Bench { .. });
    let say = |line: String| {
        if measures {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    };
    let tally = run(command).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally::failed()
    });
    for (why, times) in tally.reasons() {
        say(format!("SKIPPED: {why} ({times})"));
    }
    say(tally.to_string());
    if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
