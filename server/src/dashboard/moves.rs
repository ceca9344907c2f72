//! Migrations as JSON: a row of a list, and one with all that is known of it.

use serde_json::{Value, json};
use slat_proto::v1;

use super::{
    query::word,
    rows::{millis, seconds},
    why::{time_left, why},
};
use crate::{history::History, phase::has_ended};

/// Iterations and decisions shown: the first and the last of them.
const FIRST: usize = 8;
const LAST: usize = 16;

/// A row of a list.
pub(super) fn row(migration: &v1::Migration, history: &History) -> Value {
    let none = v1::MigrationProgress::default();
    let progress = migration.progress.as_ref().unwrap_or(&none);
    let still = history.still_for(&migration.name);
    json!({
        "name": migration.name,
        "vm": migration.vm,
        "vm_uid": migration.vm_uid,
        "source": migration.source,
        "destination": migration.destination,
        "phase": word(migration.phase().as_str_name(), "MIGRATION_PHASE_"),
        "terminal": has_ended(migration.phase()),
        "vm_location": word(migration.vm_location().as_str_name(), "VM_LOCATION_"),
        "cancel_requested": migration.cancel_requested,
        "reason": migration.error.as_ref().map(|error| &error.reason),
        "created": millis(migration.create_time.as_ref()),
        "ended": millis(migration.end_time.as_ref()),
        "total_seconds": seconds(migration.total_time.as_ref()),
        "downtime_seconds": seconds(progress.downtime.as_ref()),
        "max_downtime_seconds":
            seconds(migration.params.as_ref().and_then(|params| params.max_downtime.as_ref())),
        "iteration": progress.iteration,
        "iterations": (progress.iterations_done() > 0).then(|| progress.iterations_done()),
        "remaining_bytes": progress.remaining_bytes,
        "total_bytes": progress.total_bytes,
        "bytes_transferred": progress.bytes_transferred,
        "throughput": progress.throughput_bytes_per_second,
        "dirty_rate": progress.dirty_rate_bytes_per_second,
        "expected_downtime": seconds(progress.expected_downtime.as_ref()),
        "time_left": time_left(migration, still),
        "why": why(migration, still),
    })
}

/// The first and the last, and between them how many are left out: those here, and `between`, which
/// the history itself has only as a sum.
fn ends<T>(all: &[T], between: u32, json: impl Fn(&T) -> Value) -> Vec<Value> {
    if between == 0 && all.len() <= FIRST + LAST + 1 {
        return all.iter().map(json).collect();
    }
    let (first, rest) = all.split_at(FIRST.min(all.len()));
    let (left_out, last) = rest.split_at(rest.len().saturating_sub(LAST));
    let left_out = left_out.len() as u64 + u64::from(between);
    first
        .iter()
        .map(&json)
        .chain([json!({ "left_out": left_out })])
        .chain(last.iter().map(&json))
        .collect()
}

fn iteration(i: &v1::MigrationIteration) -> Value {
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
}

fn decision(d: &v1::MigrationDecision) -> Value {
    json!({
        "time": millis(d.time.as_ref()),
        "iteration": d.iteration,
        "action": word(d.action().as_str_name(), "ACTION_"),
        "cause": d.cause,
    })
}

/// What the downtime was made of, in order, beside what was predicted when the switchover was
/// decided: what is not explained is a part of its own.
fn downtime(progress: &v1::MigrationProgress) -> Vec<Value> {
    let Some(parts) = &progress.downtime_breakdown else {
        return Vec::new();
    };
    let predicted = progress.prediction.as_ref();
    let predicted = predicted.and_then(|all| all.parts).unwrap_or_default();
    let parts = [
        ("pause", "vCPUs stop", parts.pause, predicted.pause),
        (
            "final copy",
            "last harvest and last pages",
            parts.final_copy,
            predicted.final_copy,
        ),
        (
            "state",
            "vCPU state, until the destination is ready",
            parts.state,
            predicted.state,
        ),
        (
            "commit",
            "the source's journal says that it gave the VM away",
            parts.commit,
            predicted.commit,
        ),
        (
            "resume",
            "until the destination said that the VM runs",
            parts.resume,
            predicted.resume,
        ),
    ];
    let known: f64 = parts
        .iter()
        .filter_map(|(_, _, part, _)| seconds(part.as_ref()))
        .sum();
    let whole = seconds(progress.downtime.as_ref()).unwrap_or(known);
    let other = (whole - known).max(0.0);
    let mut shown: Vec<Value> = parts
        .iter()
        .filter_map(|(name, what, part, predicted)| {
            let took = seconds(part.as_ref())?;
            let predicted = seconds(predicted.as_ref());
            Some(json!({ "part": name, "what": what, "seconds": took, "predicted": predicted }))
        })
        .collect();
    // Below a tenth of a millisecond it is rounding.
    if other > 1e-4 {
        shown.push(
            json!({ "part": "other", "what": "not measured by part", "seconds": other, "predicted": null }),
        );
    }
    shown
}

