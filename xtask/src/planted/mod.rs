//! `cargo xtask planted`: plants known bugs, one at a time, and demands that a test notices each.
//!
//! The bugs are a table, `tests/planted/*.toml`: an entry has texts that are each found exactly
//! once in one file, what takes their place, and the test that must fail. A number at the head of a
//! name is the bug's row in `docs/pitfalls.md`.
//!
//! An entry that does not fit, does not compile, or whose test does not exist is a fault like a bug
//! that nobody noticed. So is a test that fails with no bug planted.

mod check;
mod choose;
mod fit;
mod table;
mod target;
mod tree;
mod verdict;

use std::time::{Duration, Instant};

use clap::Args;

use self::{table::Bug, tree::Tree};
use crate::{budget::Budget, tally::Tally, workspace::Workspace};

/// How long a slow machine may take to build what the bugs of a commit are planted in: with seven
/// bugs all of it took 560 s on one.
const UNPLANTED: Duration = Duration::from_secs(300);
/// And for one of them.
const ONE: Duration = Duration::from_secs(60);

/// Which ones, and how thoroughly.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only bugs whose names contain one of these, e.g. `27` or `loom-`; without any, all: about 17
    /// minutes on two cores
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Build nothing: check that each entry's text is found exactly once and its test exists, in
    /// milliseconds
    #[arg(long)]
    check: bool,
    /// Only bugs in files that differ from where this branch left BASE, committed or not, and
    /// entries that do
    #[arg(long, value_name = "BASE", num_args = 0..=1, default_missing_value = "main")]
    #[arg(conflicts_with_all = ["names", "check"])]
    changed: Option<String>,
    /// The few that `cargo xtask ci` plants at this commit
    #[arg(long, conflicts_with_all = ["names", "check", "changed"])]
    sample: bool,
}

/// Does as the options say.
///
/// # Errors
/// When the table cannot be read, the copy cannot be made, or a test does not build with no bug
/// planted.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    let bugs = choose::named(table::all(workspace)?, &options.names)?;
    if options.check {
        return fit_all(workspace, &bugs);
    }
    let bugs = match &options.changed {
        Some(base) => choose::changed(workspace, bugs, base)?,
        None if options.sample => choose::sample(workspace, bugs),
        None => bugs,
    };
    plant(workspace, &bugs, None)
}

/// The check of all entries that builds nothing.
///
/// # Errors
/// When the table or the workspace cannot be read.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<Tally> {
    fit_all(workspace, &table::all(workspace)?)
}

/// The few bugs of this commit, as long as there is time.
///
/// # Errors
/// As for [`run`].
pub(crate) fn sample(workspace: &Workspace, budget: &Budget) -> anyhow::Result<Tally> {
    let bugs = choose::sample(workspace, table::all(workspace)?);
    if let Some(skipped) = budget.refuses("planted", UNPLANTED, "cargo xtask planted --sample") {
        return Ok(skipped);
    }
    plant(workspace, &bugs, Some(budget))
}

fn fit_all(workspace: &Workspace, bugs: &[Bug]) -> anyhow::Result<Tally> {
    let begin = Instant::now();
    let tally = Tally::of_faults(&check::faults(workspace, bugs)?);
    let took = begin.elapsed().as_millis();
    println!("{} planted bugs looked up in {took} ms", bugs.len());
    Ok(tally)
}

fn plant(workspace: &Workspace, bugs: &[Bug], budget: Option<&Budget>) -> anyhow::Result<Tally> {
    if bugs.is_empty() {
        println!("no planted bug is touched");
        return Ok(Tally::default());
    }
    let tree = Tree::of(workspace)?;
    let begin = Instant::now();
    let mut tally = tree.unplanted(bugs)?;
    for bug in bugs {
        let instead = format!("cargo xtask planted {}", bug.name);
        let name = format!("planted {}", bug.name);
        if let Some(skipped) = budget.and_then(|it| it.refuses(&name, ONE, &instead)) {
            tally.add(skipped);
            continue;
        }
        let start = Instant::now();
        let (word, how) = match tree.catches(bug) {
            Ok(how) => {
                tally.add(Tally::passed());
                ("caught", how)
            }
            Err(error) => {
                tally.add(Tally::failed());
                ("NOT CAUGHT", format!("{error:#}"))
            }
        };
        let (name, test) = (&bug.name, &bug.target.name);
        let took = start.elapsed().as_secs_f64();
        println!("{name:<36} {word:<10} {took:>5.1} s  {test}: {how}");
    }
    println!("in all {:.0} s", begin.elapsed().as_secs_f64());
    Ok(tally)
}
