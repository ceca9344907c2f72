//! `slat demo`: a fleet of one server and two agents that exists only for this run, one VM, and
//! migrations that are checked by the guest itself and by memory digests.
//!
//! * [`fleet`] is all of its daemons and their orderly end, [`sweep`] what a
//!   disorderly end leaves.
//! * [`script`] is what happens, [`keep`] what happens after it with `--keep`, [`observer`] what is
//!   counted meanwhile, [`report`] what is said about it.
//!
//! The fleet is owned here, outside the script: whatever ends the script (its end, an error,
//! Ctrl-C, SIGTERM), the fleet is then stopped the same way. When this process is killed, its
//! daemons and the VM's process notice and end themselves (`--die-with`); only the temporary
//! directory stays then.

pub(crate) mod args;
mod fleet;
mod keep;
mod observer;
mod report;
mod script;
mod sweep;

use args::DemoArgs;

use crate::{command::create::BackendChoice, daemon::stop::Stop, failure::Failure, term::out};

/// Refuses what the API would refuse later.
fn check(args: &DemoArgs) -> Result<(), Failure> {
    if args.format.is_some() && args.backend != BackendChoice::Software {
        return Err(Failure::Usage(
            "--format needs --backend software: on KVM the kernel chooses the format".into(),
        ));
    }
    script::spec(args)?;
    script::params(args).map(drop)
}

/// Runs the demo and cleans up after it.
pub(crate) async fn run(args: DemoArgs) -> Result<(), Failure> {
    check(&args)?;
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
            out::report(&failure);
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
            () = keep::keep(&args, &fleet, &mut report) => {}
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
    use super::{args::parsed, *};

    #[test]
    fn options_that_cannot_work_are_refused_before_anything_starts() {
        for line in [
            "--format ept4",
            "--backend kvm --format ept4",
            "--memory 3MiB",
            "--max-downtime 0ms",
        ] {
            let failure = check(&parsed(line)).unwrap_err();
            assert_eq!(failure.exit_code(), 2, "{line}");
        }
        check(&parsed("")).unwrap();
        check(&parsed("--backend software --format sv57x4 --memory 8MiB")).unwrap();
    }
}
