//! `cargo xtask oracles`: emulated hardware walks the tables that `slat-mmu` and `slat-arch` build,
//! and must answer every question as the software does. The work is `slat_tests::oracle`'s; here it
//! is built, bounded and counted.

use std::{
    fs,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::Value;

use crate::{shell, tally::Tally, workspace::Workspace};

/// The first run fetches packages; no later one takes a fifth of this.
const BOUND: Duration = Duration::from_secs(900);

/// What to ask.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only formats whose names contain this, e.g. `sv39`
    #[arg(long, default_value = "")]
    only: String,
    /// Ask the questions of an earlier run again: the number it printed
    #[arg(long, env = "SLAT_TEST_SEED")]
    seed: Option<u64>,
}

/// Runs every format's proof.
///
/// # Errors
/// When it cannot be built or leaves no report.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let seed = std::env::var("SLAT_TEST_SEED").ok();
    let seed = seed
        .map(|text| text.parse().context("SLAT_TEST_SEED"))
        .transpose()?;
    run_with(
        workspace,
        &Options {
            seed,
            ..Options::default()
        },
    )
}

/// Runs what was asked for.
///
/// # Errors
/// As for [`run`].
pub(crate) fn run_with(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--quiet"]);
    build.args(["-p", "slat-tests", "--bin", "oracles"]);
    shell::run(&mut build)?;
    let target = workspace.target_dir()?;
    let cache = target.join("oracles");
    fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let report = cache.join("report.json");
    // A report of an earlier run must not be taken for this one's.
    fs::write(&report, "null")?;
    let mut ask = Command::new(target.join("debug/oracles"));
    ask.arg("--cache").arg(&cache);
    ask.arg("--sources")
        .arg(workspace.root.join("tests/oracles"));
    ask.arg("--report").arg(&report);
    ask.args(["--only", &options.only]);
    ask.env_remove("SLAT_TEST_SEED");
    if let Some(seed) = options.seed {
        ask.args(["--seed", &seed.to_string()]);
    }
    let shown = shell::line(&ask);
    let status = wait(
        ask.stdin(Stdio::null())
            .spawn()
            .context("starting oracles")?,
        &shown,
    )?;
    summary(&report, status)
}

fn wait(mut child: Child, shown: &str) -> anyhow::Result<ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begin.elapsed() > BOUND {
            child.kill()?;
            child.wait()?;
            bail!("{shown}: killed after {} s", BOUND.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn summary(report: &Path, status: ExitStatus) -> anyhow::Result<Tally> {
    let text = fs::read_to_string(report)?;
    let rows: Value = serde_json::from_str(&text)?;
    let tally = count(&rows, |line| println!("{line}"))?;
    if !status.success() && tally.failed == 0 {
        bail!("oracles: {status}");
    }
    Ok(tally)
}

/// Says one line a format, and what they come to.
fn count(rows: &Value, mut say: impl FnMut(&str)) -> anyhow::Result<Tally> {
    let rows = rows.as_array().context("the run left no report")?;
    let mut tally = Tally::default();
    for row in rows {
        let name = row["name"].as_str().context("a row without a name")?;
        if let Some(why) = row["skipped"].as_str() {
            say(&format!("{name:<12} SKIPPED: {why}"));
            tally.add(Tally::skipped(format!("oracle {name}"), why));
            continue;
        }
        say(row["line"].as_str().context("a row without a line")?);
        tally.add(match row["failed"].as_bool() {
            Some(false) => Tally::passed(),
            _ => Tally::failed(),
        });
    }
    if rows.is_empty() {
        bail!("no format has such a name");
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_counted_as_they_came_out() {
        let rows = json!([
            {"name": "sv39x4", "line": "sv39x4 queries 1 mismatches 0", "failed": false},
            {"name": "ept4", "line": "ept4 queries 1 mismatches 1", "failed": true},
            {"name": "npt4", "skipped": "no mirror"},
        ]);
        let tally = count(&rows, |_| ()).unwrap();
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.skip_lines(), ["SKIPPED: oracle npt4: no mirror"]);
    }

    #[test]
    fn a_run_without_a_report_is_no_success() {
        assert!(count(&Value::Null, |_| ()).is_err());
        assert!(count(&json!([]), |_| ()).is_err());
        let unsaid = json!([{"name": "sv39x4", "line": "sv39x4"}]);
        assert_eq!(count(&unsaid, |_| ()).unwrap().failed, 1);
    }
}
