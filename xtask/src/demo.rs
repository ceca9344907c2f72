//! Runs of `slat demo`, the README's first command, with its JSON report believed only as far as it
//! can be checked.
//!
//! On KVM where it opens, and in software with every format that the binary names: briefly, but for
//! one that runs at its full size. `--full` runs every format at full size. Software always has
//! four vCPUs, on as many threads, and huge pages.

use std::{
    fs::OpenOptions,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use serde_json::Value;

use crate::{
    leftovers::{self, Scratch},
    shell,
    tally::Tally,
    workspace::Workspace,
};

/// No run here takes a quarter of this on an idle machine.
const BOUND: Duration = Duration::from_secs(300);
/// Live migrations of a brief run; the demo adds one of the paused VM, which compares digests.
const BRIEF: usize = 2;
/// Those of a run at full size.
const FULL: usize = 20;
/// What a run at full size has is what the demo has when nothing is said. A brief run's is enough
/// for its bulk iteration to take longer than the guest ever waits for its turn: pages sent twice
/// are demanded.
const MEMORY: [&str; 2] = ["128MiB", "512MiB"];
/// The format that is run at full size in any case: four levels, and a write fault sets Dirty.
const THOROUGH: &str = "sv48x4";

/// How much.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Twenty live migrations with every format, not with one only
    #[arg(long)]
    full: bool,
}

/// One run.
#[derive(Debug)]
struct Run<'a> {
    backend: &'a str,
    format: Option<&'a str>,
    memory: &'a str,
    vcpus: &'a str,
    /// Live migrations.
    live: usize,
}

/// Builds the binary that is run.
pub(crate) fn build(workspace: &Workspace) -> Command {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--quiet", "--release", "-p", "slat"]);
    build
}

/// All runs: KVM where it opens, software with every format.
///
/// # Errors
/// When the binary cannot be built, or names no formats.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    shell::run(&mut build(workspace))?;
    let target = workspace.target_dir()?;
    let formats = formats(&target)?;
    let mut tally = Tally::default();
    let kvm = Run {
        backend: "kvm",
        format: None,
        memory: MEMORY[0],
        vcpus: "2",
        live: BRIEF,
    };
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => tally.add(one(&target, &kvm)),
        Err(error) => tally.add(Tally::skipped("demo on KVM", format!("/dev/kvm: {error}"))),
    }
    if !formats.iter().any(|format| format == THOROUGH) {
        bail!("slat demo knows no format {THOROUGH}");
    }
    for format in &formats {
        let full = options.full || format == THOROUGH;
        let software = Run {
            backend: "software",
            format: Some(format),
            memory: MEMORY[usize::from(full)],
            vcpus: "4",
            live: if full { FULL } else { BRIEF },
        };
        tally.add(one(&target, &software));
    }
    Ok(tally)
}

/// The formats that the binary knows, as its help lists them.
fn formats(target: &Path) -> anyhow::Result<Vec<String>> {
    let help = shell::output(Command::new(target.join("release/slat")).args(["demo", "-h"]))?;
    formats_in(&help).context("`slat demo -h` lists no formats")
}

/// The `[possible values: a, b]` behind `--format`, in a help that breaks its lines anywhere.
fn formats_in(help: &str) -> Option<Vec<String>> {
    let words: Vec<&str> = help.split_whitespace().collect();
    let help = words.join(" ");
    let (_, own) = help.split_once(" --format <FORMAT> ")?;
    let (_, values) = own.split_once("[possible values: ")?;
    let (values, _) = values.split_once(']')?;
    Some(values.split(", ").map(str::to_owned).collect())
}

fn one(target: &Path, run: &Run<'_>) -> Tally {
    let begin = Instant::now();
    match report(target, run) {
        Ok(summary) => {
            println!("{summary} ({:.1} s)", begin.elapsed().as_secs_f64());
            Tally::passed()
        }
        Err(error) => Tally::of_faults(&[format!("demo {run:?}: {error:#}")]),
    }
}

fn report(target: &Path, run: &Run<'_>) -> anyhow::Result<String> {
    let scratch = Scratch::new("demo")?;
    // What another run left is said by the check of leftovers, once.
    let before = leftovers::processes(target);
    let mut command = Command::new(target.join("release/slat"));
    command.args(["demo", "--output", "json", "--backend", run.backend]);
    command.args(["--memory", run.memory, "--vcpus", run.vcpus]);
    command.args(["--migrations", &run.live.to_string()]);
    if let Some(format) = run.format {
        command.args(["--format", format]);
    }
    scratch.give(&mut command);
    let ended = shell::bounded(&mut command, BOUND)?;
    let parsed: anyhow::Result<Value> =
        serde_json::from_str(&ended.stdout).context("the report is not JSON");
    let faults = match &parsed {
        Ok(report) => faults(report, run),
        Err(error) => vec![format!("{error:#}")],
    };
    if !ended.status.success() || !faults.is_empty() {
        bail!(
            "{}; {}\n{}{}",
            ended.status,
            faults.join("; "),
            ended.stdout,
            ended.stderr
        );
    }
    let mut left = scratch.remains();
    let after = leftovers::processes(target).into_iter();
    left.extend(after.filter(|process| !before.contains(process)));
    if !left.is_empty() {
        bail!("left behind: {}", left.join("; "));
    }
    parsed.and_then(|report| summary(&report).ok_or_else(|| anyhow!("the report lacks figures")))
}

