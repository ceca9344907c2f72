//! What the control plane counts, through the `metrics` facade: the command line installs the
//! recorder. Names are `slat_*`, labels are bounded (`host` is the one open label, one series a
//! host).
//!
//! Counters and histograms grow when a migration ends. Gauges are set by `gauges`.

use std::time::Duration;

use ::metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use slat_proto::{
    Reason,
    model::std_duration,
    v1::{self, MigrationPhase as Phase},
};

/// Upper bounds of `slat_migration_downtime_seconds`, for the recorder.
pub const DOWNTIME_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0,
];
/// Upper bounds of `slat_migration_duration_seconds`, for the recorder.
pub const DURATION_BUCKETS: &[f64] = &[
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
];
/// Upper bounds of `slat_migration_iterations`, for the recorder.
pub const ITERATION_BUCKETS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0];

/// How a migration may end.
const RESULTS: [&str; 4] = ["completed", "cancelled", "failed", "lost"];
/// A reason that is not ours, as of an agent of another version.
const OTHER: &str = "OTHER";
/// The downtime that was predicted when the switchover was decided.
const PREDICTED: &str = "slat_migration_predicted_downtime_seconds";
/// How far the prediction was from what was measured.
const PREDICTION_ERROR: &str = "slat_migration_downtime_prediction_error_seconds";

/// Fences by how they went.
pub(crate) const FENCES: &str = "slat_host_fences_total";

/// Help texts and units, and the series that exist from the start.
pub(crate) fn describe(version: &str) {
    describe_counter!(
        "slat_migrations_total",
        "Ended migrations by result and reason."
    );
    describe_gauge!("slat_migrations_active", "Running migrations by phase.");
    describe_histogram!(
        "slat_migration_duration_seconds",
        Unit::Seconds,
        "From acceptance to the end of a migration."
    );
    describe_histogram!(
        "slat_migration_downtime_seconds",
        Unit::Seconds,
        "Measured downtime of completed migrations."
    );
    describe_histogram!(
        PREDICTED,
        Unit::Seconds,
        "Downtime of completed migrations as predicted when the switchover was decided."
    );
    describe_histogram!(
        PREDICTION_ERROR,
        Unit::Seconds,
        "How much longer or shorter the measured downtime was than the predicted one."
    );
    describe_histogram!(
        "slat_migration_iterations",
        "Iterations over memory of completed migrations."
    );
    describe_gauge!(
        "slat_migration_in_doubt",
        "Migrations whose commit is not known."
    );
    describe_gauge!("slat_hosts", "Hosts by state.");
    describe_counter!(FENCES, "Fences of hosts by result.");
    for result in ["done", "failed"] {
        counter!(FENCES, "result" => result).increment(0);
    }
    describe_gauge!("slat_vms", "VMs by state.");
    describe_gauge!("slat_vm_name_conflicts", "Names that more than one VM has.");
    describe_gauge!(
        "slat_host_last_report_timestamp_seconds",
        Unit::Seconds,
        "When a host was last heard from."
    );
    describe_gauge!(
        "slat_host_clock_offset_seconds",
        Unit::Seconds,
        "A host's wall clock less the server's, as last measured."
    );
    describe_gauge!(
        "slat_store_up",
        "1 while the store can be written, else 0: the server does not serve."
    );
    describe_counter!(
        "slat_store_errors_total",
        "Calls and probes of the store that failed, by reason."
    );
    gauge!("slat_store_up").set(1.0);
    for reason in [
        Reason::Store,
        Reason::DiskFull,
        Reason::DescriptorsExhausted,
    ] {
        counter!("slat_store_errors_total", "reason" => reason.as_str()).increment(0);
    }
    describe_gauge!("slat_build_info", "Version of this process; always 1.");
    gauge!("slat_build_info", "version" => version.to_owned(), "role" => "server").set(1.0);
    // Every series exists before its first event: a counter that appears with 1 has no increase.
    for result in RESULTS {
        counter!("slat_migrations_total", "result" => result, "reason" => "").increment(0);
        let _registered = histogram!("slat_migration_duration_seconds", "result" => result);
    }
    for result in ["failed", "lost"] {
        let reasons = Reason::ALL.iter().map(|reason| reason.as_str());
        for reason in reasons.chain([OTHER]) {
            counter!("slat_migrations_total", "result" => result, "reason" => reason).increment(0);
        }
    }
    let _registered = histogram!("slat_migration_downtime_seconds");
    let _registered = histogram!("slat_migration_iterations");
}

/// Counts a migration that has just reached its terminal phase.
pub(crate) fn migration_ended(migration: &v1::Migration) {
    let lost = migration.vm_location() == v1::VmLocation::Lost;
    let result = match migration.phase() {
        Phase::Completed => "completed",
        Phase::Cancelled => "cancelled",
        _ if lost => "lost",
        _ => "failed",
    };
    // Bounded: a word from outside does not become a label.
    let reason = migration.error.as_ref().map_or("", |error| {
        Reason::parse(&error.reason).map_or(OTHER, Reason::as_str)
    });
    counter!("slat_migrations_total", "result" => result, "reason" => reason).increment(1);
    let seconds = |duration: Option<&prost_types::Duration>| -> f64 {
        Duration::as_secs_f64(&std_duration(duration))
    };
    histogram!("slat_migration_duration_seconds", "result" => result)
        .record(seconds(migration.total_time.as_ref()));
    if migration.phase() != Phase::Completed {
        return;
    }
    let Some(progress) = &migration.progress else {
        return;
    };
    if progress.downtime.is_some() && !progress.downtime_estimated {
        histogram!("slat_migration_downtime_seconds").record(seconds(progress.downtime.as_ref()));
        let predicted = progress.prediction.as_ref().and_then(|p| p.total.as_ref());
        if predicted.is_some() {
            let error = seconds(progress.downtime.as_ref()) - seconds(predicted);
            let direction = if error < 0.0 { "shorter" } else { "longer" };
            histogram!(PREDICTED).record(seconds(predicted));
            histogram!(PREDICTION_ERROR, "direction" => direction).record(error.abs());
        }
    }
    let iterations = u32::try_from(progress.iterations_done()).unwrap_or(u32::MAX);
    histogram!("slat_migration_iterations").record(f64::from(iterations));
}
