//! All checks in order: the quick ones first, then what shares clippy's artefacts, then the tests'
//! (debug), then the demo's (release), whose binary is built beside the models. Each profile is
//! built once. A failure does not end the run: the summary names every one.
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
    crates, demo, deny, interleavings, lab, leftovers, links, lint, model, no_std, oracles,
    planted, riscv64, sanitize, shell, soak, structure, tally::Tally, test, units,
    workspace::Workspace,
};

type Run = fn(&Workspace) -> anyhow::Result<Tally>;

/// When a check runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    Always,
    /// With `--quick` only: a part of what another check does in full.
    Quick,
    Full,
}

const CHECKS: [(&str, Tier, Run); 23] = [
    ("fmt", Tier::Always, |workspace| {
        lint::format(workspace, true)
    }),
    ("structure", Tier::Always, structure::run),
    ("planted-fit", Tier::Always, planted::check),
    ("deny", Tier::Always, deny::run),
    ("links", Tier::Always, links::run),
    ("units", Tier::Always, units::run),
    ("lint", Tier::Always, lint::clippy),
    ("unit-tests", Tier::Quick, test::beside_the_code),
    ("doc", Tier::Full, lint::doc),
    ("crates", Tier::Full, crates::run),
    ("no-std", Tier::Full, no_std::run),
    ("riscv64", Tier::Full, riscv64::run),
    ("test", Tier::Full, |workspace| test::run(workspace, &[])),
    ("model", Tier::Full, |workspace| {
        model::run(workspace, &[]).map(|()| Tally::passed())
    }),
    ("interleavings", Tier::Full, interleavings::run),
    ("planted", Tier::Full, planted::sample),
    ("miri", Tier::Full, sanitize::miri),
    ("tsan", Tier::Full, sanitize::tsan),
    ("demo", Tier::Full, |workspace| {
        demo::run(workspace, &demo::Options::default())
    }),
    ("soak", Tier::Full, soak::bounded),
    ("oracles", Tier::Full, oracles::run),
    ("lab", Tier::Full, lab::bounded),
    ("leftovers", Tier::Always, leftovers::run),
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
            Self::Full => !quick,
        }
    }
}

/// Runs those of the tier.
///
/// # Errors
/// When this program's own file is not known. A check that cannot be made counts as failed.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    let begin = Instant::now();
    let mut total = Tally::default();
    let mut rows = Vec::new();
    let mut beside = None;
    for (name, tier, check) in CHECKS {
        if !tier.runs(options.quick) {
            continue;
        }
        println!("\n==> {name}");
        if name == LEAVES_A_CORE {
            beside = Some(Beside::start(vec![
                demo::build(workspace),
                lab::build_ahead()?,
            ]));
        }
        if name == BUILT_AHEAD {
            drop(beside.take());
        }
        let start = Instant::now();
        let tally =
            check(workspace).unwrap_or_else(|error| Tally::of_faults(&[format!("{error:#}")]));
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
    println!("{:<13} {:>6.1} s", "in all", begin.elapsed().as_secs_f64());
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
