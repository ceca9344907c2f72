//! `slat demo`: a fleet of one server and two agents that exists only for this run, one VM, and migrations that are
//! checked by the guest itself and by memory digests.
//!
//! * [`child`] is one daemon process, [`fleet`] all of them and their orderly end, [`sweep`] what a disorderly end leaves.
//! * [`script`] is what happens, [`observer`] what is counted meanwhile, [`report`] what is said about it.
//!
//! The fleet is owned here, outside the script: whatever ends the script (its end, an error, Ctrl-C, SIGTERM), the fleet
//! is then stopped the same way. When this process is killed, its daemons and the VM's process notice and end themselves
//! (`--die-with`); only the temporary directory stays then.

mod child;
mod fleet;
mod observer;
mod report;
mod script;
mod sweep;

use crate::{
    command::create::{BackendChoice, FormatChoice},
    daemon::stop::Stop,
    failure::Failure,
    term::{
        out,
        units::{Rate, Size, Span},
    },
};

const EXAMPLES: &str = "\
Examples:
  slat demo
  slat demo --migrations 20 --vcpus 2
  slat demo --backend software --format sv48x4        RISC-V page tables, without KVM
  slat demo --dirty-rate 256 --max-downtime 20ms      more rounds
  slat demo --output json                             one object on standard output
  slat demo --keep                                    stay up and open the dashboard it names

It starts a server and two agents on loopback with a temporary state directory, creates one VM
whose guest writes its memory and checks every page it reads back, moves it back and forth while
it runs, then once more while it is paused, comparing digests of its whole memory before and
after. It stops everything it started and exits 0 only if every check held.";

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
    /// How the VM's second stage is walked
    #[arg(long, value_enum, default_value_t, value_name = "BACKEND")]
    backend: BackendChoice,
    /// Layout of page-table entries; only with --backend software [default: ept4]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<FormatChoice>,
    /// The VM's memory, in steps of 2MiB; each host needs as much
    #[arg(long, default_value = "512MiB", value_name = "SIZE")]
    memory: Size,
    /// The VM's virtual CPUs, 1 to 64
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: u32,
    /// How fast the guest dirties memory; a bare number is MiB/s, 0 is idle
    #[arg(long, default_value = "64", value_name = "RATE")]
    dirty_rate: Rate,
    /// Live migrations, back and forth
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    migrations: u32,
    /// TCP streams that carry pages, 1 to 16
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    streams: u32,
    /// Downtime the guest may see
    #[arg(long, default_value = "300ms", value_name = "DURATION")]
    max_downtime: Span,
    /// Stay up after the checks, migrating now and then, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// How to print the report
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

impl DemoArgs {
    fn check(&self) -> Result<(), Failure> {
        if self.format.is_some() && self.backend != BackendChoice::Software {
            return Err(Failure::Usage(
                "--format needs --backend software: on KVM the kernel chooses the format".into(),
            ));
        }
        // Both refuse what the API would refuse later.
        script::spec(self)?;
        script::params(self).map(drop)
    }
}

/// Runs the demo and cleans up after it.
pub(crate) async fn run(args: DemoArgs) -> Result<(), Failure> {
    args.check()?;
    let mut stop = Stop::listen()?;
    let mut fleet = fleet::Fleet::new()?;
    let mut report = report::Report::new(&args);
    let played = tokio::select! {
        played = script::play(&args, &mut fleet, &mut report) => Ended::Script(played),
        cause = stop.wait() => Ended::Signal(cause),
    };
    match played {
        Ended::Signal(cause) => {
            out::say("interrupted; stopping everything");
            fleet.stop().await;
            return Err(Failure::Said(cause.exit_code()));
        }
        Ended::Script(Err(failure)) => {
            failure.report();
            fleet.say_trouble();
            let left = fleet.stop().await;
            if report.has_begun() {
                report.check("the demo ran to its end", false, "the error above ended it");
                report.check("nothing was left behind", left.is_empty(), left.join("; "));
                report.print(args.output)?;
            }
            // A wrong option was refused before; whatever failed here is the demo's failure.
            return Err(Failure::Said(1));
        }
        Ended::Script(Ok(())) => {}
    }
    if args.keep {
        report.print(args.output)?;
        tokio::select! {
            () = script::keep(&args, &fleet, &mut report) => {}
            cause = stop.wait() => tracing::debug!(?cause, "asked to end"),
        }
    }
    if !report.holds() {
        fleet.say_trouble();
    }
    let left = fleet.stop().await;
    report.check("nothing was left behind", left.is_empty(), left.join("; "));
    if !args.keep {
        report.print(args.output)?;
    }
    let failed = report.failed();
    if failed.is_empty() {
        return Ok(());
    }
    for line in failed {
        out::say(format!("FAILED: {line}"));
    }
    Err(Failure::Said(1))
}

enum Ended {
    Script(Result<(), Failure>),
    Signal(crate::daemon::stop::StopCause),
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    pub(super) fn args(line: &str) -> DemoArgs {
        let words = ["slat", "demo"];
        let cli = Cli::try_parse_from(words.into_iter().chain(line.split_whitespace())).unwrap();
        let Command::Demo(args) = cli.command else {
            panic!("another command");
        };
        args
    }

    #[test]
    fn options_that_cannot_work_are_refused_before_anything_starts() {
        for line in [
            "--format ept4",
            "--backend kvm --format ept4",
            "--memory 3MiB",
            "--max-downtime 0ms",
        ] {
            let failure = args(line).check().unwrap_err();
            assert_eq!(failure.exit_code(), 2, "{line}");
        }
        args("").check().unwrap();
        args("--backend software --format sv57x4 --memory 8MiB")
            .check()
            .unwrap();
    }
}
