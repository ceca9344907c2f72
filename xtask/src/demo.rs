//! Brief runs of `slat demo`, the README's first command, with its JSON report believed only as far as it can be checked.

use std::{fs::OpenOptions, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use serde_json::Value;

use crate::{
    leftovers::{self, Scratch},
    shell,
    tally::Tally,
    workspace::Workspace,
};

/// No run here takes a tenth of this on an idle machine.
const BOUND: Duration = Duration::from_secs(300);
const FORMATS: [&str; 11] = [
    "ept4",
    "sv39x4",
    "sv48x4",
    "sv57x4",
    "ept5",
    "npt4",
    "npt5",
    "ept4-noad",
    "ept5-noad",
    "arm64-ipa40",
    "arm64-ipa48",
];
/// Live ones; the demo adds one of the paused VM, which compares digests.
const LIVE: usize = 2;

/// One run.
#[derive(Debug)]
struct Run<'a> {
    backend: &'a str,
    format: Option<&'a str>,
    memory: &'a str,
    vcpus: &'a str,
}

/// All runs: KVM where it opens, software with every format.
///
/// # Errors
/// When the binary cannot be built.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut build = workspace.cargo();
    build.args(["build", "--locked", "--release", "-p", "slat"]);
    shell::run(&mut build)?;
    let target = workspace.target_dir()?;
    let mut tally = Tally::default();
    let kvm = Run {
        backend: "kvm",
        format: None,
        memory: "128MiB",
        vcpus: "2",
    };
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => tally.add(one(&target, &kvm)),
        Err(error) => tally.add(Tally::skipped(format!("demo on KVM: /dev/kvm: {error}"))),
    }
    for format in FORMATS {
        let software = Run {
            backend: "software",
            format: Some(format),
            memory: "32MiB",
            vcpus: "1",
        };
        tally.add(one(&target, &software));
    }
    Ok(tally)
}

fn one(target: &Path, run: &Run<'_>) -> Tally {
    match report(target, run) {
        Ok(summary) => {
            println!("{summary}");
            Tally::passed()
        }
        Err(error) => Tally::of_faults(&[format!("demo {run:?}: {error:#}")]),
    }
}

fn report(target: &Path, run: &Run<'_>) -> anyhow::Result<String> {
    let scratch = Scratch::new("demo")?;
    let mut command = Command::new(target.join("release/slat"));
    command.args(["demo", "--output", "json", "--backend", run.backend]);
    command.args(["--memory", run.memory, "--vcpus", run.vcpus]);
    command.args(["--migrations", &LIVE.to_string()]);
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
    left.extend(leftovers::processes(target));
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
        migrations.iter().filter(|one| is_live(one)).count() == LIVE,
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
        // Every migration has a bulk pass and a last one; that pages went twice shows that the guest wrote meanwhile.
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
        vcpus: "1",
    };

    fn good() -> Value {
        let migration = |name, iterations| json!({"name": name, "result": "COMPLETED", "iterations": iterations, "downtime_seconds": 0.01, "bytes_transferred": 1, "pages_normal": 8000, "pages_zero": 200});
        json!({
            "backend": "software", "format": "ept4", "digest_match": true, "memory_bytes": 32 << 20,
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
}
