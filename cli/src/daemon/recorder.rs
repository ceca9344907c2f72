//! The Prometheus recorder behind the `metrics` façade. The doors serve its text at `/metrics`; no listener of its own.
//!
//! Every histogram has fixed buckets, for without them the exporter makes a summary, which cannot be added up over
//! processes. Those whose values lie elsewhere than an RPC's are named one by one.

use std::{sync::Arc, time::Duration};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::task::JoinHandle;

use crate::{failure::Failure, roles::Render};

/// OpenTelemetry's buckets for the duration of a call, seconds.
const RPC: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
/// The guest's blackout, seconds.
const DOWNTIME: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0];
const DOWNTIME_END: f64 = 10.0;
/// Whole migrations and their phases, seconds.
const MIGRATION: [f64; 13] = [
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];
/// Work on memory: harvests, slot changes, invalidations, journal writes, seconds.
const MEMORY: [f64; 12] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 1.0,
];
/// Counts, as of iterations.
const COUNTS: [f64; 9] = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 50.0];
/// Histograms keep every value until drained; this often.
const UPKEEP: Duration = Duration::from_secs(5);

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let full = |name: &str| Matcher::Full(name.to_owned());
    let mut downtime = DOWNTIME.to_vec();
    downtime.push(DOWNTIME_END);
    let mut builder = PrometheusBuilder::new()
        .set_buckets(&COUNTS)?
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &RPC)?;
    for name in [
        "slat_migration_downtime_seconds",
        "slat_migration_downtime_component_seconds",
    ] {
        builder = builder.set_buckets_for_metric(full(name), &downtime)?;
    }
    for name in [
        "slat_migration_duration_seconds",
        "slat_migration_phase_duration_seconds",
    ] {
        builder = builder.set_buckets_for_metric(full(name), &MIGRATION)?;
    }
    for name in [
        "slat_dirty_harvest_duration_seconds",
        "slat_memslot_change_duration_seconds",
        "slat_invalidation_duration_seconds",
        "slat_journal_append_duration_seconds",
    ] {
        builder = builder.set_buckets_for_metric(full(name), &MEMORY)?;
    }
    Ok(builder)
}

/// Owns the recorder's upkeep; dropping it ends that task.
#[derive(Debug)]
pub(crate) struct Recorder {
    handle: PrometheusHandle,
    upkeep: JoinHandle<()>,
}

impl Recorder {
    /// Makes it the process's recorder and starts its upkeep on the present runtime.
    pub(crate) fn install(role: &'static str, version: &str) -> Result<Self, Failure> {
        let handle = builder()
            .and_then(PrometheusBuilder::install_recorder)
            .map_err(|error| Failure::local(format!("cannot record metrics: {error}")))?;
        metrics::describe_gauge!(
            "slat_build_info",
            "Version and role of this process; always 1"
        );
        metrics::gauge!("slat_build_info", "role" => role, "version" => version.to_owned())
            .set(1.0);
        let drained = handle.clone();
        let upkeep = tokio::spawn(async move {
            let mut tick = tokio::time::interval(UPKEEP);
            loop {
                tick.tick().await;
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
        assert!(
            text.contains("slat_migration_iterations_bucket{le=\"3\"} 1"),
            "{text}"
        );
    }
}
