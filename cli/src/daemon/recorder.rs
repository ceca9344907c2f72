//! The Prometheus recorder behind the `metrics` façade. The roles serve its text at
//! `/metrics`; it has no listener of its own.
//!
//! `process_*`, the process's own CPU time, memory, descriptors and threads, are read by the same
//! task, never for a scrape.
//!
//! Every histogram has fixed buckets, for without them the exporter makes a summary, which cannot
//! be added up over processes. Those whose values lie elsewhere than an RPC's are named one by one.

use std::{sync::Arc, time::Duration};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::task::JoinHandle;

use super::process;
use crate::{failure::Failure, roles::Render};

/// OpenTelemetry's buckets for the duration of a call, seconds.
const RPC: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
/// The guest's blackout, seconds.
const DOWNTIME: [f64; 12] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0,
];
/// How far a predicted downtime was from the measured one, seconds.
const PREDICTION_ERROR: [f64; 11] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
];
/// Whole migrations, seconds.
const MIGRATION: [f64; 13] = [
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];
/// Counts, as of iterations.
const COUNTS: [f64; 9] = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 50.0];
/// Histograms keep every value until drained, and the process is looked at; this often.
const UPKEEP: Duration = Duration::from_secs(5);

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let full = |name: &str| Matcher::Full(name.to_owned());
    PrometheusBuilder::new()
        .set_buckets(&COUNTS)?
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &RPC)?
        .set_buckets_for_metric(full("slat_migration_downtime_seconds"), &DOWNTIME)?
        .set_buckets_for_metric(full("slat_migration_predicted_downtime_seconds"), &DOWNTIME)?
        .set_buckets_for_metric(full("slat_snapshot_pause_seconds"), &DOWNTIME)?
        .set_buckets_for_metric(
            full("slat_migration_downtime_prediction_error_seconds"),
            &PREDICTION_ERROR,
        )?
        .set_buckets_for_metric(full("slat_migration_duration_seconds"), &MIGRATION)
}

/// Owns the recorder's upkeep; dropping it ends that task.
#[derive(Debug)]
pub(crate) struct Recorder {
    handle: PrometheusHandle,
    upkeep: JoinHandle<()>,
}

impl Recorder {
    /// Makes it the process's recorder and starts its upkeep on the present runtime.
    pub(crate) fn install() -> Result<Self, Failure> {
        let handle = builder()
            .and_then(PrometheusBuilder::install_recorder)
            .map_err(|error| Failure::local(format!("cannot record metrics: {error}")))?;
        let drained = handle.clone();
        process::describe();
        // Before anybody can ask.
        process::collect();
        let upkeep = tokio::spawn(async move {
            let mut tick = tokio::time::interval(UPKEEP);
            loop {
                tick.tick().await;
                process::collect();
                drained.run_upkeep();
            }
        });
        Ok(Self { handle, upkeep })
    }

    /// Renders the present values as Prometheus text.
    pub(crate) fn render(&self) -> Render {
        let handle = self.handle.clone();
        Arc::new(move || handle.render())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.upkeep.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_histogram_becomes_a_summary_and_downtime_has_its_buckets() {
        let recorder = builder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            metrics::histogram!("rpc_server_call_duration_seconds").record(0.02);
            metrics::histogram!("slat_migration_downtime_seconds", "kind" => "blackout")
                .record(0.02);
            metrics::histogram!("slat_migration_iterations").record(3.0);
            metrics::histogram!("slat_migration_downtime_prediction_error_seconds", "direction" => "longer")
                .record(0.002);
        });
        handle.run_upkeep();
        let text = handle.render();
        assert!(!text.contains("quantile="), "{text}");
        assert!(
            text.contains("slat_migration_downtime_seconds_bucket{kind=\"blackout\",le=\"0.3\"} 1"),
            "{text}"
        );
        assert!(
            text.contains("rpc_server_call_duration_seconds_bucket{le=\"0.075\"} 1"),
            "{text}"
        );
        let error = "slat_migration_downtime_prediction_error_seconds_bucket{direction=\"longer\",le=\"0.0025\"} 1";
        assert!(text.contains(error), "{text}");
        assert!(
            text.contains("slat_migration_iterations_bucket{le=\"3\"} 1"),
            "{text}"
        );
    }

    #[test]
    fn the_process_tells_of_itself() {
        let recorder = builder().unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            process::describe();
            process::collect();
        });
        let text = recorder.handle().render();
        for family in [
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_max_fds",
            "process_start_time_seconds",
            "process_threads",
        ] {
            let value = text
                .lines()
                .find_map(|line| line.strip_prefix(family)?.trim().parse::<f64>().ok());
            assert!(value.is_some(), "{family}: {text}");
        }
        assert!(
            text.contains("# TYPE process_cpu_seconds_total counter"),
            "{text}"
        );
    }
}
