//! All checks in order: the quick ones first, then what shares clippy's artefacts, then the tests'
//! (debug), then the demo's (release), whose binary is built beside the models. Each profile is
//! built once. A failure does not end the run: the summary names every one.
//!
//! What comes last is what a slow machine may have no time for: see [`Budget`].
//!
//! There are two tiers. `--quick` is for each commit while developing: what needs no binary, no
//! model and no emulator, in a few minutes when the build is warm. All is what a change must pass.

use std::{
    process::{Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use clap::Args;

use crate::{
    budget::Budget, crates, demo, deny, interleavings, lab, leftovers, links, lint, model, no_std,
    oracles, planted, riscv64, sanitize, shell, soak, structure, tally::Tally, test, units,
    workspace::Workspace,
};

type Run = fn(&Workspace, &Budget) -> anyhow::Result<Tally>;

/// When a check runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    Always,
    /// With `--quick` only: a part of what another check does in full.
    Quick,
    Full,
    /// As [`Self::Full`], if there is time for it: seconds that it took on a slow machine. Miri's
    /// are a guess: no machine of CI had it.
    IfTime(u64),
}

const CHECKS: [(&str, Tier, Run); 23] = [
    ("fmt", Tier::Always, |it, _| lint::format(it, true)),
    ("structure", Tier::Always, |it, _| structure::run(it)),
    ("planted-fit", Tier::Always, |it, _| planted::check(it)),
    ("deny", Tier::Always, |it, _| deny::run(it)),
    ("links", Tier::Always, |it, _| links::run(it)),
    ("units", Tier::Always, |it, _| units::run(it)),
    ("lint", Tier::Always, |it, _| lint::clippy(it)),
    ("unit-tests", Tier::Quick, |it, _| test::beside_the_code(it)),
    ("doc", Tier::Full, |it, _| lint::doc(it)),
    ("crates", Tier::Full, |it, _| crates::run(it)),
    ("no-std", Tier::Full, |it, _| no_std::run(it)),
    ("riscv64", Tier::Full, |it, _| riscv64::run(it)),
    ("test", Tier::Full, |it, _| test::run(it, &[])),
    ("model", Tier::Full, |it, _| {
        model::run(it, &[]).map(|()| Tally::passed())
    }),
    ("interleavings", Tier::IfTime(340), |it, _| {
        interleavings::run(it)
    }),
    ("miri", Tier::IfTime(60), |it, _| sanitize::miri(it)),
    ("tsan", Tier::IfTime(90), |it, _| sanitize::tsan(it)),
    ("demo", Tier::Full, |it, _| {
        demo::run(it, &demo::Options::default())
    }),
    ("soak", Tier::Full, |it, _| soak::bounded(it)),
    ("oracles", Tier::IfTime(140), |it, _| oracles::run(it)),
    // These two look at the time for each of their parts.
    ("lab", Tier::Full, lab::bounded),
    ("planted", Tier::Full, planted::sample),
    ("leftovers", Tier::Always, |it, _| leftovers::run(it)),
];

/// The check beside which the demo's binary is built, and then what the lab runs on RISC-V: it has
/// one thread for minutes. The demo's own build waits for what is not done by then, and says what
/// did not work.
const LEAVES_A_CORE: &str = "interleavings";

/// The check that does what was built for it again, and is not to meet its build.
const BUILT_AHEAD: &str = "lab";

/// Which tier.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only what takes a few minutes when the build is warm: for each commit while developing
    #[arg(long)]
    quick: bool,
}

impl Tier {
    fn runs(self, quick: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Quick => quick,
            Self::Full | Self::IfTime(_) => !quick,
        }
    }
}

/// Runs those of the tier.
///
/// # Errors
/// When this program's own file is not known. A check that cannot be made counts as failed.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    let budget = Budget::begin();
    let mut total = Tally::default();
    let mut rows = Vec::new();
    let mut beside = None;
    for (name, tier, check) in CHECKS {
        if !tier.runs(options.quick) {
            continue;
        }
        println!("\n==> {name}");
        if name == LEAVES_A_CORE {
            let mut ahead = vec![demo::build(workspace)];
            // What will not be run is not built: it would take a core from all that is.
            if lab::will_fit(&budget) {
                ahead.push(lab::build_ahead()?);
            }
            beside = Some(Beside::start(ahead));
        }
        if name == BUILT_AHEAD {
            drop(beside.take());
        }
        let start = Instant::now();
        let instead = || format!("cargo xtask {name}");
        let tally = match tier {
            Tier::IfTime(secs) => budget.refuses(name, Duration::from_secs(secs), &instead()),
            _ => None,
        };
        let tally = tally.map_or_else(|| check(workspace, &budget), Ok);
        let tally = tally.unwrap_or_else(|error| Tally::of_faults(&[format!("{error:#}")]));
        let row = row(name, &tally, start.elapsed());
        println!("{row}");
        rows.push(row);
        total.add(tally);
    }
    drop(beside);
    println!("\n==> summary");
    for row in rows {
        println!("{row}");
    }
    println!("{:<13} {:>6.1} s", "in all", budget.used().as_secs_f64());
    Ok(total)
}

/// Programs that work ahead one after the other, silently: what they do is done again, and said, by
/// whoever needs it.
struct Beside(Option<JoinHandle<()>>);

impl Beside {
    fn start(commands: Vec<Command>) -> Self {
        for command in &commands {
            println!("{}, meanwhile", shell::line(command));
        }
        Self(Some(thread::spawn(move || {
            for mut command in commands {
                let quiet = command
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                // Whether it succeeded is its user's to find out.
                drop(quiet.status());
            }
        })))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if self.0.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("what was built ahead panicked; it is built again");
        }
    }
}

fn row(name: &str, tally: &Tally, took: Duration) -> String {
    let verdict = if tally.failed > 0 { "FAILED" } else { "ok" };
    format!(
        "{name:<13} {:>6.1} s  {verdict:<6}  {tally}",
        took.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_and_lab_are_built_ahead_of_them() {
        let at = |wanted: &str| CHECKS.iter().position(|(name, _, _)| *name == wanted);
        assert!(at(LEAVES_A_CORE).is_some() && at(LEAVES_A_CORE) < at("demo"));
        assert!(at(LEAVES_A_CORE) < at(BUILT_AHEAD));
    }

    #[test]
    fn both_tiers_check_the_structure_and_only_one_builds_the_binary() {
        let names = |quick: bool| -> Vec<&str> {
            let chosen = CHECKS.iter().filter(|(_, tier, _)| tier.runs(quick));
            chosen.map(|(name, _, _)| *name).collect()
        };
        for name in ["structure", "planted-fit", "lint", "leftovers"] {
            assert!(names(true).contains(&name) && names(false).contains(&name));
        }
        assert!(names(true).contains(&"unit-tests") && !names(false).contains(&"unit-tests"));
        assert!(!names(true).contains(&"demo") && names(false).contains(&"demo"));
    }

    /// A command of its own makes up for what was skipped.
    #[test]
    fn what_may_be_skipped_is_a_command() {
        let optional = CHECKS
            .iter()
            .filter(|(_, tier, _)| matches!(tier, Tier::IfTime(_)));
        for (name, _, _) in optional {
            let known = <crate::Cli as clap::CommandFactory>::command();
            assert!(known.find_subcommand(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_row_says_failed_when_something_did() {
        let took = Duration::from_millis(1500);
        assert_eq!(
            row("lint", &Tally::passed(), took),
            "lint             1.5 s  ok      1 passed, 0 failed, 0 skipped"
        );
        assert!(row("lint", &Tally::failed(), took).contains("FAILED"));
    }
}
