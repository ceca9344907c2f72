//! VMs, hosts and totals as JSON.

use serde_json::{Map, Value, json};
use slat_proto::{
    model::{PAGE_SIZE, std_duration},
    v1::{self, MigrationPhase as Phase},
};

use super::{
    query::{host_marks, key, moves, vm_marks, word},
    snapshot::Snapshot,
};
use crate::history::{Rate, Rates};

/// Milliseconds since 1970.
pub(super) fn millis(time: Option<&prost_types::Timestamp>) -> Option<i64> {
    time.map(|time| {
        time.seconds
            .saturating_mul(1000)
            .saturating_add(i64::from(time.nanos) / 1_000_000)
    })
}

/// Seconds; `None` where nothing is known.
pub(super) fn seconds(duration: Option<&prost_types::Duration>) -> Option<f64> {
    duration.map(|duration| std_duration(Some(duration)).as_secs_f64())
}

/// Rates with four digits, which is more than anybody reads.
pub(super) fn rounded(rate: f64) -> Value {
    if rate >= 100.0 {
        json!(rate.round())
    } else {
        json!((rate * 100.0).round() / 100.0)
    }
}

fn rates(rates: Option<&Rates>) -> Value {
    let rates = rates.copied().unwrap_or_default();
    let all: Map<String, Value> = Rate::ALL
        .into_iter()
        .map(|rate| {
            let value = rates[rate as usize].map_or(Value::Null, rounded);
            (rate.word().to_owned(), value)
        })
        .collect();
    Value::Object(all)
}

/// What the source of a VM's counters leaves out, in words.
fn not_counted(vm: &v1::Vm) -> Vec<String> {
    let gaps = vm.mmu_stats.iter().flat_map(v1::MmuStats::gaps);
    let why = vm.mmu_stats.as_ref().map(|stats| &stats.faults_uncounted);
    gaps.map(|gap| {
        let words = word(gap.as_str_name(), "COUNTER_GAP_")
            .to_lowercase()
            .replace('_', " ");
        match why.filter(|why| gap == v1::CounterGap::Faults && !why.is_empty()) {
            Some(why) => format!("{words} ({why})"),
            None => words,
        }
    })
    .collect()
}

/// What a VM's memory is made of: what was asked for, bytes by the size of their pages (null where
/// nobody counts them), and why not all of them are as large as that may give.
fn backing(vm: &v1::Vm) -> Value {
    let asked = vm.spec.as_ref().map(v1::VmSpec::backing);
    let stats = vm.mmu_stats.as_ref();
    json!({
        "asked": match asked.unwrap_or_default() {
            v1::MemoryBacking::Unspecified => "AUTO",
            asked => word(asked.as_str_name(), "MEMORY_BACKING_"),
        },
        "bytes_1g": stats.and_then(|stats| stats.backing_1g_bytes),
        "bytes_2m": stats.and_then(|stats| stats.backing_2m_bytes),
        "bytes_4k": stats.and_then(|stats| stats.backing_4k_bytes),
        "shortfall": vm.backing_shortfall,
    })
}

/// Of a VM whose memory is watched: how that stands, what is mapped, and who waits; null while the
/// kernel pages it alone.
fn paging(vm: &v1::Vm) -> Value {
    let Some(paging) = &vm.paging else {
        return Value::Null;
    };
    json!({
        "state": word(paging.state().as_str_name(), "STATE_"),
        "reason": paging.reason,
        "message": paging.message,
        "because": paging.because,
        "mapped_bytes": paging.mapped_pages.saturating_mul(PAGE_SIZE),
        "waiting": paging.faults_waiting,
        "source_bytes": paging.source_bytes,
        "loaded_bytes": paging.loaded_bytes,
    })
}

/// Whether a tracepoint counted page faults, and not who counted the rest.
fn faults_by_tracepoint(vm: &v1::Vm) -> bool {
    let stats = vm.mmu_stats.as_ref();
    stats.is_some_and(|stats| stats.faults_source() == v1::CounterSource::Tracepoint)
}

pub(super) fn host(host: &v1::Host, snapshot: &Snapshot) -> Value {
    let backends: Vec<&str> = host
        .backends()
        .map(|backend| word(backend.as_str_name(), "BACKEND_"))
        .collect();
    let offset = host.clock_offset.as_ref();
    json!({
        "name": host.name,
        "uid": host.uid,
        "address": host.address,
        "state": word(host.state().as_str_name(), "STATE_"),
        "state_message": host.state_message,
        "marks": host_marks(host),
        "contender": host.contender,
        "leftovers": host.leftovers,
        // Signed: std_duration knows no time before.
        "clock_offset_millis":
            offset.map(|offset| offset.seconds * 1000 + i64::from(offset.nanos) / 1_000_000),
        "arch": host.arch,
        "backends": backends,
        "backend_message": host.backend_message,
        "memory_bytes": host.memory_bytes,
        "memory_used_bytes": host.memory_used_bytes,
        "vms": host.vms,
        "last_seen": millis(host.last_seen_time.as_ref()),
        "version": host.version,
        "rates": rates(snapshot.rates.get(&host.name)),
    })
}

