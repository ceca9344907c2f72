//! The last ten minutes of every VM's and host's counters and of the migrations' progress, in
//! memory, bounded; and which of them were busiest.
//!
//! Samples are kept of all, so that the busiest can be found among all; only the busiest leave
//! this module. A VM is its uid. Its counters belong to a *process* (host, pid, epoch): after a
//! migration a new process starts at 0, which is a new run of the same line, not a fall. A host's
//! counters are the growth of its VMs' since the server started.
//!
//! # Bounds
//! [`MAX_VMS`] VMs and [`MAX_HOSTS`] hosts; [`BUDGET`] samples over all VMs, about 20 MB. The more
//! VMs there are, the coarser is each one's line: 2,000 VMs have a sample every three seconds.
//!
//! # Locking
//! One `std` mutex, held for pushes, for ranking (a pass over all samples: a few milliseconds with
//! 2,000 VMs) and for copies of the few that are shown. Never across `.await`.

mod progress;
mod rate;
mod rates;
mod ring;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use slat_proto::{
    model::VmName,
    v1::{self, vm::State},
};

pub(crate) use self::rate::Rate;

use self::{
    progress::Progress,
    rates::Grid,
    ring::{ABSENT, COUNTERS, Ring, Sample},
};

/// What is kept.
pub(crate) const KEEP: Duration = Duration::from_secs(600);
const MAX_VMS: usize = 10_000;
const MAX_HOSTS: usize = 1_000;
/// Samples over all VMs.
const BUDGET: usize = 400_000;
/// Samples of one line: never fewer, never more.
const LINE: std::ops::RangeInclusive<usize> = 40..=1200;
/// Points of a line that is shown.
const POINTS: u64 = 120;
/// Points are never closer than this, milliseconds.
const FINEST: u64 = 1000;
/// "Now", in tables: the rate over this time, milliseconds.
const CURRENT: u64 = 10_000;
/// Samples farther apart than this are a gap, milliseconds; farther when reports or samples are.
const GAP: u64 = 5000;

/// One VM's counters at one time.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    uid: String,
    name: String,
    process: String,
    /// The process has given the VM away: its last counters, which its migration made, are still
    /// wanted.
    left: bool,
    counters: [Option<u64>; COUNTERS - 1],
}

/// What the busiest are asked of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    Vms,
    Hosts,
}

/// Which busiest are asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) of: Of,
    pub(crate) rate: Rate,
    /// The time up to now over which they are compared and shown.
    pub(crate) window: Duration,
    /// At most this many.
    pub(crate) top: usize,
}

/// What is shown of the busiest.
#[derive(Debug)]
pub(crate) struct Busiest {
    /// Beginning of the first point's step, milliseconds since 1970.
    pub(crate) start: u64,
    /// Length of a step, milliseconds.
    pub(crate) step: u64,
    /// The busiest first.
    pub(crate) lines: Vec<Line>,
    /// Lines that match the query and offer the counter.
    pub(crate) total: usize,
    /// The mean rate of those that are not among `lines`, together.
    pub(crate) rest: f64,
    /// VMs that the history has no place for.
    pub(crate) left_out: usize,
}

/// One of the busiest.
#[derive(Debug)]
pub(crate) struct Line {
    /// The VM's uid, or the host's name.
    pub(crate) key: String,
    /// `vms/{vm}` or `hosts/{host}`.
    pub(crate) name: String,
    /// The host of its last report.
    pub(crate) host: String,
    /// Mean rate a second over the window.
    pub(crate) mean: f64,
    /// Rate a second over the last ten seconds.
    pub(crate) now: Option<f64>,
    /// Rate a second in each step.
    pub(crate) values: Vec<Option<f64>>,
}

/// Rates over the last ten seconds, in the order of [`Rate`].
pub(crate) type Rates = [Option<f64>; COUNTERS];

/// Faults of a watched VM that its pager was told of. They begin again at 0 with each pager: what
/// grew across that is left out.
fn paged(paging: &v1::PagingStatus) -> u64 {
    paging
        .faults_missing
        .saturating_add(paging.faults_minor)
        .saturating_add(paging.faults_write_protect)
}

#[derive(Default)]
struct Series {
    name: String,
    host: String,
    ring: Ring,
    /// Bytes its migrations sent.
    sent: u64,
}

impl Series {
    /// Takes a VM's reading and adds its growth to `grown`, which is its host's.
    fn take(
        &mut self,
        host: &str,
        reading: Reading,
        at: u64,
        (cap, step): (usize, u64),
        grown: &mut [Option<u64>; COUNTERS],
    ) {
        let run = self.ring.run(&reading.process);
        let mut counters = [ABSENT; COUNTERS];
        for (counter, read) in counters.iter_mut().zip(reading.counters) {
            *counter = read.unwrap_or(ABSENT);
        }
        counters[Rate::Sent as usize] = self.sent;
        let before = self.ring.last_of(run);
        if reading.left && before.is_none_or(|before| before.counters == counters) {
            return;
        }
        for (index, grown) in grown.iter_mut().enumerate() {
            if counters[index] == ABSENT {
                continue;
            }
            let before = before.map_or(ABSENT, |before| before.counters[index]);
            let growth = if before == ABSENT {
                0
            } else {
                counters[index].saturating_sub(before)
            };
            *grown = Some(grown.unwrap_or(0).saturating_add(growth));
        }
        self.ring.push(Sample { at, run, counters }, cap, step);
        self.name = reading.name;
        // What a source says when it has left does not bring its VM back.
        if !reading.left {
            host.clone_into(&mut self.host);
        }
    }
}

