//! A guest that dirties its memory faster than the wire takes it: the user's choice decides, and
//! every decision is recorded.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use slat_proto::{
    Reason,
    model::proto_duration,
    v1::{
        self, MigrationPhase, VmLocation,
        migration_decision::Action,
        migration_params::{OnTimeout, Verify},
    },
};
use slat_tests::{
    Fleet,
    guest::{MIB, busy, verified},
};

slat_tests::on_each_backend!(gives_up_and_the_vm_runs_on, or_switches_over_when_told_to);

/// Iterations are slow, so that the guest writes all of its memory meanwhile. The last pages are
/// not paced: 64 MiB of them take longer than half of the limit, on any machine.
fn hopeless(on_timeout: OnTimeout) -> v1::MigrationParams {
    v1::MigrationParams {
        max_bandwidth_bytes_per_second: 32 * MIB,
        max_downtime: Some(proto_duration(Duration::from_millis(40))),
        max_iterations: 3,
        on_timeout: on_timeout.into(),
        ..Default::default()
    }
}

fn actions(migration: &v1::Migration) -> Vec<Action> {
    let decisions = migration.progress.iter().flat_map(|p| &p.decisions);
    decisions.map(v1::MigrationDecision::action).collect()
}

async fn gives_up_and_the_vm_runs_on(fleet: &mut Fleet) -> anyhow::Result<()> {
    let spec = busy(fleet.backend(), 64, 1, None);
    let vm = fleet.run_vm("wild", "host-a", spec).await?;
    let params = hopeless(OnTimeout::Cancel);
    let migration = fleet.migrate(&vm.name, "host-b", params).await?;
    let failed = fleet
        .migration_ends(&migration.name, MigrationPhase::Failed)
        .await?;
    ensure!(failed.vm_location() == VmLocation::Source, "{failed:#?}");
    let error = failed.error.as_ref().context("FAILED without an error")?;
    ensure!(error.reason == Reason::NotConverging.as_str(), "{error:#?}");
    ensure!(!error.advice.is_empty(), "{error:#?}");
    let expected = [Action::Continue, Action::Continue, Action::GiveUp];
    ensure!(actions(&failed) == expected, "{failed:#?}");
    let progress = failed.progress.as_ref().context("no progress")?;
    ensure!(
        progress
            .decisions
            .iter()
            .all(|d| !d.cause.is_empty() && d.time.is_some()),
        "{progress:#?}"
    );
    ensure!(progress.dirty_rate_bytes_per_second > 0, "{progress:#?}");
    fleet.runs_soundly_on(&vm.name, "host-a").await?;
    fleet.vm_dir_gone("host-b", &vm.name).await?;
    fleet.memory_used("host-b", 0).await
}

async fn or_switches_over_when_told_to(fleet: &mut Fleet) -> anyhow::Result<()> {
    let spec = busy(fleet.backend(), 64, 2, None);
    let vm = fleet.run_vm("wild", "host-a", spec).await?;
    let params = verified(hopeless(OnTimeout::ForceSwitchover), Verify::AfterCommit);
    let done = fleet.migrate_and_wait(&vm.name, "host-b", params).await?;
    let expected = [Action::Continue, Action::Continue, Action::ForceSwitchover];
    ensure!(actions(&done) == expected, "{done:#?}");
    let progress = done.progress.as_ref().context("no progress")?;
    ensure!(
        progress.verification() == v1::Verification::Match,
        "{progress:#?}"
    );
    ensure!(progress.iterations.len() == 4, "{progress:#?}");
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}