pub(super) fn vm(vm: &v1::Vm, snapshot: &Snapshot) -> Value {
    let spec = vm.spec.clone().unwrap_or_default();
    let guest = vm.guest_counters.as_ref().map(|guest| {
        json!({
            "passes": guest.passes,
            "pages_written": guest.pages_written,
            "errors": guest.errors,
        })
    });
    let conflicts: Vec<Value> = vm
        .conflicts
        .iter()
        .map(|other| json!({ "uid": other.uid, "host": other.host }))
        .collect();
    // Whatever its agent knows of that.
    let migration = snapshot
        .running
        .iter()
        .find(|migration| moves(migration, vm));
    let host = snapshot.hosts.get(&vm.host);
    let seen = vm
        .last_seen_time
        .as_ref()
        .or_else(|| host.and_then(|host| host.last_seen_time.as_ref()));
    json!({
        "name": vm.name,
        "uid": vm.uid,
        "state": word(vm.state().as_str_name(), "STATE_"),
        "state_message": vm.state_message,
        "marks": vm_marks(vm, snapshot),
        "conflicts": conflicts,
        "last_seen": millis(seen),
        "host": vm.host,
        "epoch": vm.epoch,
        "migration": migration.map_or(&vm.migration, |migration| &migration.name),
        "memory_bytes": spec.memory_bytes,
        "backing": backing(vm),
        "paging": paging(vm),
        "vcpus": spec.vcpus,
        "backend": word(spec.backend().as_str_name(), "BACKEND_"),
        "format": word(spec.format().as_str_name(), "FORMAT_"),
        "dirty_logging": vm.dirty_logging,
        "not_counted": not_counted(vm),
        "faults_by_tracepoint": faults_by_tracepoint(vm),
        "guest": guest,
        "rates": rates(snapshot.rates.get(key(vm))),
    })
}

fn number(count: usize) -> Value {
    json!(count)
}

/// Hosts, VMs and migrations by state, and what the last migrations were like.
pub(super) fn totals(snapshot: &Snapshot) -> Value {
    let mut hosts = Map::new();
    let add = |map: &mut Map<String, Value>, word: &str| {
        let before = map.get(word).and_then(Value::as_u64).unwrap_or(0);
        map.insert(word.to_owned(), json!(before + 1));
    };
    let (mut memory, mut used) = (0u64, 0u64);
    for host in snapshot.hosts.values() {
        add(&mut hosts, word(host.state().as_str_name(), "STATE_"));
        for mark in host_marks(host) {
            add(&mut hosts, mark);
        }
        memory = memory.saturating_add(host.memory_bytes);
        used = used.saturating_add(host.memory_used_bytes);
    }
    hosts.insert("total".to_owned(), number(snapshot.hosts.len()));
    let (mut vms, mut errors) = (Map::new(), 0u64);
    for vm in &snapshot.vms {
        add(&mut vms, word(vm.state().as_str_name(), "STATE_"));
        for mark in vm_marks(vm, snapshot) {
            add(&mut vms, mark);
        }
        let of_guest = vm.guest_counters.as_ref().map_or(0, |guest| guest.errors);
        errors = errors.saturating_add(of_guest);
    }
    vms.insert("total".to_owned(), number(snapshot.vms.len()));
    let mut migrations = Map::new();
    for migration in snapshot.running.iter().chain(snapshot.ended.iter()) {
        add(
            &mut migrations,
            word(migration.phase().as_str_name(), "MIGRATION_PHASE_"),
        );
    }
    migrations.insert("running".to_owned(), number(snapshot.running.len()));
    migrations.insert("ended".to_owned(), number(snapshot.ended.len()));
    let mut downtimes: Vec<f64> = snapshot
        .ended
        .iter()
        .filter(|migration| migration.phase() == Phase::Completed)
        .filter_map(|migration| seconds(migration.progress.as_ref()?.downtime.as_ref()))
        .collect();
    downtimes.sort_by(f64::total_cmp);
    let at = |hundredth: usize| {
        let last = downtimes.len().checked_sub(1)?;
        downtimes.get(last * hundredth / 100).copied()
    };
    json!({
        "hosts": hosts,
        "vms": vms,
        "migrations": migrations,
        "downtime": { "count": downtimes.len(), "median": at(50), "p95": at(95), "max": at(100) },
        "memory_bytes": memory,
        "memory_used_bytes": used,
        "guest_errors": errors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_vm_is_watched_is_told_and_nothing_of_one_that_is_not() {
        let mut vm = v1::Vm::default();
        assert_eq!(paging(&vm), Value::Null);
        vm.paging = Some(v1::PagingStatus {
            state: v1::paging_status::State::SourceFailed.into(),
            reason: "PAGE_SOURCE_CORRUPT".into(),
            message: "a checksum".into(),
            because: vec!["restored lazily".into()],
            mapped_pages: 3,
            faults_waiting: 2,
            source_bytes: 1 << 20,
            loaded_bytes: 1 << 12,
            ..Default::default()
        });
        assert_eq!(
            paging(&vm),
            json!({
                "state": "SOURCE_FAILED", "reason": "PAGE_SOURCE_CORRUPT", "message": "a checksum",
                "because": ["restored lazily"], "mapped_bytes": 12288, "waiting": 2,
                "source_bytes": 1 << 20, "loaded_bytes": 1 << 12,
            })
        );
    }

    #[test]
    fn a_vms_backing_is_told_by_page_size_and_nothing_unknown_is_0() {
        let mut vm = v1::Vm::default();
        assert_eq!(
            backing(&vm),
            json!({
                "asked": "AUTO", "bytes_1g": null, "bytes_2m": null, "bytes_4k": null,
                "shortfall": "",
            })
        );
        vm.spec = Some(v1::VmSpec {
            backing: v1::MemoryBacking::Hugetlb2m.into(),
            ..Default::default()
        });
        vm.mmu_stats = Some(v1::MmuStats {
            backing_2m_bytes: Some(6 << 20),
            backing_4k_bytes: Some(0),
            ..Default::default()
        });
        vm.backing_shortfall = "because".into();
        assert_eq!(
            backing(&vm),
            json!({
                "asked": "HUGETLB_2M", "bytes_1g": null, "bytes_2m": 6 << 20, "bytes_4k": 0,
                "shortfall": "because",
            })
        );
    }
}
