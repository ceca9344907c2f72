//! kill -9 of one process while pages flow. Before the point of no return a death costs the
//! migration at most, never the VM (unless it is the VM's own), and an agent or the server dying
//! costs nothing. A target that dies right after it leaves a frozen copy that everybody can see.

use anyhow::{Context as _, ensure};
use slat_proto::{
    Reason,
    v1::{self, MigrationPhase, VmLocation, vm::State},
};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
};
use slat_tests::{
    Fleet,
    fleet::ended,
    guest::{MIB, busy, crawling, fast, paced, strolling, usual},
    handover::kill_after_commit,
    process::VmProcess,
    wait::{PATIENCE, eventually},
};

slat_tests::on_each_backend!(
    target_vm_process,
    target_vm_process_after_the_commit,
    source_vm_process,
    source_vm_process_that_is_told_to_end,
    whole_fleet_whose_directories_are_removed,
    source_agent,
    destination_agent,
    source_host,
    destination_host,
    server_and_restarted_at_once,
    server_until_the_vm_has_moved,
    server_while_the_migration_fails,
);

/// Reasons that say that the other side is gone.
const PEER_GONE: [Reason; 5] = [
    Reason::ConnectionLost,
    Reason::VmProcessDied,
    Reason::PeerUnreachable,
    Reason::PeerRestarted,
    Reason::VmUnreachable,
];

/// FAILED with the VM at the source, the source undisturbed, the target gone.
async fn failed_without_harm(fleet: &Fleet, failed: &v1::Migration) -> anyhow::Result<()> {
    ensure!(failed.phase() == MigrationPhase::Failed, "{failed:#?}");
    ensure!(failed.vm_location() == VmLocation::Source, "{failed:#?}");
    let error = failed.error.as_ref().context("FAILED without an error")?;
    let reason = Reason::parse(&error.reason).context("an unknown reason")?;
    ensure!(PEER_GONE.contains(&reason), "{error:#?}");
    ensure!(!error.message.is_empty(), "{error:#?}");
    fleet.runs_soundly_on(&failed.vm, "host-a").await?;
    fleet.vm_dir_gone("host-b", &failed.vm).await?;
    fleet.memory_used("host-a", 64 * MIB).await?;
    fleet.memory_used("host-b", 0).await
}

async fn target_vm_process(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    let during = fleet.vm(&fleet.agent("host-a"), &vm.name).await?;
    ensure!(
        during.dirty_logging && during.state() == State::Running,
        "{during:#?}"
    );
    fleet.vm_process("host-b", &vm.name)?.kill()?;
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    failed_without_harm(fleet, &failed).await?;

    // The same again works.
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}

/// Migrations that may miss the moment on a machine under load.
const TRIES: usize = 10;

async fn target_vm_process_after_the_commit(fleet: &mut Fleet) -> anyhow::Result<()> {
    for number in 0..TRIES {
        let spec = busy(fleet.backend(), 32, 1, Some(MIB));
        let vm = fleet
            .run_vm(&format!("web-{number}"), "host-a", spec)
            .await?;
        let watch = v1::WatchVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        let watch = fleet.vms(&fleet.server()).watch_vm(watch).await?;
        let migration = fleet
            .migrate_until_precopy(&vm.name, "host-b", paced(32 * MIB))
            .await?;
        let process = fleet.vm_process("host-b", &vm.name)?;
        let dirs = ["host-a", "host-b"].map(|host| fleet.vm_dir(host, &vm.name));
        let killed =
            tokio::task::spawn_blocking(move || kill_after_commit(&dirs[0], &dirs[1], &process));
        killed.await??;
        let last = fleet
            .migration_until(&migration.name, "its end", |migration| {
                ended(migration.phase())
            })
            .await?;
        let kept = last.vm_location() == VmLocation::Unknown;
        if kept {
            ensure!(last.phase() == MigrationPhase::Failed, "{last:#?}");
            frozen_and_seen(fleet, &vm.name, watch.into_inner()).await?;
        }
        let delete = v1::DeleteVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(delete).await?;
        for host in ["host-a", "host-b"] {
            fleet.vm_dir_gone(host, &vm.name).await?;
            fleet.memory_used(host, 0).await?;
        }
        if kept {
            return Ok(());
        }
    }
    anyhow::bail!("the moment was missed {TRIES} times");
}

/// The last copy is there, and every way to look at the fleet shows it: a watch from before, a new
/// one, get and list.
async fn frozen_and_seen(
    fleet: &Fleet,
    vm: &str,
    mut before: tonic::Streaming<v1::Vm>,
) -> anyhow::Result<()> {
    let frozen = |vm: &v1::Vm| vm.state() == State::Relinquished && vm.host == "hosts/host-a";
    let told = async {
        while let Some(told) = before.message().await? {
            if frozen(&told) {
                return Ok(());
            }
        }
        anyhow::bail!("the watch ended")
    };
    tokio::time::timeout(PATIENCE, told)
        .await
        .context("a watch from before the migration never told")??;
    fleet
        .vm_until(&fleet.server(), vm, "RELINQUISHED", frozen)
        .await?;
    let got = fleet.vm(&fleet.server(), vm).await?;
    ensure!(frozen(&got), "{got:#?}");
    let list = v1::ListVmsRequest::default();
    let list = fleet.vms(&fleet.server()).list_vms(list).await?;
    let listed = list.into_inner().vms;
    ensure!(listed.len() == 1 && frozen(&listed[0]), "{listed:#?}");
    let kept = VmProcess::behind(&fleet.vm_dir("host-a", vm))?;
    ensure!(kept.is_some(), "the last copy is gone");
    Ok(())
}

