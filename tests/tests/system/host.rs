//! What one host gives its VMs, and no more: ports for pages, room for logs.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
};

use anyhow::{Context as _, ensure};
use slat_proto::v1::MigrationPhase;
use slat_tests::{
    Fleet, Layout,
    data_port::{insults, listening_ports, say},
    guest::{crawling, fast, strolling, usual},
    scene,
    wait::eventually,
};

fn one_host() -> Layout {
    Layout {
        backend: scene::best_backend(),
        hosts: vec![("host-a", 512)],
        own_clocks: false,
    }
}

#[test]
fn pages_come_in_on_a_port_of_the_range_or_not_at_all() {
    scene::run(one_host(), async |fleet: &mut Fleet| {
        // A range of one port, which somebody else has.
        // It is none of those that the kernel gives to anybody who asks for any.
        let mut below = 20_000..32_000;
        let taken = below
            .find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok())
            .context("no free port")?;
        let port = taken.local_addr()?;
        let ports = port.port().to_string();
        fleet
            .add_host("host-b", 512, &["--data-ports", &ports])
            .await?;
        let vm = fleet
            .run_vm("web", "host-a", usual(fleet.backend()))
            .await?;
        let migration = fleet.migrate(&vm.name, "host-b", fast()).await?;
        let failed = fleet
            .migration_ends(&migration.name, MigrationPhase::Failed)
            .await?;
        let error = failed.error.context("no error")?;
        ensure!(error.reason == "LIMIT_REACHED", "{error:#?}");
        ensure!(error.metadata["data_ports"] == ports, "{error:#?}");
        ensure!(error.advice.contains("--data-ports"), "{error:#?}");
        fleet.runs_soundly_on(&vm.name, "host-a").await?;
        fleet.vm_dir_gone("host-b", &vm.name).await?;

        drop(taken);
        let migration = fleet
            .migrate_until_precopy(&vm.name, "host-b", strolling())
            .await?;
        let process = fleet.vm_process("host-b", &vm.name)?;
        ensure!(listening_ports(process.pid())? == [port], "not on {port}");
        fleet
            .migration_ends(&migration.name, MigrationPhase::Completed)
            .await?;
        fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
    });
}

/// Sends what is wrong until the log of the VM's process has been rotated `times` times.
fn insult(port: SocketAddr, log: &Path, times: usize) -> anyhow::Result<()> {
    let (what, bytes) = insults().pop().context("no insult")?;
    let old = slat_record::rotate::old(log);
    let (mut rotated, mut last) = (0, None);
    // Each is a line of some hundred bytes.
    for _ in 0..5000 {
        say(port, &bytes).context(what)?;
        let now = std::fs::metadata(&old).ok().map(|file| {
            use std::os::unix::fs::MetadataExt as _;
            file.ino()
        });
        if now != last {
            (rotated, last) = (rotated + 1, now);
        }
        if rotated == times {
            return Ok(());
        }
    }
    anyhow::bail!("rotated {rotated} times")
}

/// The files of a log by name, each with its length.
fn logs(dir: &Path) -> anyhow::Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("log") {
            files.push((name, entry.metadata()?.len()));
        }
    }
    files.sort();
    Ok(files)
}

#[test]
fn a_log_that_others_can_fill_stays_within_its_bound() {
    const LOG: u64 = 64 << 10;
    scene::run(one_host(), async |fleet: &mut Fleet| {
        let options = ["--data-ports", "0", "--vm-log-size", "64KiB"];
        fleet.add_host("host-b", 512, &options).await?;
        let vm = fleet
            .run_vm("web", "host-a", usual(fleet.backend()))
            .await?;
        let migration = fleet
            .migrate_until_precopy(&vm.name, "host-b", crawling())
            .await?;
        let process = fleet.vm_process("host-b", &vm.name)?;
        let port = *listening_ports(process.pid())?
            .first()
            .context("no data port")?;
        let log = fleet.vm_dir("host-b", &vm.name).join("log");
        let path = log.clone();
        tokio::task::spawn_blocking(move || insult(port, &path, 3)).await??;

        let dir = log.parent().context("no directory")?;
        // The last rotation was seen while it was under way.
        let files = eventually("there are two files", || async {
            let files = logs(dir)?;
            let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
            ensure!(names == ["log", "log.1"], "{files:?}");
            Ok(files)
        })
        .await?;
        ensure!(files.iter().all(|(_, length)| *length <= LOG), "{files:?}");
        // Lines are whole on both sides of a rotation.
        for (name, _) in files {
            let text = std::fs::read_to_string(dir.join(&name))?;
            for line in text.lines() {
                serde_json::from_str::<serde_json::Value>(line)
                    .with_context(|| format!("{name}: {line}"))?;
            }
        }
        let cancel = slat_proto::v1::CancelMigrationRequest {
            name: migration.name.clone(),
        };
        fleet.migrations().cancel_migration(cancel).await?;
        fleet
            .migration_ends(&migration.name, MigrationPhase::Cancelled)
            .await?;
        eventually("the directory is gone with its logs", || async {
            ensure!(!dir.exists());
            Ok(())
        })
        .await?;
        fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
    });
}