#[derive(Default)]
struct HostSeries {
    series: Series,
    totals: [u64; COUNTERS],
}

#[derive(Default)]
struct Kept {
    /// By uid.
    vms: HashMap<String, Series>,
    /// By name.
    hosts: BTreeMap<String, HostSeries>,
    progress: Progress,
    /// When old samples were last dropped.
    swept: u64,
    /// VMs that had no place since then, and in the second before.
    refused: usize,
    left_out: usize,
}

impl Kept {
    /// Drops what is too old, once a second.
    fn sweep(&mut self, at: u64) {
        if at.saturating_sub(self.swept) < 1000 {
            return;
        }
        self.swept = at;
        self.left_out = std::mem::take(&mut self.refused);
        let oldest = at.saturating_sub(keep_millis());
        self.vms.retain(|_, series| !series.ring.expire(oldest));
        self.hosts
            .retain(|_, host| !host.series.ring.expire(oldest));
    }
}

/// See the module.
pub(crate) struct History {
    kept: Mutex<Kept>,
    /// Between two reports of a host, milliseconds.
    interval: u64,
}

pub(crate) fn now_millis() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn keep_millis() -> u64 {
    u64::try_from(KEEP.as_millis()).unwrap_or(u64::MAX)
}

/// How many samples a line may have when there are `lines`, and how far apart they are then.
fn resolution(lines: usize) -> (usize, u64) {
    let cap = (BUDGET / lines.max(1)).clamp(*LINE.start(), *LINE.end());
    (cap, keep_millis() / u64::try_from(cap).unwrap_or(1))
}

impl History {
    /// `interval`: between two reports of a host.
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            kept: Mutex::default(),
            interval: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Rings are pushed to and popped from whole: no state between.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gap(&self, step: u64) -> u64 {
        GAP.max(self.interval.saturating_mul(4)).max(step * 3)
    }

    /// The counters in a report, of processes that run their VM or did until they gave it away.
    pub(crate) fn samples_of(&self, report: &v1::ReportHostRequest) -> Vec<Reading> {
        let runs = |vm: &&v1::Vm| !matches!(vm.state(), State::Incoming | State::Lost);
        report
            .vms
            .iter()
            .filter(runs)
            .filter_map(|vm| {
                let name = VmName::parse(&vm.name).ok()?.to_string();
                let stats = vm.mmu_stats.as_ref();
                let counter = |of: fn(&v1::MmuStats) -> Option<u64>| stats.and_then(of);
                Some(Reading {
                    uid: if vm.uid.is_empty() {
                        name.clone()
                    } else {
                        vm.uid.clone()
                    },
                    name,
                    process: format!("{} {} {}", report.host, vm.pid, vm.epoch),
                    left: vm.state() == State::Relinquished,
                    counters: [
                        counter(|stats| stats.faults_taken),
                        counter(|stats| stats.remote_tlb_flush_requests),
                        counter(|stats| stats.remote_tlb_flushes),
                        vm.paging.as_ref().map(paged),
                    ],
                })
            })
            .collect()
    }

    /// Keeps what a host that may report has reported.
    pub(crate) fn vms(&self, host: &str, readings: Vec<Reading>) {
        self.vms_at(host, readings, now_millis());
    }

    fn vms_at(&self, host: &str, readings: Vec<Reading>, at: u64) {
        let mut kept = self.kept();
        let kept = &mut *kept;
        let resolution = resolution(kept.vms.len());
        let mut grown = [None; COUNTERS];
        for reading in readings {
            if !kept.vms.contains_key(&reading.uid) && kept.vms.len() >= MAX_VMS {
                kept.refused += 1;
                continue;
            }
            let series = kept.vms.entry(reading.uid.clone()).or_default();
            series.take(host, reading, at, resolution, &mut grown);
        }
        if kept.hosts.len() < MAX_HOSTS || kept.hosts.contains_key(host) {
            let entry = kept
                .hosts
                .entry(host.to_owned())
                .or_insert_with(|| HostSeries {
                    series: Series {
                        name: host.to_owned(),
                        host: host.to_owned(),
                        ..Series::default()
                    },
                    totals: [ABSENT; COUNTERS],
                });
            for (total, grown) in entry.totals.iter_mut().zip(grown) {
                if let Some(grown) = grown {
                    let before = if *total == ABSENT { 0 } else { *total };
                    *total = before.saturating_add(grown);
                }
            }
            entry.totals[Rate::Sent as usize] = entry.series.sent;
            let sample = Sample {
                at,
                run: 0,
                counters: entry.totals,
            };
            let (cap, step) = (*LINE.end(), FINEST / 2);
            entry.series.ring.push(sample, cap, step);
        }
        kept.sweep(at);
    }