/// A VM whose process is ended by `end` in precopy is LOST, for `reason`, and holds no memory.
async fn lost_in_precopy(
    fleet: &Fleet,
    end: impl FnOnce(&VmProcess) -> anyhow::Result<()>,
    reason: Reason,
) -> anyhow::Result<v1::Vm> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    end(&fleet.vm_process("host-a", &vm.name)?)?;
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    ensure!(failed.vm_location() == VmLocation::Lost, "{failed:#?}");
    let error = failed.error.context("FAILED without an error")?;
    ensure!(error.reason == reason.as_str(), "{error:#?}");
    ensure!(error.metadata["vm_location"] == "LOST", "{error:#?}");
    fleet.vm_dir_gone("host-b", &vm.name).await?;
    fleet.memory_used("host-a", 0).await?;
    fleet.memory_used("host-b", 0).await?;
    Ok(vm)
}

async fn source_vm_process(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = lost_in_precopy(fleet, VmProcess::kill, Reason::VmProcessDied).await?;
    fleet
        .vm_until(&fleet.server(), &vm.name, "LOST", |vm| {
            vm.state() == State::Lost && vm.migration.is_empty()
        })
        .await?;

    // Deleted, its name is free again.
    let delete = v1::DeleteVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).delete_vm(delete).await?;
    let again = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    ensure!(again.uid != vm.uid && again.epoch == 1, "{again:#?}");
    Ok(())
}

/// SIGTERM ends the VM, as a delete would: nothing is left that could be said to run at the source.
async fn source_vm_process_that_is_told_to_end(fleet: &mut Fleet) -> anyhow::Result<()> {
    let stopped = Reason::VmStoppedDuringMigration;
    let vm = lost_in_precopy(fleet, VmProcess::terminate, stopped).await?;
    fleet.vm_dir_gone("host-a", &vm.name).await
}

/// Server and agents die while a VM moves, and their directories are removed, as when a benchmark
/// is killed. The VM arrives all the same, and its source waits to be released, which nobody can do
/// any more: SIGTERM ends both processes.
async fn whole_fleet_whose_directories_are_removed(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    fleet
        .migrate_until_precopy(&vm.name, "host-b", strolling())
        .await?;
    let dirs = ["host-a", "host-b"].map(|host| fleet.vm_dir(host, &vm.name));
    let processes = [
        fleet.vm_process("host-a", &vm.name)?,
        fleet.vm_process("host-b", &vm.name)?,
    ];
    fleet.kill_server();
    fleet.kill_agent("host-a");
    fleet.kill_agent("host-b");
    let journal = VmDir::new(&dirs[0]).journal();
    eventually("the source has given its VM away", || async {
        let state = Journal::read(&journal)?.context("no journal")?;
        let gone = matches!(state.ownership, Ownership::Relinquished { .. });
        ensure!(gone, "{state:?}");
        Ok(())
    })
    .await?;
    for dir in &dirs {
        std::fs::remove_dir_all(dir)?;
    }
    for process in &processes {
        process.terminate()?;
    }
    // Who comes back finds nothing of it.
    for host in ["host-a", "host-b"] {
        fleet.start_agent(host)?;
    }
    fleet.start_server()?;
    fleet.hosts_ready().await?;
    // The server knows the VM, and keeps it as long as its migration has work left.
    eventually("its migration lets go of the VM", || async {
        let mut client = fleet.vms(&fleet.server());
        let list = client.list_vms(v1::ListVmsRequest::default()).await?;
        for vm in list.into_inner().vms {
            let request = v1::DeleteVmRequest {
                uid: vm.uid,
                ..Default::default()
            };
            client.delete_vm(request).await?;
        }
        Ok(())
    })
    .await
}

async fn source_agent(fleet: &mut Fleet) -> anyhow::Result<()> {
    let stays = fleet
        .run_vm("stays", "host-a", usual(fleet.backend()))
        .await?;
    let moves = fleet
        .run_vm("moves", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&moves.name, "host-b", strolling())
        .await?;
    let process = fleet.vm_process("host-a", &stays.name)?;
    fleet.kill_agent("host-a");

    // Nobody supervises the source, and the VM moves all the same.
    fleet
        .vm_until(
            &fleet.agent("host-b"),
            &moves.name,
            "RUNNING on host-b",
            |vm| vm.state() == State::Running,
        )
        .await?;
    fleet.start_agent("host-a")?;
    fleet
        .migration_ends(&migration.name, MigrationPhase::Completed)
        .await?;
    fleet.runs_soundly_on(&moves.name, "host-b").await?;
    fleet.vm_dir_gone("host-a", &moves.name).await?;

    // The agent found the other one again: the same process, never stopped.
    let found = fleet.runs_soundly_on(&stays.name, "host-a").await?;
    ensure!(found.pid == process.pid() && found.epoch == 1, "{found:#?}");
    fleet.memory_used("host-a", 64 * MIB).await?;
    fleet.memory_used("host-b", 64 * MIB).await
}