/// One migration: its row, and iterations, decisions, phases, parts of the downtime, points.
pub(super) fn detail(migration: &v1::Migration, history: &History) -> Value {
    let none = v1::MigrationProgress::default();
    let progress = migration.progress.as_ref().unwrap_or(&none);
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
    let params = migration.params.unwrap_or_default();
    let predicted = progress.prediction.as_ref();
    let iterations = progress
        .iterations_between
        .as_ref()
        .map_or(0, |sum| sum.count);
    let decisions = progress
        .decisions_between
        .as_ref()
        .map_or(0, |sum| sum.count);
    let mut value = row(migration, history);
    let more = json!({
        "error": error,
        "epoch": migration.epoch,
        "downtime": downtime(progress),
        "predicted_seconds": predicted.and_then(|all| seconds(all.total.as_ref())),
        "not_predicted": predicted.map(|all| &all.unknown),
        "pages_normal": progress.pages_normal,
        "pages_zero": progress.pages_zero,
        "streams": params.streams,
        "max_bandwidth": params.max_bandwidth_bytes_per_second,
        "max_iterations": params.max_iterations,
        "max_total_seconds": seconds(params.max_total_time.as_ref()),
        "on_timeout": word(params.on_timeout().as_str_name(), "ON_TIMEOUT_"),
        "verification": word(progress.verification().as_str_name(), "VERIFICATION_"),
        "iterations_shown": ends(&progress.iterations, iterations, iteration),
        "decisions": ends(&progress.decisions, decisions, decision),
        "phases": phases,
        "points": history.points(&migration.name),
    });
    if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
        value.extend(more);
    }
    value
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use slat_proto::model::proto_duration;

    use super::*;

    #[test]
    fn long_histories_are_shown_by_their_ends() {
        let all: Vec<u32> = (0..1000).collect();
        let shown = ends(&all, 0, |n| json!(n));
        assert_eq!(shown.len(), FIRST + LAST + 1);
        assert_eq!(shown[FIRST]["left_out"], 1000 - FIRST - LAST);
        assert_eq!(shown[FIRST + LAST], 999);
        assert_eq!(ends(&all[..25], 0, |n| json!(n)).len(), 25);
        // What the history has only as a sum is left out, too.
        let shown = ends(&all[..64], 900, |n| json!(n));
        assert_eq!(shown[FIRST]["left_out"], 900 + 64 - FIRST - LAST);
    }

    /// Of a list, which has them as a sum.
    #[test]
    fn iterations_are_counted_where_they_are_not_listed() {
        let mut progress = v1::MigrationProgress::default();
        for iteration in 0..3 {
            progress.push_iteration(v1::MigrationIteration {
                iteration,
                ..Default::default()
            });
        }
        progress.summarize_histories();
        assert_eq!(progress.iterations, []);
        let migration = v1::Migration {
            progress: Some(progress),
            ..Default::default()
        };
        let row = row(&migration, &History::new(Duration::from_secs(1)));
        assert_eq!(row["iterations"], 3);
    }

    #[test]
    fn the_parts_of_a_downtime_add_up_to_it() {
        let millis = |millis| Some(proto_duration(Duration::from_millis(millis)));
        let progress = v1::MigrationProgress {
            downtime: millis(100),
            downtime_breakdown: Some(v1::DowntimeBreakdown {
                pause: millis(10),
                final_copy: millis(50),
                state: millis(20),
                commit: None,
                resume: millis(5),
            }),
            prediction: Some(v1::DowntimePrediction {
                parts: Some(v1::DowntimeBreakdown {
                    final_copy: millis(40),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let parts = downtime(&progress);
        assert_eq!(parts[1]["predicted"], 0.04);
        assert_eq!(parts[0]["predicted"], Value::Null);
        let sum: f64 = parts.iter().filter_map(|p| p["seconds"].as_f64()).sum();
        assert!((sum - 0.1).abs() < 1e-9, "{parts:?}");
        assert_eq!(parts.last().unwrap()["part"], "other");
        assert!(parts.iter().all(|part| part["part"] != "commit"));
        assert!(downtime(&v1::MigrationProgress::default()).is_empty());
    }
}
