//! Numbers that scripts hold do not come again when the VM moves: the slot table's generation, as
//! `slat memory` shows it.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use slat_tests::{Fleet, Layout, binary, guest::usual, scene};

/// Longest time one command may take.
const LIMIT: Duration = Duration::from_secs(120);

async fn slat(fleet: &Fleet, line: &str) -> anyhow::Result<Output> {
    let mut command = tokio::process::Command::new(binary::slat()?);
    command.env("SLAT_INSECURE_PLAINTEXT", "true");
    command
        .args(line.split_whitespace())
        .args(["--server", &fleet.server().to_string()])
        .kill_on_drop(true);
    tokio::time::timeout(LIMIT, command.output())
        .await
        .with_context(|| format!("slat {line} does not end"))?
        .context("running slat")
}

/// The generation that a command of `slat memory` shows.
async fn generation(fleet: &Fleet, line: &str) -> anyhow::Result<u64> {
    let output = slat(fleet, &format!("{line} -o json")).await?;
    ensure!(output.status.success(), "slat {line}: {output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    let shown = &answer["generation"];
    let number = shown.as_u64();
    number
        .or_else(|| shown.as_str()?.parse().ok())
        .with_context(|| format!("slat {line}: {answer:#}"))
}

async fn refused(fleet: &Fleet, line: &str) -> anyhow::Result<()> {
    let output = slat(fleet, line).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(4) && said.contains("STALE_GENERATION"),
        "slat {line}: {output:?}"
    );
    Ok(())
}

#[test]
fn a_stale_generation_is_refused_after_a_migration_and_back() {
    scene::run(
        Layout::two(scene::best_backend()),
        async |fleet: &mut Fleet| {
            let vm = fleet
                .run_vm("web", "host-a", usual(fleet.backend()))
                .await?;
            let stale = generation(fleet, "memory slots web").await?;
            let add = format!(
                "memory add-slot web --slot 7 --base 4GiB --size 64KiB --generation {stale}"
            );
            let present = generation(fleet, &add).await?;
            ensure!(present == stale + 1, "{stale} became {present}");
            let delete = |generation: u64| {
                format!("memory delete-slot web --slot 7 --generation {generation}")
            };
            for host in ["host-b", "host-a"] {
                let moved = slat(fleet, &format!("migrate web --to {host}")).await?;
                ensure!(moved.status.success(), "{moved:?}");
                let shown = generation(fleet, "memory slots web").await?;
                ensure!(shown == present, "{shown} on {host}, not {present}");
                refused(fleet, &delete(stale)).await?;
            }
            let last = generation(fleet, &delete(present)).await?;
            ensure!(last == present + 1, "{last}");
            fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
        },
    );
}
