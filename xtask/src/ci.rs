//! All checks in order: the quick ones first, then what shares clippy's artefacts, then the tests' (debug), then the demo's
//! (release). Each profile is built once. A failure does not end the run: the summary names every one.

use std::time::{Duration, Instant};

use crate::{
    crates, demo, deny, interleavings, leftovers, lint, metrics, mutations, no_std, oracles, pages,
    pitfalls, sanitize, structure, tally::Tally, test, units, workspace::Workspace,
};

type Check = (&'static str, fn(&Workspace) -> anyhow::Result<Tally>);

const CHECKS: [Check; 19] = [
    ("fmt", |workspace| lint::format(workspace, true)),
    ("structure", structure::run),
    ("deny", deny::run),
    ("metrics", metrics::run),
    ("units", units::run),
    ("pages", pages::run),
    ("pitfalls", pitfalls::run),
    ("lint", lint::clippy),
    ("doc", lint::doc),
    ("crates", crates::run),
    ("no-std", no_std::run),
    ("test", |workspace| test::run(workspace, &[])),
    ("interleavings", interleavings::run),
    ("mutations", mutations::sample),
    ("miri", sanitize::miri),
    ("tsan", sanitize::tsan),
    ("demo", |workspace| {
        demo::run(workspace, &demo::Options::default())
    }),
    ("oracles", oracles::run),
    ("leftovers", leftovers::run),
];

/// Runs them all.
///
/// # Errors
/// Never by itself: a check that cannot be made counts as failed.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let begin = Instant::now();
    let mut total = Tally::default();
    let mut rows = Vec::new();
    for (name, check) in CHECKS {
        println!("\n==> {name}");
        let start = Instant::now();
        let tally =
            check(workspace).unwrap_or_else(|error| Tally::of_faults(&[format!("{error:#}")]));
        rows.push(row(name, &tally, start.elapsed()));
        total.add(tally);
    }
    println!("\n==> summary");
    for row in rows {
        println!("{row}");
    }
    println!("{:<13} {:>6.1} s", "in all", begin.elapsed().as_secs_f64());
    Ok(total)
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
    fn a_row_says_failed_when_something_did() {
        let took = Duration::from_millis(1500);
        assert_eq!(
            row("lint", &Tally::passed(), took),
            "lint             1.5 s  ok      1 passed, 0 failed, 0 skipped"
        );
        assert!(row("lint", &Tally::failed(), took).contains("FAILED"));
    }
}
