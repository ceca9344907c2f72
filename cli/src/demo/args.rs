//! The options of `slat demo`.

use crate::{
    command::create::{BackendChoice, FormatChoice},
    term::units::{Rate, Size, Span},
};

const EXAMPLES: &str = "\
Examples:
  slat demo
  slat demo --migrations 20 --vcpus 2
  slat demo --backend software --format sv48x4        RISC-V page tables, without KVM
  slat demo --dirty-rate 256MiB/s --max-downtime 20ms more iterations
  slat demo --output json                             one object on standard output
  slat demo --keep                                    stay up, for a look at the dashboard

It starts a server and two agents on loopback, with a temporary state directory, and creates one
VM whose guest writes its memory and checks every page that it reads back. It moves the VM back
and forth while it runs, then once more while it is paused, and compares digests of all memory
before and after. It stops everything it started, and exits 0 only if every check held.";

/// How the report is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people
    #[default]
    Text,
    /// One JSON object
    Json,
}

/// Options of `slat demo`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DemoArgs {
    /// What walks the VM's second stage, as software
    #[arg(long, value_enum, default_value_t, value_name = "BACKEND")]
    pub(super) backend: BackendChoice,
    /// Layout of page-table entries, as sv48x4; only with --backend software [default: ept4]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(super) format: Option<FormatChoice>,
    /// The VM's memory with its unit, as 1GiB: in steps of 2MiB; each host needs as much
    #[arg(long, default_value = "512MiB", value_name = "SIZE")]
    pub(super) memory: Size,
    /// The VM's virtual CPUs, as 2: 1 to 64
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) vcpus: u32,
    /// How much memory the guest dirties a second, as 256MiB/s; 0 is idle
    #[arg(long, default_value = "64MiB/s", value_name = "RATE")]
    pub(super) dirty_rate: Rate,
    /// Number of live migrations, back and forth, as 20
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) migrations: u32,
    /// TCP streams that carry pages, as 4: 1 to 16
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(super) streams: u32,
    /// Accepted downtime, as 20ms: 1ms to 2000s
    #[arg(long, default_value = "300ms", value_name = "DURATION")]
    pub(super) max_downtime: Span,
    /// Stay up after the checks, migrating now and then, until Ctrl-C
    #[arg(long)]
    pub(super) keep: bool,
    /// How to print the report
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Output,
}

/// Options as a test writes them.
#[cfg(test)]
pub(super) fn parsed(line: &str) -> DemoArgs {
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: DemoArgs,
    }
    let words = std::iter::once("demo").chain(line.split_whitespace());
    Line::parse_from(words).args
}
