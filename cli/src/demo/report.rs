//! What the demo found out: figures of each migration, the guest's own count, the checks and
//! whether they held.

use std::time::Duration;

use serde::Serialize;
use slat_proto::{
    model::{PAGE_SIZE, std_duration},
    v1,
};

use super::{
    args::{DemoArgs, Output},
    observer::Sums,
};
use crate::{
    failure::Failure,
    term::{
        out,
        table::{Cell, Table, Tone},
        units::{Rate, Size, Span},
    },
    view,
};

/// The report as programs read it. Null is what the backend cannot know.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Facts {
    backend: Option<String>,
    arch: Option<String>,
    format: Option<String>,
    memory_bytes: u64,
    vcpus: u32,
    streams: u32,
    /// How every endpoint of this fleet is protected.
    endpoints: &'static str,
    /// How pages travelled: each way that was seen.
    pages: Vec<String>,
    migrations: Vec<Row>,
    guest: Option<Guest>,
    digest_match: Option<bool>,
    mmu: Mmu,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    source: String,
    destination: String,
    result: String,
    /// Counted as everywhere: the first and the paused one included.
    iterations: u32,
    total_time_seconds: f64,
    downtime_seconds: Option<f64>,
    bytes_transferred: u64,
    pages_normal: u64,
    pages_zero: u64,
    throughput_bytes_per_second: Option<u64>,
    dirty_rate_bytes_per_second: Option<u64>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Guest {
    passes: u64,
    pages_written: u64,
    errors: u64,
    #[serde(skip)]
    pages: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Mmu {
    remote_tlb_flush_requests: Option<u64>,
    remote_tlb_flushes: Option<u64>,
    faults: Option<u64>,
}

/// One check and how it went.
#[derive(Clone, Debug)]
struct Check {
    name: String,
    held: bool,
    detail: String,
}

/// Facts and checks, as they come in.
#[derive(Clone, Debug)]
pub(super) struct Report {
    facts: Facts,
    verified: Vec<&'static str>,
    backend_message: String,
    checks: Vec<Check>,
}

impl Report {
    /// Of a run with these options; nothing found yet.
    pub(super) fn new(args: &DemoArgs) -> Self {
        Self {
            facts: Facts {
                backend: None,
                arch: None,
                format: None,
                memory_bytes: args.memory.0,
                vcpus: args.vcpus,
                streams: args.streams,
                endpoints: "TLS 1.3, certificates of a CA made for this run",
                pages: Vec::new(),
                migrations: Vec::new(),
                guest: None,
                digest_match: None,
                mmu: Mmu::default(),
            },
            verified: Vec::new(),
            backend_message: String::new(),
            checks: Vec::new(),
        }
    }

    /// Whether there is a VM to report on.
    pub(super) fn has_begun(&self) -> bool {
        self.facts.backend.is_some()
    }

    /// What the VM turned out to be, on which host.
    pub(super) fn built(&mut self, vm: &v1::Vm, host: &v1::Host) {
        let spec = vm.spec.clone().unwrap_or_default();
        let backend = match spec.backend() {
            v1::Backend::Software => "software",
            v1::Backend::Kvm | v1::Backend::Unspecified => "kvm",
        };
        self.facts.backend = Some(backend.to_owned());
        self.facts.arch = Some(host.arch.clone()).filter(|arch| !arch.is_empty());
        // The kernel does not say which format it chose.
        self.facts.format = view::format(&spec);
        self.facts.memory_bytes = spec.memory_bytes;
        self.facts.vcpus = spec.vcpus;
        self.backend_message = host.backend_message.clone();
    }

    /// A migration that has ended.
    pub(super) fn migrated(&mut self, migration: &v1::Migration) {
        let progress = migration.progress.clone().unwrap_or_default();
        self.verified
            .push(view::verification(progress.verification()));
        if let Some(params) = &migration.params {
            self.facts.streams = params.streams;
        }
        let path = view::page_path(&progress);
        if !path.is_empty() && !self.facts.pages.contains(&path) {
            self.facts.pages.push(path);
        }
        self.facts.migrations.push(Row {
            name: view::id(&migration.name).to_owned(),
            source: view::id(&migration.source).to_owned(),
            destination: view::id(&migration.destination).to_owned(),
            result: view::phase(migration.phase()).to_owned(),
            iterations: view::iterations(&progress).unwrap_or(0),
            total_time_seconds: std_duration(migration.total_time.as_ref()).as_secs_f64(),
            downtime_seconds: progress
                .downtime
                .as_ref()
                .map(|downtime| std_duration(Some(downtime)).as_secs_f64()),
            bytes_transferred: progress.bytes_transferred,
            pages_normal: progress.pages_normal,
            pages_zero: progress.pages_zero,
            throughput_bytes_per_second: throughput(&progress),
            dirty_rate_bytes_per_second: dirty_rate(&progress),
        });
    }

    /// What the guest counted last.
    pub(super) fn guest(&mut self, counters: &v1::GuestCounters) {
        self.facts.guest = Some(Guest {
            passes: counters.passes,
            pages_written: counters.pages_written,
            errors: counters.errors,
            pages: counters.pages,
        });
    }

    /// Whether all digests that were compared are equal.
    pub(super) fn digests(&mut self, equal: bool) {
        let every = self.verified.iter().all(|word| *word == "MATCH");
        self.facts.digest_match = Some(equal && every);
    }

    /// Second-stage counters over the VM's life.
    pub(super) fn mmu(&mut self, sums: Sums) {
        self.facts.mmu = Mmu {
            remote_tlb_flush_requests: sums.requests,
            remote_tlb_flushes: sums.flushes,
            faults: sums.faults,
        };
    }

    /// Notes a check; `detail` is shown when it did not hold.
    pub(super) fn check(&mut self, name: impl Into<String>, held: bool, detail: impl Into<String>) {
        self.checks.push(Check {
            name: name.into(),
            held,
            detail: detail.into(),
        });
    }

    /// Whether every check so far held.
    pub(super) fn holds(&self) -> bool {
        self.checks.iter().all(|check| check.held)
    }

    /// Those that did not hold, a line each.
    pub(super) fn failed(&self) -> Vec<String> {
        self.checks
            .iter()
            .filter(|check| !check.held)
            .map(|check| match check.detail.as_str() {
                "" => check.name.clone(),
                detail => format!("{}: {detail}", check.name),
            })
            .collect()
    }

    /// Prints it on standard output.
    pub(super) fn print(&self, output: Output) -> Result<(), Failure> {
        match output {
            Output::Json => out::line(self.json()?),
            Output::Text => out::line(self.text(out::stdout_colours())),
        }
    }

    fn json(&self) -> Result<String, Failure> {
        serde_json::to_string_pretty(&self.facts)
            .map_err(|error| Failure::local(format!("the report makes no JSON: {error}")))
    }

    fn text(&self, colours: bool) -> String {
        let facts = &self.facts;
        let backend = facts.backend.as_deref().unwrap_or("no backend");
        let format = facts
            .format
            .as_ref()
            .map_or_else(String::new, |format| format!(" ({format} tables)"));
        let mut text = format!(
            "\nbackend  {backend}{format} on {}, {}, {} vCPU, {} streams\n",
            facts.arch.as_deref().unwrap_or("an unknown architecture"),
            Size(facts.memory_bytes),
            facts.vcpus,
            facts.streams,
        );
        if !self.backend_message.is_empty() {
            text.push_str(&format!("         {}\n", self.backend_message));
        }
        text.push('\n');
        let heads = [
            "MIGRATION",
            "FROM",
            "TO",
            "RESULT",
            "MEMORY",
            "DOWNTIME",
            "TOTAL",
            "ITERATIONS",
            "SENT",
            "THROUGHPUT",
            "DIRTIED",
        ];
        let rows: Vec<Vec<Cell>> = facts
            .migrations
            .iter()
            .zip(&self.verified)
            .map(|(row, verified)| table_row(row, verified))
            .collect();
        text.push_str(&Table::new(&heads, colours).render(&rows));
        text.push_str("\n\n");
        if let Some(guest) = &facts.guest {
            text.push_str(&format!("guest    {}\n", guest_words(guest)));
        }
        let known = |value: Option<u64>| {
            value.map_or_else(|| "not known".to_owned(), |value| value.to_string())
        };
        text.push_str(&format!(
            "mmu      faults {}, remote TLB flush requests {}, remote TLB flushes {}\n",
            known(facts.mmu.faults),
            known(facts.mmu.remote_tlb_flush_requests),
            known(facts.mmu.remote_tlb_flushes),
        ));
        text.push_str(&format!("tls      endpoints: {}\n", facts.endpoints));
        for pages in &facts.pages {
            text.push_str(&format!("         pages: {pages}\n"));
        }
        text.push_str(&format!("verdict  {}", self.verdict()));
        text
    }

    fn verdict(&self) -> String {
        let failed = self.failed();
        if failed.is_empty() {
            return format!("all {} checks held", self.checks.len());
        }
        format!("{} of {} checks FAILED", failed.len(), self.checks.len())
    }
}

/// How far the guest came, and what it found.
fn guest_words(guest: &Guest) -> String {
    let rounds = match guest.passes {
        0 => {
            let share = guest.pages_written.saturating_mul(100);
            let share = share.checked_div(guest.pages).unwrap_or(0);
            format!("its first round not finished ({share} % of its memory)")
        }
        1 => "1 whole round over its memory".to_owned(),
        rounds => format!("{rounds} whole rounds over its memory"),
    };
    format!(
        "{rounds}, {} page writes, {} errors",
        guest.pages_written, guest.errors
    )
}

fn table_row(row: &Row, verified: &str) -> Vec<Cell> {
    let tone = |good: bool| if good { Tone::Good } else { Tone::Bad };
    let seconds =
        |seconds: f64| Span(Duration::try_from_secs_f64(seconds).unwrap_or_default()).to_string();
    let rate =
        |rate: Option<u64>| rate.map_or_else(|| "-".to_owned(), |rate| Rate(rate).to_string());
    vec![
        row.name.as_str().into(),
        row.source.as_str().into(),
        row.destination.as_str().into(),
        Cell::toned(row.result.as_str(), tone(row.result == "COMPLETED")),
        Cell::toned(verified, tone(verified == "MATCH")),
        row.downtime_seconds
            .map_or_else(|| "-".to_owned(), seconds)
            .into(),
        seconds(row.total_time_seconds).into(),
        row.iterations.to_string().into(),
        Size(row.bytes_transferred).to_string().into(),
        rate(row.throughput_bytes_per_second).into(),
        rate(row.dirty_rate_bytes_per_second).into(),
    ]
}

/// Bytes over the time of all iterations.
fn throughput(progress: &v1::MigrationProgress) -> Option<u64> {
    let time = progress
        .iterations
        .iter()
        .map(|iteration| std_duration(iteration.duration.as_ref()))
        .sum();
    view::per_second(progress.bytes_transferred, time)
}

/// What the guest dirtied while it ran during the migration, over the time of those iterations.
fn dirty_rate(progress: &v1::MigrationProgress) -> Option<u64> {
    let live = || progress.iterations.iter().filter(|one| !one.r#final);
    let pages: u64 = live().map(|one| one.dirty_pages).sum();
    let time = live().map(|one| std_duration(one.duration.as_ref())).sum();
    view::per_second(pages.saturating_mul(PAGE_SIZE), time)
}

#[cfg(test)]
mod tests {
    use slat_proto::model::proto_duration;

    use super::{super::args::parsed, *};

    fn migration(name: &str, verification: v1::Verification) -> v1::Migration {
        let iteration = |iteration, millis, bytes, dirty_pages, last| v1::MigrationIteration {
            iteration,
            bytes_transferred: bytes,
            duration: Some(proto_duration(Duration::from_millis(millis))),
            dirty_pages,
            r#final: last,
            ..Default::default()
        };
        v1::Migration {
            name: format!("migrations/{name}"),
            source: "hosts/host-a".into(),
            destination: "hosts/host-b".into(),
            phase: v1::MigrationPhase::Completed.into(),
            total_time: Some(proto_duration(Duration::from_millis(1500))),
            progress: Some(v1::MigrationProgress {
                bytes_transferred: 300 << 20,
                pages_normal: 70_000,
                pages_zero: 5,
                downtime: Some(proto_duration(Duration::from_micros(12_500))),
                verification: verification.into(),
                iterations: vec![
                    iteration(0, 900, 290 << 20, 2048, false),
                    iteration(1, 100, 10 << 20, 0, true),
                ],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn report() -> Report {
        let mut report = Report::new(&parsed("--streams 3"));
        let spec = v1::VmSpec {
            memory_bytes: 256 << 20,
            vcpus: 2,
            backend: v1::Backend::Kvm.into(),
            ..Default::default()
        };
        let vm = v1::Vm {
            spec: Some(spec),
            ..Default::default()
        };
        let host = v1::Host {
            arch: "x86_64".into(),
            ..Default::default()
        };
        report.built(&vm, &host);
        report.migrated(&migration("live-1", v1::Verification::Match));
        report
    }

    #[test]
    fn the_json_is_the_documented_object() {
        let mut report = report();
        report.guest(&v1::GuestCounters {
            passes: 9,
            pages_written: 1000,
            ..Default::default()
        });
        report.digests(true);
        report.mmu(Sums {
            faults: Some(7),
            ..Sums::default()
        });
        let expected = serde_json::json!({
            "backend": "kvm",
            "arch": "x86_64",
            "format": null,
            "memory_bytes": 268_435_456,
            "vcpus": 2,
            "streams": 3,
            "endpoints": "TLS 1.3, certificates of a CA made for this run",
            "pages": [],
            "migrations": [{
                "name": "live-1",
                "source": "host-a",
                "destination": "host-b",
                "result": "COMPLETED",
                "iterations": 2,
                "total_time_seconds": 1.5,
                "downtime_seconds": 0.0125,
                "bytes_transferred": 314_572_800,
                "pages_normal": 70_000,
                "pages_zero": 5,
                "throughput_bytes_per_second": 314_572_800,
                "dirty_rate_bytes_per_second": 9_320_675,
            }],
            "guest": {"passes": 9, "pages_written": 1000, "errors": 0},
            "digest_match": true,
            "mmu": {"remote_tlb_flush_requests": null, "remote_tlb_flushes": null, "faults": 7},
        });
        let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(json, expected);
    }

    #[test]
    fn digests_match_only_when_every_comparison_did() {
        let mut report = report();
        report.digests(false);
        assert_eq!(report.facts.digest_match, Some(false));
        report.migrated(&migration("live-2", v1::Verification::Mismatch));
        report.digests(true);
        assert_eq!(report.facts.digest_match, Some(false));
    }

    #[test]
    fn a_check_that_failed_is_said() {
        let mut report = report();
        report.check("guest errors are 0", true, "0");
        assert!(report.text(false).contains("all 1 checks held"));
        report.check("live-1 verified", false, "MISMATCH");
        assert!(report.text(false).contains("1 of 2 checks FAILED"));
        assert_eq!(report.failed(), ["live-1 verified: MISMATCH"]);
        assert!(!report.holds());
    }

    #[test]
    fn the_text_has_the_figures_people_ask_for() {
        let mut report = report();
        report.backend_message = "/dev/kvm: permission denied".into();
        let text = report.text(false);
        for words in [
            "kvm on x86_64, 256 MiB, 2 vCPU, 3 streams",
            "live-1",
            "12.5 ms",
            "300 MiB/s",
            "not known",
            "permission denied",
        ] {
            assert!(text.contains(words), "{words} is not in\n{text}");
        }
    }
}
