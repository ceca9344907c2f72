//! The JSON of the page: small, with times in milliseconds since 1970 and durations in seconds,
//! null where nothing is known.

use serde_json::{Value, json};
use slat_proto::{
    model::{now, std_duration},
    v1,
};

use crate::{fleet::Fleet, phase::has_ended};

fn millis(time: Option<&prost_types::Timestamp>) -> Option<i64> {
    time.map(|time| {
        time.seconds
            .saturating_mul(1000)
            .saturating_add(i64::from(time.nanos) / 1_000_000)
    })
}

fn seconds(duration: Option<&prost_types::Duration>) -> Option<f64> {
    duration.map(|duration| std_duration(Some(duration)).as_secs_f64())
}

/// `STATE_READY` as `READY`.
fn word(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// Everything at this moment.
pub(super) fn state(
    fleet: &Fleet,
    migrations: &[v1::Migration],
    version: &str,
    error: Option<String>,
) -> Value {
    let hosts: Vec<Value> = fleet.hosts().iter().map(host).collect();
    let vms: Vec<Value> = fleet.vms().iter().map(vm).collect();
    let migrations: Vec<Value> = migrations.iter().map(migration).collect();
    json!({
        "now": millis(Some(&now())),
        "version": version,
        "report_interval_seconds": fleet.interval().as_secs_f64(),
        "hosts": hosts,
        "vms": vms,
        "migrations": migrations,
        "error": error,
    })
}

fn host(host: &v1::Host) -> Value {
    let backends: Vec<&str> = host
        .backends()
        .map(|backend| word(backend.as_str_name(), "BACKEND_"))
        .collect();
    json!({
        "name": host.name,
        "address": host.address,
        "state": word(host.state().as_str_name(), "STATE_"),
        "arch": host.arch,
        "backends": backends,
        "backend_message": host.backend_message,
        "memory_bytes": host.memory_bytes,
        "memory_used_bytes": host.memory_used_bytes,
        "vms": host.vms,
        "last_seen": millis(host.last_seen_time.as_ref()),
        "version": host.version,
    })
}

fn vm(vm: &v1::Vm) -> Value {
    let spec = vm.spec.clone().unwrap_or_default();
    let guest = vm.guest_counters.as_ref().map(|guest| {
        json!({
            "passes": guest.passes,
            "pages_written": guest.pages_written,
            "errors": guest.errors,
        })
    });
    json!({
        "name": vm.name,
        "state": word(vm.state().as_str_name(), "STATE_"),
        "state_message": vm.state_message,
        "host": vm.host,
        "epoch": vm.epoch,
        "migration": vm.migration,
        "memory_bytes": spec.memory_bytes,
        "vcpus": spec.vcpus,
        "backend": word(spec.backend().as_str_name(), "BACKEND_"),
        "format": word(spec.format().as_str_name(), "FORMAT_"),
        "dirty_logging": vm.dirty_logging,
        "guest": guest,
    })
}

/// One migration, iterations and decisions included.
pub(super) fn migration(migration: &v1::Migration) -> Value {
    let progress = migration.progress.clone().unwrap_or_default();
    let iterations: Vec<Value> = progress
        .iterations
        .iter()
        .map(|i| {
            json!({
                "iteration": i.iteration,
                "bytes": i.bytes_transferred,
                "pages_normal": i.pages_normal,
                "pages_zero": i.pages_zero,
                "seconds": seconds(i.duration.as_ref()),
                "dirty_pages": i.dirty_pages,
                "expected_downtime": seconds(i.expected_downtime.as_ref()),
                "final": i.r#final,
                "remaining_start": i.remaining_bytes_start,
            })
        })
        .collect();
    let decisions: Vec<Value> = progress
        .decisions
        .iter()
        .map(|d| {
            json!({
                "time": millis(d.time.as_ref()),
                "iteration": d.iteration,
                "action": word(d.action().as_str_name(), "ACTION_"),
                "cause": d.cause,
            })
        })
        .collect();
    let phases: Vec<Value> = migration
        .phase_times
        .iter()
        .map(|entry| {
            json!({
                "phase": word(entry.phase().as_str_name(), "MIGRATION_PHASE_"),
                "time": millis(entry.time.as_ref()),
            })
        })
        .collect();
    let error = migration.error.as_ref().map(|error| {
        json!({
            "reason": error.reason,
            "message": error.message,
            "side": error.side,
            "advice": error.advice,
        })
    });
    let breakdown = progress.downtime_breakdown.as_ref().map(|parts| {
        json!({
            "pause": seconds(parts.pause.as_ref()),
            "final_copy": seconds(parts.final_copy.as_ref()),
            "state": seconds(parts.state.as_ref()),
            "commit": seconds(parts.commit.as_ref()),
            "resume": seconds(parts.resume.as_ref()),
        })
    });
    json!({
        "name": migration.name,
        "vm": migration.vm,
        "source": migration.source,
        "destination": migration.destination,
        "phase": word(migration.phase().as_str_name(), "MIGRATION_PHASE_"),
        "terminal": has_ended(migration.phase()),
        "vm_location": word(migration.vm_location().as_str_name(), "VM_LOCATION_"),
        "cancel_requested": migration.cancel_requested,
        "error": error,
        "created": millis(migration.create_time.as_ref()),
        "ended": millis(migration.end_time.as_ref()),
        "total_seconds": seconds(migration.total_time.as_ref()),
        "downtime_seconds": seconds(progress.downtime.as_ref()),
        "downtime_breakdown": breakdown,
        "max_downtime_seconds":
            seconds(migration.params.as_ref().and_then(|params| params.max_downtime.as_ref())),
        "iteration": progress.iteration,
        "remaining_bytes": progress.remaining_bytes,
        "total_bytes": progress.total_bytes,
        "bytes_transferred": progress.bytes_transferred,
        "pages_normal": progress.pages_normal,
        "pages_zero": progress.pages_zero,
        "throughput": progress.throughput_bytes_per_second,
        "dirty_rate": progress.dirty_rate_bytes_per_second,
        "expected_downtime": seconds(progress.expected_downtime.as_ref()),
        "verification": word(progress.verification().as_str_name(), "VERIFICATION_"),
        "iterations": iterations,
        "decisions": decisions,
        "phases": phases,
    })
}
