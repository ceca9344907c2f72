//! Cancel: before the commit the VM stays and nothing of the attempt does; after the end it is
//! refused.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, MigrationPhase, VmLocation, migration_decision::Action},
};
use slat_tests::{
    Fleet,
    guest::{MIB, crawling, fast, usual},
};

slat_tests::on_each_backend!(a_cancelled_migration_leaves_the_vm_as_it_was);

async fn cancel(fleet: &Fleet, name: &str) -> Result<v1::Migration, ApiError> {
    let request = v1::CancelMigrationRequest { name: name.into() };
    let answer = fleet.migrations().cancel_migration(request).await?;
    Ok(answer.into_inner())
}

async fn a_cancelled_migration_leaves_the_vm_as_it_was(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let process = fleet.vm_process("host-a", &vm.name)?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    let asked = cancel(fleet, &migration.name).await?;
    ensure!(asked.cancel_requested, "{asked:#?}");
    // Asking twice is asking once.
    cancel(fleet, &migration.name).await?;
    let done = fleet
        .migration_ends(&migration.name, MigrationPhase::Cancelled)
        .await?;
    ensure!(done.vm_location() == VmLocation::Source, "{done:#?}");
    ensure!(done.end_time.is_some(), "{done:#?}");
    let progress = done.progress.context("no progress")?;
    ensure!(progress.downtime.is_none(), "{progress:#?}");
    let last = progress.decisions.last().context("no decision")?;
    ensure!(last.action() == Action::Cancel, "{progress:#?}");

    let after = fleet.runs_soundly_on(&vm.name, "host-a").await?;
    ensure!(after.pid == process.pid() && after.epoch == 1, "{after:#?}");
    fleet.vm_dir_gone("host-b", &vm.name).await?;
    fleet.memory_used("host-b", 0).await?;
    fleet.memory_used("host-a", 64 * MIB).await?;
    // Of one that was cancelled: still the same answer.
    let again = cancel(fleet, &migration.name).await?;
    ensure!(again.phase() == MigrationPhase::Cancelled, "{again:#?}");

    let done = fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    let refused = cancel(fleet, &done.name).await;
    let error = refused
        .err()
        .context("a finished migration was cancelled")?;
    ensure!(error.reason == Reason::PastPointOfNoReturn, "{error:?}");
    ensure!(
        error.metadata.get("migration") == Some(&done.name),
        "{error:?}"
    );
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}
