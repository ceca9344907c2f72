//! VMs, hosts and totals as JSON.

use serde_json::{Map, Value, json};
use slat_proto::{
    model::std_duration,
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
        "vcpus": spec.vcpus,
        "backend": word(spec.backend().as_str_name(), "BACKEND_"),
        "format": word(spec.format().as_str_name(), "FORMAT_"),
        "dirty_logging": vm.dirty_logging,
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
