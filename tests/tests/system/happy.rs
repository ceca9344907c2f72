//! A migration that works: there and back, verified both ways, with nothing left at the source.

use anyhow::{Context as _, ensure};
use slat_proto::v1::{
    self, MigrationPhase, Verification, VmLocation, migration_decision::Action,
    migration_params::Verify,
};
use slat_tests::{
    Fleet,
    guest::{MIB, busy, fast, paced, seconds, verified},
};

slat_tests::on_each_backend!(
    there_and_back_with_two_vcpus,
    many_in_a_row_leave_nothing_at_either_host,
    a_paused_vm_stays_paused_and_whole,
    zero_pages_are_not_sent_as_contents,
);

async fn there_and_back_with_two_vcpus(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", busy(fleet.backend(), 64, 2, Some(4 * MIB)))
        .await?;
    ensure!(vm.epoch == 1 && !vm.dirty_logging, "{vm:#?}");
    let mut home = ("host-a", "host-b");
    for (round, verify) in [
        Verify::AfterCommit,
        Verify::BeforeCommit,
        Verify::AfterCommit,
    ]
    .into_iter()
    .enumerate()
    {
        let (from, to) = home;
        let before = fleet.runs_soundly_on(&vm.name, from).await?;
        let old = fleet.vm_process(from, &vm.name)?;
        ensure!(before.pid == old.pid(), "{before:#?} is not {old:?}");

        // Slow enough for a second iteration.
        let params = verified(paced(32 * MIB), verify);
        let done = fleet.migrate_and_wait(&vm.name, to, params).await?;
        ensure!(done.vm_location() == VmLocation::Destination, "{done:#?}");
        ensure!(done.error.is_none() && done.end_time.is_some(), "{done:#?}");
        ensure!(done.epoch == round as u64 + 1, "{done:#?}");
        let progress = done.progress.as_ref().context("no progress")?;
        ensure!(
            progress.verification() == Verification::Match,
            "{progress:#?}"
        );
        figures_add_up(&done)?;

        let after = fleet.runs_soundly_on(&vm.name, to).await?;
        ensure!(after.uid == vm.uid, "another VM: {after:#?}");
        ensure!(after.epoch == before.epoch + 1, "{after:#?}");
        let pages = |vm: &v1::Vm| {
            vm.guest_counters
                .map_or(0, |counters| counters.pages_written)
        };
        ensure!(
            pages(&after) > pages(&before),
            "the guest began again: {after:#?}"
        );
        old.wait_end()?;
        fleet.vm_dir_gone(from, &vm.name).await?;
        fleet.memory_used(from, 0).await?;
        fleet.memory_used(to, 64 * MIB).await?;
        home = (to, from);
    }
    Ok(())
}

