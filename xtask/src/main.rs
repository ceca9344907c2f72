//! `cargo xtask`: everything a developer repeats, behind one command. Nothing to install beyond a
//! Rust toolchain and a C compiler; each command is one module and one function from the workspace
//! to a [`tally::Tally`].
//!
//! Every command ends with a line for each check that was skipped and the line `N passed, N failed,
//! N skipped`, and exits with 0 only when nothing failed.

mod bench;
mod budget;
mod ci;
mod crates;
mod demo;
mod deny;
mod example;
mod fuzz;
mod interleavings;
mod lab;
mod leftovers;
mod licence;
mod links;
mod lint;
mod model;
mod no_std;
mod oracles;
mod picture;
mod planted;
mod riscv64;
mod sanitize;
mod shell;
mod soak;
mod structure;
mod tally;
mod test;
mod units;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{tally::Tally, workspace::Workspace};

const EXAMPLES: &str = "\
Examples:
  cargo xtask ci --quick                  before each commit
  cargo xtask test -p slat-mmu -- sweep   the tests of one crate whose names contain `sweep`
  cargo xtask structure                   may this module import that one?
  cargo xtask planted --changed           do the tests notice known bugs in the files I changed?
  cargo xtask ci                          before a merge: all checks, as `.ci/run` makes them

Each command prints the programs it runs, so that one can be run again by hand. The last lines say
by name what was skipped and why, and then `N passed, N failed, N skipped`; the exit code is 0 only
when nothing failed. `cargo xtask help COMMAND` says more about one.";

