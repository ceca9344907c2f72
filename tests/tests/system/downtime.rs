//! The downtime as predicted and as measured: remembered for a pair of hosts, whatever happens to
//! the server, and refused through the command line where it cannot be kept.

use anyhow::{Context as _, ensure};
use slat_proto::{
    Reason,
    v1::{self, MigrationPhase, VmLocation},
};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, busy, fast, seconds, usual},
    scene,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::cli::slat;

slat_tests::on_each_backend!(is_remembered_for_a_pair_of_hosts_across_a_restart);

/// What the server's /metrics says.
async fn metrics(fleet: &Fleet) -> anyhow::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(fleet.server().to_string()).await?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: slat\r\nConnection: close\r\n\r\n")
        .await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// Adds up the series of a family.
fn sum(text: &str, family: &str) -> f64 {
    text.lines()
        .filter(|line| line.starts_with(family))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

fn prediction(done: &v1::Migration) -> anyhow::Result<&v1::DowntimePrediction> {
    let progress = done.progress.as_ref().context("no progress")?;
    progress.prediction.as_ref().context("no prediction")
}

async fn is_remembered_for_a_pair_of_hosts_across_a_restart(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let first = fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    let predicted = prediction(&first)?;
    for unknown in ["state", "resume"] {
        ensure!(
            predicted.unknown.iter().any(|name| name == unknown),
            "{predicted:#?}"
        );
    }
    let costs = predicted.costs.as_ref().context("no costs")?;
    ensure!(seconds(costs.round_trip.as_ref()) > 0.0, "{costs:#?}");
    ensure!(seconds(costs.source_sync.as_ref()) > 0.0, "{costs:#?}");
    ensure!(seconds(costs.destination_sync.as_ref()) > 0.0, "{costs:#?}");
    ensure!(costs.bandwidth_bytes_per_second > 0, "{costs:#?}");
    // In the parts that are measured.
    let parts = predicted.parts.as_ref().context("no parts")?;
    let whole = [
        &parts.pause,
        &parts.final_copy,
        &parts.state,
        &parts.commit,
        &parts.resume,
    ];
    let whole: f64 = whole.iter().map(|part| seconds(part.as_ref())).sum();
    let total = seconds(predicted.total.as_ref());
    ensure!(
        total > 0.0 && (whole - total).abs() < 1e-6,
        "{predicted:#?}"
    );
    let text = metrics(fleet).await?;
    let errors = "slat_migration_downtime_prediction_error_seconds_count";
    ensure!(sum(&text, errors) == 1.0, "{text}");
    let family = "slat_migration_predicted_downtime_seconds_sum";
    ensure!((sum(&text, family) - total).abs() < 1e-6, "{text}");

    fleet.migrate_and_wait(&vm.name, "host-a", fast()).await?;
    fleet.kill_server();
    fleet.start_server()?;
    fleet.hosts_ready().await?;
    let again = fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    let predicted = prediction(&again)?;
    ensure!(predicted.unknown.is_empty(), "{predicted:#?}");
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}

#[test]
fn a_limit_that_cannot_be_kept_is_refused_at_once_with_the_figure() {
    scene::run(
        Layout::two(scene::best_backend()),
        async |fleet: &mut Fleet| {
            let address = fleet.server().to_string();
            let env = [("SLAT_SERVER", address.as_str())];
            let spec = busy(fleet.backend(), 64, 1, Some(MIB));
            let vm = fleet.run_vm("web", "host-a", spec).await?;
            // Digests of all memory are taken with the vCPUs stopped: longer than 1 ms anywhere.
            let output = slat(
                &[
                    "migrate",
                    "web",
                    "--to",
                    "host-b",
                    "--id",
                    "tight",
                    "--max-downtime",
                    "1ms",
                    "--verify",
                    "before-commit",
                ],
                &env,
            )
            .await?;
            ensure!(output.status.code() == Some(4), "{output:?}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(said.contains("DOWNTIME_UNREACHABLE"), "{said}");
            ensure!(said.contains("at least"), "{said}");
            let failed = fleet
                .migration_ends("migrations/tight", MigrationPhase::Failed)
                .await?;
            ensure!(failed.vm_location() == VmLocation::Source, "{failed:#?}");
            let error = failed.error.as_ref().context("no error")?;
            ensure!(
                error.reason == Reason::DowntimeUnreachable.as_str(),
                "{error:#?}"
            );
            let predicted: f64 = error.metadata["predicted_ms"].parse()?;
            ensure!(predicted > 1.0, "{error:#?}");
            ensure!(error.advice.contains("--max-downtime"), "{error:#?}");
            let progress = failed.progress.as_ref().context("no progress")?;
            ensure!(progress.bytes_transferred == 0, "{progress:#?}");
            ensure!(progress.expected_downtime.is_none(), "{progress:#?}");
            fleet.runs_soundly_on(&vm.name, "host-a").await?;
            fleet.vm_dir_gone("host-b", &vm.name).await
        },
    );
}