/// What in a report is not as it must be.
fn faults(report: &Value, run: &Run<'_>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            faults.push(what.to_owned());
        }
    };
    must(report["backend"] == run.backend, "backend is another");
    if let Some(format) = run.format {
        must(report["format"] == format, "format is another");
    }
    must(
        report["vcpus"]
            .as_u64()
            .map(|count| count.to_string())
            .as_deref()
            == Some(run.vcpus),
        "vcpus are others",
    );
    must(report["guest"]["errors"] == 0, "guest.errors is not 0");
    must(
        report["guest"]["pages_written"].as_u64() > Some(0),
        "the guest wrote nothing",
    );
    must(report["digest_match"] == true, "digest_match is not true");
    let migrations = report["migrations"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    must(
        migrations.iter().filter(|one| is_live(one)).count() == run.live,
        "not every live migration is reported",
    );
    for migration in migrations {
        let name = migration["name"].as_str().unwrap_or("a migration");
        let least = if is_live(migration) { 2 } else { 1 };
        let result = migration["result"].as_str().unwrap_or_default();
        must(
            result.eq_ignore_ascii_case("completed"),
            &format!("{name} is {result}"),
        );
        must(
            migration["iterations"].as_u64() >= Some(least),
            &format!("{name} has fewer than {least} iterations"),
        );
        must(
            !is_live(migration) || migration["downtime_seconds"].as_f64() > Some(0.0),
            &format!("{name} has no downtime"),
        );
        // Every migration has a bulk iteration and a last one; that pages went twice shows that the
        // guest wrote meanwhile.
        let pages = migration["pages_normal"].as_u64().unwrap_or(0)
            + migration["pages_zero"].as_u64().unwrap_or(0);
        let memory = report["memory_bytes"].as_u64().unwrap_or(u64::MAX) / 4096;
        must(
            !is_live(migration) || pages > memory,
            &format!("{name} sent no page again: the guest wrote nothing meanwhile"),
        );
        must(
            migration["bytes_transferred"].as_u64() > Some(0),
            &format!("{name} moved nothing"),
        );
    }
    faults
}

/// Of a running VM; the demo's last migration is of the paused one.
fn is_live(migration: &Value) -> bool {
    let name = migration["name"].as_str();
    name.is_some_and(|name| name.starts_with("live-"))
}

fn summary(report: &Value) -> Option<String> {
    let migrations = report["migrations"].as_array()?;
    let downtimes = migrations
        .iter()
        .filter(|one| is_live(one))
        .filter_map(|migration| migration["downtime_seconds"].as_f64());
    let worst = downtimes.fold(0.0, f64::max);
    Some(format!(
        "{} {}: {} migrations, longest downtime {:.1} ms, {} pages written, 0 errors, digests equal",
        report["backend"].as_str()?,
        report["format"].as_str().unwrap_or("(the kernel's tables)"),
        migrations.len(),
        worst * 1000.0,
        report["guest"]["pages_written"],
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RUN: Run<'static> = Run {
        backend: "software",
        format: Some("ept4"),
        memory: "32MiB",
        vcpus: "4",
        live: 2,
    };

    fn good() -> Value {
        let migration = |name, iterations| json!({"name": name, "result": "COMPLETED", "iterations": iterations, "downtime_seconds": 0.01, "bytes_transferred": 1, "pages_normal": 8000, "pages_zero": 200});
        json!({
            "backend": "software", "format": "ept4", "digest_match": true, "memory_bytes": 32 << 20, "vcpus": 4,
            "guest": {"errors": 0, "pages_written": 5},
            "migrations": [migration("live-1", 2), migration("live-2", 4), migration("paused", 1)],
        })
    }

    #[test]
    fn a_good_report_passes_and_each_fault_is_found() {
        assert_eq!(faults(&good(), &RUN), [""; 0]);
        for (pointer, value) in [
            ("/backend", json!("kvm")),
            ("/format", json!("sv39x4")),
            ("/digest_match", json!(null)),
            ("/vcpus", json!(1)),
            ("/guest/errors", json!(1)),
            ("/guest/pages_written", json!(0)),
            ("/migrations/1/result", json!("failed")),
            ("/migrations/0/iterations", json!(1)),
            ("/migrations/2/iterations", json!(0)),
            ("/migrations/0/downtime_seconds", json!(null)),
            ("/migrations/0/bytes_transferred", json!(0)),
            ("/migrations/0/pages_normal", json!(7992)),
            ("/migrations", json!([])),
        ] {
            let mut report = good();
            *report.pointer_mut(pointer).unwrap() = value;
            assert_eq!(faults(&report, &RUN).len(), 1, "{pointer}");
        }
        assert!(!faults(&json!({}), &RUN).is_empty());
    }

    #[test]
    fn formats_are_those_of_the_option_itself() {
        let help = "Usage: slat\n      --backend <B>  x [possible\n  values: kvm, software]\n      --format <FORMAT>  Layout; only \
                    with --backend software\n    [default: ept4] [possible values: ept4,\n     sv39x4]\n  -o [possible values: json]\n";
        assert_eq!(formats_in(help).unwrap(), ["ept4", "sv39x4"]);
        assert!(formats_in("      --keep [possible values: a]").is_none());
    }
}
