//! All checks in order: the quick ones first, then what shares clippy's artefacts, then the tests' (debug), then the demo's
//! (release), whose binary is built beside the models. Each profile is built once. A failure does not end the run: the summary
//! names every one.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    crates, demo, deny, interleavings, leftovers, lint, metrics, no_std, oracles, pages, planted,
    riscv64, sanitize, shell, structure, tally::Tally, test, units, workspace::Workspace,
};

type Check = (&'static str, fn(&Workspace) -> anyhow::Result<Tally>);

const CHECKS: [Check; 20] = [
    ("fmt", |workspace| lint::format(workspace, true)),
    ("structure", structure::run),
    ("deny", deny::run),
    ("metrics", metrics::run),
    ("units", units::run),
    ("pages", pages::run),
    ("planted-fit", planted::check),
    ("lint", lint::clippy),
    ("doc", lint::doc),
    ("crates", crates::run),
    ("no-std", no_std::run),
    ("riscv64", riscv64::run),
    ("test", |workspace| test::run(workspace, &[])),
    ("interleavings", interleavings::run),
    ("planted", planted::sample),
    ("miri", sanitize::miri),
    ("tsan", sanitize::tsan),
    ("demo", |workspace| {
        demo::run(workspace, &demo::Options::default())
    }),
    ("oracles", oracles::run),
    ("leftovers", leftovers::run),
];

/// The check beside which the demo's binary is built: it has one thread for minutes. The demo's own build waits for what is not
/// done by then, and says what did not work.
const LEAVES_A_CORE: &str = "interleavings";

/// Runs them all.
///
/// # Errors
/// Never by itself: a check that cannot be made counts as failed.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let begin = Instant::now();
    let mut total = Tally::default();
    let mut rows = Vec::new();
    let mut beside = None;
    for (name, check) in CHECKS {
        println!("\n==> {name}");
        if name == LEAVES_A_CORE {
            beside = Beside::start(demo::build(workspace));
        }
        let start = Instant::now();
        let tally =
            check(workspace).unwrap_or_else(|error| Tally::of_faults(&[format!("{error:#}")]));
        rows.push(row(name, &tally, start.elapsed()));
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

/// A program that works ahead, silently: what it does is done again, and said, by whoever needs it.
struct Beside(Child);

impl Beside {
    fn start(mut command: Command) -> Option<Self> {
        println!("{}, meanwhile", shell::line(&command));
        let quiet = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        quiet.spawn().ok().map(Self)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Whether it succeeded is the demo's to find out.
        drop(self.0.wait());
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
    fn the_demo_is_built_ahead_of_it() {
        let at = |wanted: &str| CHECKS.iter().position(|(name, _)| *name == wanted);
        assert!(at(LEAVES_A_CORE).is_some() && at(LEAVES_A_CORE) < at("demo"));
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