async fn destination_agent(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", strolling())
        .await?;
    let target = fleet.vm_process("host-b", &vm.name)?;
    fleet.kill_agent("host-b");
    let done = fleet
        .migration_ends(&migration.name, MigrationPhase::Completed)
        .await?;
    ensure!(done.vm_location() == VmLocation::Destination, "{done:#?}");
    fleet.start_agent("host-b")?;
    let found = fleet.runs_soundly_on(&vm.name, "host-b").await?;
    ensure!(found.pid == target.pid() && found.epoch == 2, "{found:#?}");
    fleet.vm_dir_gone("host-a", &vm.name).await?;
    fleet.memory_used("host-a", 0).await?;
    fleet.memory_used("host-b", 64 * MIB).await
}

/// Agent and VM process at once, as when a host loses power; the agent comes back with what was on
/// disk.
async fn source_host(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    let process = fleet.vm_process("host-a", &vm.name)?;
    let target = fleet.vm_process("host-b", &vm.name)?;
    fleet.kill_agent("host-a");
    process.kill()?;
    // The target gives up by itself: it has no claim on the VM. Its record stays until the server
    // knows the outcome.
    target.wait_end()?;
    fleet.start_agent("host-a")?;
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    ensure!(failed.vm_location() == VmLocation::Lost, "{failed:#?}");
    let error = failed.error.context("FAILED without an error")?;
    ensure!(error.reason == Reason::VmProcessDied.as_str(), "{error:#?}");
    fleet
        .vm_until(&fleet.server(), &vm.name, "LOST", |vm| {
            vm.state() == State::Lost
        })
        .await?;
    fleet.vm_dir_gone("host-b", &vm.name).await?;
    fleet.memory_used("host-a", 0).await?;
    fleet.memory_used("host-b", 0).await
}

async fn destination_host(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    let process = fleet.vm_process("host-b", &vm.name)?;
    fleet.kill_agent("host-b");
    process.kill()?;
    // The outcome does not wait for the host to come back.
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    fleet.runs_soundly_on(&vm.name, "host-a").await?;
    fleet.start_agent("host-b")?;
    fleet.hosts_ready().await?;
    failed_without_harm(fleet, &failed).await?;
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}

async fn server_and_restarted_at_once(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", strolling())
        .await?;
    fleet.kill_server();
    fleet.start_server()?;
    let done = fleet
        .migration_ends(&migration.name, MigrationPhase::Completed)
        .await?;
    ensure!(done.vm_location() == VmLocation::Destination, "{done:#?}");
    ensure!(done.create_time == migration.create_time, "{done:#?}");
    ensure!(done.generation > migration.generation, "{done:#?}");
    let progress = done.progress.context("no progress")?;
    ensure!(progress.downtime.is_some(), "{progress:#?}");
    fleet.hosts_ready().await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await?;
    fleet.vm_dir_gone("host-a", &vm.name).await
}

async fn server_until_the_vm_has_moved(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", strolling())
        .await?;
    fleet.kill_server();
    fleet
        .vm_until(
            &fleet.agent("host-b"),
            &vm.name,
            "RUNNING on host-b",
            |vm| vm.state() == State::Running,
        )
        .await?;
    // The source waits for the server to take note of the outcome.
    ensure!(
        fleet.vm_dir("host-a", &vm.name).exists(),
        "its record is gone"
    );
    fleet.start_server()?;
    let done = fleet
        .migration_ends(&migration.name, MigrationPhase::Completed)
        .await?;
    ensure!(done.vm_location() == VmLocation::Destination, "{done:#?}");
    let progress = done.progress.context("no progress")?;
    ensure!(progress.downtime.is_some(), "{progress:#?}");
    fleet.hosts_ready().await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await?;
    fleet.vm_dir_gone("host-a", &vm.name).await
}

async fn server_while_the_migration_fails(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    fleet.kill_server();
    fleet.vm_process("host-b", &vm.name)?.kill()?;
    // The source undoes everything by itself, with nobody to ask.
    eventually("the source is as before", || async {
        let vm = fleet.vm(&fleet.agent("host-a"), &vm.name).await?;
        ensure!(vm.state() == State::Running && !vm.dirty_logging, "{vm:#?}");
        Ok(())
    })
    .await?;
    fleet.start_server()?;
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    fleet.hosts_ready().await?;
    failed_without_harm(fleet, &failed).await?;
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}