/// Everything a developer of Slat repeats: checks, tests, proofs and benchmarks
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
#[command(after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the checks of one tier in order, with the time each took
    ///
    /// Without --quick: all that a change must pass, as `.ci/run` calls it. With it: format,
    /// structure, clippy, the tests beside the code and what else needs no binary, model or
    /// emulator. A failure does not end the run.
    Ci(ci::Options),
    /// Format the sources
    Fmt {
        /// Change nothing; fail when something would change
        #[arg(long)]
        check: bool,
    },
    /// Run clippy over the workspace with all targets, and over the example; warnings denied
    Lint,
    /// Run rustdoc over the workspace and the example, warnings denied
    Doc,
    /// Check the shape of the code against structure.toml: layers, lengths, `unsafe`
    ///
    /// Crates and modules may use only what is below them, files of a folder may not use each other
    /// in a circle, files and comments have a length, and `unsafe` stands where the table has it.
    /// What is not so yet is counted under `[known]` in the table, and may only become less.
    Structure(structure::Options),
    /// Run the tests of the workspace, and look at what they left behind
    ///
    /// Tests that lack something, such as /dev/kvm, are named at the end with the reason.
    Test {
        /// Passed on to `cargo test`, e.g. `-p slat-mmu` or `-- name`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Plant known bugs, one at a time, and demand that a test fails
    ///
    /// Each entry of tests/planted/*.toml is planted in a copy of the workspace below
    /// target/planted. The test that it names must pass without it and fail, or hang, with it.
    Planted(planted::Options),
    /// Run the models of the Common MMU: loom on its small kernels, shuttle on a whole VM
    Interleavings,
    /// Explore the handover with the model checker
    // Its own --help says more, so it gets to see it.
    #[command(disable_help_flag = true)]
    Model {
        /// Passed on to it, e.g. `--output json` or `--help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Do random things to a fleet and compare all that is said of it with what is true
    ///
    /// The build's last lines and each step come on standard error, what was found on standard
    /// output.
    #[command(disable_help_flag = true)]
    Soak {
        /// Passed on to it, e.g. `--minutes 120 --seed 7 --output json` or `--help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the small tests of slat-mmu and slat-arch under Miri, where a nightly toolchain has it
    Miri,
    /// Run the threads of slat-mmu's tests under ThreadSanitizer, where a nightly toolchain has it
    Tsan,
    /// Give damaged input to the decoders of what comes from outside, by libFuzzer
    ///
    /// The targets of fuzz/ call the same functions as the bounded rounds that the tests make, and
    /// begin with the same valid inputs. Needs cargo-fuzz; skipped without.
    Fuzz(fuzz::Options),
    /// Have emulated hardware walk page tables of every format, and compare its answers with ours
    ///
    /// QEMU's RISC-V H extension walks Sv39x4, Sv48x4 and Sv57x4 (once faulting on A and D, once
    /// setting them), QEMU's SVM walks NPT, Bochs walks EPT. The first run fetches them as Debian
    /// packages into target/oracles, about 90 MB, and unpacks them there; nothing is installed.
    /// Needs apt and dpkg for that, gcc and binutils for the x86 programs. Before each format's run
    /// a corrupted leaf must be caught.
    Oracles(oracles::Options),
    /// Boot emulated hosts with KVM as on hardware and a network between them, and test Slat there
    ///
    /// x86_64 has kvm-amd with the kernel's TDP MMU, riscv64 the H extension. A server, agents and
    /// a writing guest on several hosts: migrations both ways, cancels, deaths of processes and
    /// hosts, downtime under load. Without --brief also the whole-system tests and those of the
    /// VM's process, inside one host.
    Lab(lab::Options),
    /// Run `slat demo` and check its reports: on KVM where /dev/kvm opens, and with every format
    Demo(demo::Options),
    /// Measure; prints what it measured and nothing else on standard output
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Run a migration and draw it into docs/migration.svg, the picture of the README
    Picture,
    /// Check that each crate builds alone, so that none lives on another's features
    Crates,
    /// Check that the agent's crates compile for riscv64, warnings denied
    ///
    /// With the toolchain's own target (rustup target add riscv64gc-unknown-linux-gnu), or else
    /// with a compiler out of Debian's packages, about 190 MB, unpacked into target/riscv64.
    Riscv64,
    /// Prove that slat-mmu and slat-arch need no std: build examples/bare on them alone, and run it
    NoStd,
    /// Check bans, sources and licences of deny.toml (advisories need cargo-deny)
    Deny,
    /// Check that systemd accepts the units of deploy/
    Units,
    /// Check that links between the written pages lead to files that exist
    Links,
    /// Look for what a run may have left behind: processes, memory, sockets, temporary directories
    Leftovers,
}

fn run(command: Command) -> anyhow::Result<Tally> {
    let workspace = Workspace::find()?;
    match command {
        Command::Ci(options) => ci::run(&workspace, &options),
        Command::Fmt { check } => lint::format(&workspace, check),
        Command::Lint => lint::clippy(&workspace),
        Command::Doc => lint::doc(&workspace),
        Command::Structure(options) => structure::run_with(&workspace, &options),
        Command::Test { args } => test::run(&workspace, &args),
        Command::Planted(options) => planted::run(&workspace, &options),
        Command::Interleavings => interleavings::run(&workspace),
        Command::Model { args } => model::run(&workspace, &args).map(|()| Tally::passed()),
        Command::Soak { args } => soak::run(&workspace, &args).map(|()| Tally::passed()),
        Command::Miri => sanitize::miri(&workspace),
        Command::Tsan => sanitize::tsan(&workspace),
        Command::Fuzz(options) => fuzz::run(&workspace, &options),
        Command::Oracles(options) => oracles::run_with(&workspace, &options),
        Command::Lab(options) => lab::run(&workspace, &options),
        Command::Demo(options) => demo::run(&workspace, &options),
        Command::Bench { bench } => bench::run(&workspace, &bench).map(|()| Tally::passed()),
        Command::Picture => picture::run(&workspace).map(|()| Tally::passed()),
        Command::Crates => crates::run(&workspace),
        Command::Riscv64 => riscv64::run(&workspace),
        Command::NoStd => no_std::run(&workspace),
        Command::Deny => deny::run(&workspace),
        Command::Units => units::run(&workspace),
        Command::Links => links::run(&workspace),
        Command::Leftovers => leftovers::run(&workspace),
    }
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // What these print is their own; the closing lines would make their JSON none.
    let is_quiet = matches!(
        command,
        Command::Bench { .. } | Command::Model { .. } | Command::Soak { .. }
    );
    let say = |line: String| {
        if is_quiet {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    };
    let tally = run(command).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally::failed()
    });
    tally.skip_lines().into_iter().for_each(say);
    tally.fault_lines().into_iter().for_each(say);
    say(tally.to_string());
    if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
