//! `slat demo` inside one host.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;

use super::scene::{Outcome, Scene};
use crate::lab::fleet::Backend;

const BOUND: Duration = Duration::from_secs(180);

/// Its own checks pass, and its report says what it must. An emulated host is slow: the downtime
/// that is accepted is what it can do.
pub(crate) fn demo(scene: &mut Scene<'_>) -> anyhow::Result<Outcome> {
    let backend = match scene.backend {
        Backend::Kvm => "--backend kvm".to_owned(),
        Backend::Software(format) => format!("--backend software --format {format}"),
    };
    let command = format!(
        "slat demo {backend} --memory 64MiB --dirty-rate 4MiB/s --max-downtime 1s --migrations 2 \
         --output json"
    );
    let said = scene.hosts.try_run(1, &command, BOUND)?.good(&command)?;
    let report: Value = serde_json::from_str(&said)?;
    ensure!(report["guest"]["errors"] == 0, "{report:#}");
    ensure!(
        report["guest"]["pages_written"].as_u64() > Some(0),
        "{report:#}"
    );
    ensure!(report["digest_match"] == true, "{report:#}");
    let migrations = report["migrations"].as_array().map_or(0, Vec::len);
    Ok(Outcome::Passed(format!(
        "{migrations} migrations, guest errors 0, digests match"
    )))
}
