//! The last ten minutes of the agents' counters and of the migrations' progress, in memory,
//! bounded.
//!
//! Raw counters with their times; who reads computes rates. A counter belongs to a VM *process*
//! (host, pid, epoch): after a migration a new process starts at 0, which is a new line, not a
//! fall.
//!
//! One `std` mutex, held for pushes and copies only.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use slat_proto::{
    model::{VmName, std_duration},
    v1::{self, vm::State},
};

const KEEP: Duration = Duration::from_secs(600);
const MAX_SAMPLES: usize = 1500;
const MAX_VMS: usize = 512;
const MAX_POINTS: usize = 2000;
const MAX_MIGRATIONS: usize = 40;
/// Progress of one iteration closer than this in time is one point.
const POINT_STEP_MILLIS: u64 = 50;

/// One VM's counters at one time.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    vm: String,
    process: String,
    /// The process has given the VM away: its last counters, which its migration made, are still
    /// wanted.
    left: bool,
    faults: Option<u64>,
    flush_requests: Option<u64>,
    flushes: Option<u64>,
}

impl Sample {
    /// Whether it goes on from an entry of its own process and says something new.
    fn adds_to(&self, ring: &VecDeque<Entry>) -> bool {
        let counters = |sample: &Sample| (sample.faults, sample.flush_requests, sample.flushes);
        ring.iter()
            .rev()
            .find(|entry| entry.sample.process == self.process)
            .is_some_and(|entry| counters(&entry.sample) != counters(self))
    }
}

struct Entry {
    at: u64,
    sample: Sample,
}

#[derive(Clone)]
struct Point {
    at: u64,
    iteration: u32,
    remaining: u64,
    transferred: u64,
    throughput: u64,
    dirty_rate: u64,
    /// Seconds; `None` while it is not known.
    expected_downtime: Option<f64>,
    phase: &'static str,
}

#[derive(Default)]
struct Rings {
    vms: BTreeMap<String, VecDeque<Entry>>,
    /// By name, with the time of the last point.
    migrations: BTreeMap<String, VecDeque<Point>>,
}

/// See the module.
pub(crate) struct History {
    rings: Mutex<Rings>,
}