    /// Keeps a migration's progress.
    pub(crate) fn progress(&self, migration: &v1::Migration) {
        self.progress_at(migration, now_millis());
    }

    fn progress_at(&self, migration: &v1::Migration, at: u64) {
        let mut kept = self.kept();
        let kept = &mut *kept;
        let sent = kept.progress.keep(migration, at);
        if sent == 0 {
            return;
        }
        let found = if migration.vm_uid.is_empty() {
            kept.vms
                .values_mut()
                .find(|series| series.name == migration.vm)
        } else {
            kept.vms.get_mut(&migration.vm_uid)
        };
        if let Some(series) = found {
            series.sent = series.sent.saturating_add(sent);
        }
        if let Some(host) = kept.hosts.get_mut(&migration.source) {
            host.series.sent = host.series.sent.saturating_add(sent);
        }
    }

    /// One migration's points.
    pub(crate) fn points(&self, migration: &str) -> Value {
        self.kept().progress.json(migration)
    }

    /// For how long a running migration has sent nothing, seconds.
    pub(crate) fn still_for(&self, migration: &str) -> Option<f64> {
        let moved = self.kept().progress.moved(migration)?;
        let still = now_millis().saturating_sub(moved);
        Some(Duration::from_millis(still).as_secs_f64())
    }

    /// Present rates of every VM (by uid) and host (by name).
    pub(crate) fn current(&self) -> HashMap<String, Rates> {
        let now = now_millis();
        let kept = self.kept();
        let (_, step) = resolution(kept.vms.len());
        let (window, gap) = (CURRENT.max(step * 2), self.gap(step));
        let rates =
            |ring: &Ring| Rate::ALL.map(|rate| rates::current(ring, rate, now, window, gap));
        let vms = kept
            .vms
            .iter()
            .map(|(uid, series)| (uid.clone(), rates(&series.ring)));
        let hosts = kept
            .hosts
            .iter()
            .map(|(name, host)| (name.clone(), rates(&host.series.ring)));
        vms.chain(hosts).collect()
    }

    /// The busiest VMs or hosts, among those whose key, name and host `wanted` says.
    pub(crate) fn busiest(
        &self,
        asked: &Asked,
        wanted: impl Fn(&str, &str, &str) -> bool,
    ) -> Busiest {
        self.busiest_at(asked, wanted, now_millis())
    }

    fn busiest_at(
        &self,
        asked: &Asked,
        wanted: impl Fn(&str, &str, &str) -> bool,
        now: u64,
    ) -> Busiest {
        let kept = self.kept();
        let all: Vec<(&str, &Series)> = match asked.of {
            Of::Vms => kept
                .vms
                .iter()
                .map(|(uid, vm)| (uid.as_str(), vm))
                .collect(),
            Of::Hosts => kept
                .hosts
                .iter()
                .map(|(name, host)| (name.as_str(), &host.series))
                .collect(),
        };
        // A young server's charts begin where its samples do.
        let window = u64::try_from(asked.window.min(KEEP).as_millis()).unwrap_or(u64::MAX);
        let first = all
            .iter()
            .filter_map(|(_, series)| series.ring.samples().front())
            .map(|sample| sample.at)
            .min()
            .unwrap_or(now);
        let start = now
            .saturating_sub(window)
            .max(first.min(now - now.min(FINEST)));
        let step = (now.saturating_sub(start) / POINTS).max(FINEST);
        let len = usize::try_from(now.saturating_sub(start).div_ceil(step)).unwrap_or(0);
        let (_, thinned) = resolution(kept.vms.len());
        let gap = self.gap(thinned.max(step));
        let mut ranked: Vec<(f64, &str, &Series)> = all
            .into_iter()
            .filter(|(key, series)| wanted(key, &series.name, &series.host))
            .filter_map(|(key, series)| {
                let mean = rates::mean(&series.ring, asked.rate, start, now - start, gap)?;
                Some((mean, key, series))
            })
            .collect();
        ranked.sort_by(|(a, a_key, a_line), (b, b_key, b_line)| {
            b.total_cmp(a)
                .then_with(|| a_line.name.cmp(&b_line.name))
                .then_with(|| a_key.cmp(b_key))
        });
        let total = ranked.len();
        let (shown, rest) = ranked.split_at(total.min(asked.top));
        let grid = Grid {
            start,
            step,
            len,
            gap,
        };
        let current = CURRENT.max(thinned * 2);
        Busiest {
            start,
            step,
            lines: shown
                .iter()
                .map(|(mean, key, series)| Line {
                    key: (*key).to_owned(),
                    name: series.name.clone(),
                    host: series.host.clone(),
                    mean: *mean,
                    now: rates::current(&series.ring, asked.rate, now, current, gap),
                    values: rates::on_grid(&series.ring, asked.rate, grid),
                })
                .collect(),
            total,
            rest: rest.iter().map(|(mean, _, _)| mean).sum(),
            left_out: kept.left_out,
        }
    }
}

#[cfg(test)]
mod tests;