/// What the report says of one migration is possible and agrees with itself.
fn figures_add_up(migration: &v1::Migration) -> anyhow::Result<()> {
    let progress = migration.progress.as_ref().context("no progress")?;
    let iterations = &progress.iterations;
    ensure!(
        iterations.len() >= 2,
        "a first and a final iteration: {progress:#?}"
    );
    for (index, one) in iterations.iter().enumerate() {
        ensure!(one.iteration as usize == index, "{one:?}");
        ensure!(one.r#final == (index + 1 == iterations.len()), "{one:?}");
    }
    let sum = |field: fn(&v1::MigrationIteration) -> u64| iterations.iter().map(field).sum::<u64>();
    ensure!(
        progress.pages_normal == sum(|one| one.pages_normal),
        "{progress:#?}"
    );
    ensure!(
        progress.pages_zero == sum(|one| one.pages_zero),
        "{progress:#?}"
    );
    ensure!(
        progress.bytes_transferred == sum(|one| one.bytes_transferred),
        "{progress:#?}"
    );
    ensure!(
        progress.pages_normal + progress.pages_zero >= progress.total_bytes / 4096,
        "pages were left out: {progress:#?}"
    );
    ensure!(
        progress.bytes_transferred >= progress.pages_normal * 4096,
        "{progress:#?}"
    );
    let last = progress.decisions.last().context("no decision")?;
    ensure!(last.action() == Action::Switchover, "{last:?}");
    let downtime = seconds(progress.downtime.as_ref());
    let parts = progress
        .downtime_breakdown
        .as_ref()
        .context("no breakdown")?;
    let sum: f64 = [
        &parts.pause,
        &parts.final_copy,
        &parts.state,
        &parts.commit,
        &parts.resume,
    ]
    .into_iter()
    .map(|part| seconds(part.as_ref()))
    .sum();
    ensure!(
        downtime > 0.0 && (sum - downtime).abs() < 1e-3,
        "{downtime} is not {parts:?}"
    );
    ensure!(
        downtime < seconds(progress.transfer_time.as_ref()),
        "{progress:#?}"
    );
    ensure!(seconds(progress.cpu_time.as_ref()) > 0.0, "{progress:#?}");
    ensure!(
        seconds(migration.destination_cpu_time.as_ref()) > 0.0,
        "{migration:#?}"
    );
    let phases: Vec<_> = migration
        .phase_times
        .iter()
        .map(v1::PhaseTime::phase)
        .collect();
    ensure!(
        phases.is_sorted() && phases.last() == Some(&MigrationPhase::Completed),
        "{phases:?}"
    );
    Ok(())
}

/// What one migration leaves behind stops the third after it: each host is a source and a
/// destination in turn.
async fn many_in_a_row_leave_nothing_at_either_host(fleet: &mut Fleet) -> anyhow::Result<()> {
    let spec = busy(fleet.backend(), 16, 1, Some(MIB));
    let vm = fleet.run_vm("nomad", "host-a", spec).await?;
    let mut home = ("host-a", "host-b");
    for _ in 0..12 {
        let (from, to) = home;
        fleet.migrate_and_wait(&vm.name, to, fast()).await?;
        fleet.vm_dir_gone(from, &vm.name).await?;
        fleet.memory_used(from, 0).await?;
        home = (to, from);
    }
    let after = fleet.runs_soundly_on(&vm.name, home.0).await?;
    ensure!(after.epoch == 13 && after.uid == vm.uid, "{after:#?}");
    Ok(())
}

async fn a_paused_vm_stays_paused_and_whole(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("still", "host-a", busy(fleet.backend(), 64, 1, None))
        .await?;
    let server = fleet.server();
    let pause = v1::PauseVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    fleet.vms(&server).pause_vm(pause).await?;
    let digest = || async {
        let request = v1::DigestMemoryRequest {
            vm: vm.name.clone(),
            ..Default::default()
        };
        let answer = fleet.memory(&server).digest_memory(request).await?;
        anyhow::Ok(answer.into_inner())
    };
    let before = digest().await?;
    ensure!(before == digest().await?, "a paused VM's memory changed");
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    let there = fleet
        .vm_until(&server, &vm.name, "PAUSED on host-b", |vm| {
            vm.host == "hosts/host-b" && vm.state() == v1::vm::State::Paused
        })
        .await?;
    ensure!(!there.dirty_logging, "{there:#?}");
    let after = digest().await?;
    ensure!(before == after, "{before:?} became {after:?}");
    let resume = v1::ResumeVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    fleet.vms(&server).resume_vm(resume).await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}

async fn zero_pages_are_not_sent_as_contents(fleet: &mut Fleet) -> anyhow::Result<()> {
    let mut spec = busy(fleet.backend(), 128, 1, Some(0));
    if let Some(v1::vm_spec::Guest::Memstress(memstress)) = &mut spec.guest {
        memstress.fill = v1::memstress::Fill::Zero.into();
    }
    let vm = fleet.run_vm("blank", "host-a", spec).await?;
    let params = verified(fast(), Verify::BeforeCommit);
    let done = fleet.migrate_and_wait(&vm.name, "host-b", params).await?;
    let progress = done.progress.context("no progress")?;
    ensure!(
        progress.verification() == Verification::Match,
        "{progress:#?}"
    );
    let pages = 128 * MIB / 4096;
    ensure!(progress.pages_zero > pages * 9 / 10, "{progress:#?}");
    ensure!(progress.bytes_transferred < 16 * MIB, "{progress:#?}");
    Ok(())
}