fn now_millis() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl History {
    pub(crate) fn new() -> Self {
        Self {
            rings: Mutex::new(Rings::default()),
        }
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        // Rings are pushed to and popped from whole: no state between.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counters in a report, of processes that run their VM or did until they gave it away.
    pub(crate) fn samples_of(&self, report: &v1::ReportHostRequest) -> Vec<Sample> {
        let runs = |vm: &&v1::Vm| !matches!(vm.state(), State::Incoming | State::Lost);
        report
            .vms
            .iter()
            .filter(runs)
            .filter_map(|vm| {
                let stats = vm.mmu_stats.as_ref()?;
                let name = VmName::parse(&vm.name).ok()?;
                Some(Sample {
                    vm: name.to_string(),
                    process: format!("{} {} {}", report.host, vm.pid, vm.epoch),
                    left: vm.state() == State::Relinquished,
                    faults: stats.faults_taken,
                    flush_requests: stats.remote_tlb_flush_requests,
                    flushes: stats.remote_tlb_flushes,
                })
            })
            .collect()
    }

    /// Keeps what a host that may report has reported.
    pub(crate) fn vms(&self, host: &str, samples: Vec<Sample>) {
        self.vms_at(host, samples, now_millis());
    }

    fn vms_at(&self, host: &str, samples: Vec<Sample>, at: u64) {
        let mut rings = self.rings();
        for sample in samples {
            if !rings.vms.contains_key(&sample.vm) && rings.vms.len() >= MAX_VMS {
                tracing::debug!(%host, vm = %sample.vm, "the dashboard's history holds no more VMs");
                continue;
            }
            let ring = rings.vms.entry(sample.vm.clone()).or_default();
            if sample.left && !sample.adds_to(ring) {
                continue;
            }
            ring.push_back(Entry { at, sample });
            while ring.len() > MAX_SAMPLES {
                ring.pop_front();
            }
        }
        let oldest = at.saturating_sub(u64::try_from(KEEP.as_millis()).unwrap_or(u64::MAX));
        for ring in rings.vms.values_mut() {
            while ring.front().is_some_and(|entry| entry.at < oldest) {
                ring.pop_front();
            }
        }
        rings.vms.retain(|_, ring| !ring.is_empty());
    }

    /// Keeps a migration's progress.
    pub(crate) fn progress(&self, migration: &v1::Migration) {
        self.progress_at(migration, now_millis());
    }

    fn progress_at(&self, migration: &v1::Migration, at: u64) {
        let progress = migration.progress.clone().unwrap_or_default();
        let point = Point {
            at,
            iteration: progress.iteration,
            remaining: progress.remaining_bytes,
            transferred: progress.bytes_transferred,
            throughput: progress.throughput_bytes_per_second,
            dirty_rate: progress.dirty_rate_bytes_per_second,
            expected_downtime: progress
                .expected_downtime
                .as_ref()
                .map(|expected| std_duration(Some(expected)).as_secs_f64()),
            phase: migration.phase().as_str_name(),
        };
        let mut rings = self.rings();
        if migration.progress.is_some() {
            let ring = rings.migrations.entry(migration.name.clone()).or_default();
            match ring.back_mut() {
                Some(last)
                    if last.iteration == point.iteration
                        && last.phase == point.phase
                        && at.saturating_sub(last.at) < POINT_STEP_MILLIS => {}
                _ => ring.push_back(point),
            }
            while ring.len() > MAX_POINTS {
                ring.pop_front();
            }
        } else {
            rings.migrations.entry(migration.name.clone()).or_default();
        }
        while rings.migrations.len() > MAX_MIGRATIONS {
            let oldest = rings
                .migrations
                .iter()
                .filter(|(name, _)| **name != migration.name)
                .min_by_key(|(_, ring)| ring.back().map_or(0, |point| point.at))
                .map(|(name, _)| name.clone());
            let Some(oldest) = oldest else { break };
            rings.migrations.remove(&oldest);
        }
    }

    /// Entries younger than `since`, for the page.
    pub(crate) fn json(&self, since: u64) -> Value {
        let rings = self.rings();
        let vms: serde_json::Map<String, Value> = rings
            .vms
            .iter()
            .map(|(name, ring)| {
                let entries: Vec<Value> = ring
                    .iter()
                    .filter(|entry| entry.at > since)
                    .map(|Entry { at, sample }| {
                        json!([
                            at,
                            sample.process,
                            sample.faults,
                            sample.flush_requests,
                            sample.flushes
                        ])
                    })
                    .collect();
                (name.clone(), Value::Array(entries))
            })
            .collect();
        let migrations: serde_json::Map<String, Value> = rings
            .migrations
            .iter()
            .map(|(name, ring)| (name.clone(), points(ring, since)))
            .collect();
        json!({ "now": now_millis(), "keep_seconds": KEEP.as_secs(), "vms": vms, "migrations": migrations })
    }

    /// One migration's points.
    pub(crate) fn points(&self, migration: &str) -> Value {
        let rings = self.rings();
        rings
            .migrations
            .get(migration)
            .map_or_else(|| json!([]), |ring| points(ring, 0))
    }
}

fn points(ring: &VecDeque<Point>, since: u64) -> Value {
    ring.iter()
        .filter(|point| point.at > since)
        .map(|p| {
            json!([
                p.at,
                p.iteration,
                p.remaining,
                p.transferred,
                p.throughput,
                p.dirty_rate,
                p.expected_downtime,
                p.phase
            ])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(pid: u32, faults: u64) -> v1::ReportHostRequest {
        v1::ReportHostRequest {
            host: "hosts/a".into(),
            vms: vec![v1::Vm {
                name: "vms/web".into(),
                state: State::Running.into(),
                pid,
                mmu_stats: Some(v1::MmuStats {
                    faults_taken: Some(faults),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn samples_are_bounded_in_number_and_age_and_name_their_process() {
        let history = History::new();
        for i in 0..2000 {
            let samples = history.samples_of(&report(7, i));
            history.vms_at("hosts/a", samples, 1_000_000 + i);
        }
        let all = history.json(0);
        let web = all["vms"]["vms/web"].as_array().unwrap();
        assert_eq!(web.len(), MAX_SAMPLES);
        assert_eq!(web[0][1], "hosts/a 7 0");
        assert_eq!(web[0][2], 500);
        // Not offered is null, never 0.
        assert!(web[0][3].is_null());
        assert_eq!(history.json(1_001_998)["vms"]["vms/web"][0][2], 1999);
        history.vms_at("hosts/b", Vec::new(), 1_002_000 + 600_000);
        assert!(history.json(0)["vms"].as_object().unwrap().is_empty());
    }

    #[test]
    fn the_last_counters_of_a_process_that_gave_its_vm_away_are_kept_once() {
        let history = History::new();
        let relinquished = |faults| {
            let mut report = report(7, faults);
            report.vms[0].set_state(State::Relinquished);
            report
        };
        let len = |history: &History| {
            let all = history.json(0);
            all["vms"]["vms/web"].as_array().map_or(0, Vec::len)
        };
        history.vms_at("hosts/a", history.samples_of(&relinquished(5)), 1);
        assert_eq!(len(&history), 0, "nothing to go on from");
        history.vms_at("hosts/a", history.samples_of(&report(7, 5)), 2);
        for at in 3..6 {
            history.vms_at("hosts/a", history.samples_of(&relinquished(9)), at);
        }
        assert_eq!(len(&history), 2);
        assert_eq!(history.json(2)["vms"]["vms/web"][0][2], 9);
    }

    #[test]
    fn progress_keeps_iterations_apart_and_forgets_old_migrations() {
        let history = History::new();
        let mut migration = v1::Migration {
            name: "migrations/m".into(),
            progress: Some(v1::MigrationProgress::default()),
            ..Default::default()
        };
        for (at, iteration) in [(1, 0), (2, 0), (3, 1), (100, 1)] {
            migration.progress.as_mut().unwrap().iteration = iteration;
            history.progress_at(&migration, at);
        }
        assert_eq!(history.points("migrations/m").as_array().unwrap().len(), 3);
        for i in 0..MAX_MIGRATIONS {
            migration.name = format!("migrations/n{i}");
            history.progress_at(&migration, 1000);
        }
        assert!(
            history
                .points("migrations/m")
                .as_array()
                .unwrap()
                .is_empty()
        );
    }
}
