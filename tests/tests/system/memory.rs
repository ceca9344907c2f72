//! MemoryService on running VMs: dirty cursors beside a migration, invalidation under load, the
//! digest's condition.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, MigrationPhase},
};
use slat_tests::{
    Fleet,
    guest::{MIB, busy, crawling, fast, paced, usual, verified},
    slots::discard,
    wait::eventually,
};

slat_tests::on_each_backend!(
    a_cursor_sees_every_write_and_no_other,
    a_migration_and_a_cursor_share_the_dirty_log,
    invalidation_costs_faults_and_nothing_else,
    slots_come_and_go_and_move,
    what_is_discarded_is_gone_for_the_guest_and_the_host,
    a_migration_takes_what_is_discarded_along,
);

async fn harvest(
    fleet: &Fleet,
    vm: &str,
    acknowledge: u64,
) -> Result<v1::HarvestDirtyPagesResponse, ApiError> {
    let request = v1::HarvestDirtyPagesRequest {
        vm: vm.into(),
        cursor: "backup".into(),
        acknowledge_batch: acknowledge,
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    Ok(memory.harvest_dirty_pages(request).await?.into_inner())
}

async fn pause(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::PauseVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).pause_vm(request).await?;
    Ok(())
}

async fn resume(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::ResumeVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).resume_vm(request).await?;
    Ok(())
}

async fn delete_cursor(fleet: &Fleet, vm: &str) -> Result<(), ApiError> {
    let request = v1::DeleteDirtyCursorRequest {
        vm: vm.into(),
        cursor: "backup".into(),
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    memory.delete_dirty_cursor(request).await?;
    Ok(())
}

async fn until_dirty(fleet: &Fleet, vm: &str, mut acknowledge: u64) -> anyhow::Result<u64> {
    loop {
        let batch = harvest(fleet, vm, acknowledge).await?;
        if batch.dirty_pages > 0 {
            let sum: u64 = batch.ranges.iter().map(|range| range.pages).sum();
            ensure!(sum == batch.dirty_pages, "{batch:?}");
            return Ok(batch.batch);
        }
        acknowledge = batch.batch;
        // Bounded by the test's own limit; each call takes its turn at the VM's process.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

async fn a_cursor_sees_every_write_and_no_other(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let first = harvest(fleet, &vm.name, 0).await?;
    ensure!(first.created && first.dirty_pages == 0, "{first:?}");
    let batch = until_dirty(fleet, &vm.name, first.batch).await?;

    // Not acknowledged: it comes back. Paused and acknowledged: nothing does.
    pause(fleet, &vm.name).await?;
    let again = harvest(fleet, &vm.name, 0).await?;
    ensure!(again.dirty_pages > 0 && again.batch > batch, "{again:?}");
    let repeated = harvest(fleet, &vm.name, 0).await?;
    ensure!(
        repeated.ranges == again.ranges,
        "{again:?} became {repeated:?}"
    );
    let rest = harvest(fleet, &vm.name, repeated.batch).await?;
    ensure!(rest.dirty_pages == 0, "a paused guest wrote: {rest:?}");
    let ends = rest.batch;
    resume(fleet, &vm.name).await?;
    let batch = until_dirty(fleet, &vm.name, ends).await?;
    ensure!(batch > ends, "{batch}");

    delete_cursor(fleet, &vm.name).await?;
    let error = delete_cursor(fleet, &vm.name).await.err();
    ensure!(
        error.as_ref().map(|error| error.reason) == Some(Reason::NoSuchCursor),
        "{error:?}"
    );
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn a_migration_and_a_cursor_share_the_dirty_log(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let created = harvest(fleet, &vm.name, 0).await?;
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    let batch = until_dirty(fleet, &vm.name, created.batch).await?;
    let cancel = v1::CancelMigrationRequest {
        name: migration.name.clone(),
    };
    fleet.migrations().cancel_migration(cancel).await?;
    fleet
        .migration_ends(&migration.name, MigrationPhase::Cancelled)
        .await?;
    // Logging is as the migration found it: on, for the cursor.
    let after = fleet.vm(&fleet.agent("host-a"), &vm.name).await?;
    ensure!(after.dirty_logging, "{after:#?}");
    until_dirty(fleet, &vm.name, batch).await?;

    // The cursor is the source's; the VM that moved has none.
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await?;
    let error = delete_cursor(fleet, &vm.name).await.err();
    ensure!(
        error.as_ref().map(|error| error.reason) == Some(Reason::NoSuchCursor),
        "{error:?}"
    );
    Ok(())
}

async fn invalidation_costs_faults_and_nothing_else(fleet: &mut Fleet) -> anyhow::Result<()> {
    // Round and round over all pages: after one more round everything is mapped again.
    let mut spec = busy(fleet.backend(), 32, 2, None);
    if let Some(v1::vm_spec::Guest::Memstress(memstress)) = &mut spec.guest {
        memstress.pattern = v1::memstress::Pattern::Sequential.into();
    }
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let server = fleet.server();
    let faults = |vm: &v1::Vm| vm.mmu_stats.as_ref().and_then(|stats| stats.faults_taken);
    let passes = |vm: &v1::Vm| vm.guest_counters.map_or(0, |counters| counters.passes);
    let rounds = async |more: u64| {
        let start = passes(&fleet.vm(&server, &vm.name).await?);
        fleet
            .vm_until(&server, &vm.name, "rounds over memory", |vm| {
                passes(vm) >= start + more
            })
            .await
    };
    let mut before = faults(&rounds(2).await?).context("faults are not counted")?;
    for range in [
        None,
        Some(v1::GfnRange {
            gfn: 4096,
            pages: 1024,
        }),
    ] {
        let request = v1::InvalidateMemoryRequest {
            vm: vm.name.clone(),
            range,
            ..Default::default()
        };
        let answer = fleet.memory(&server).invalidate_memory(request).await?;
        let pages = range.map_or(8192, |range| range.pages);
        ensure!(answer.get_ref().pages == pages, "{answer:?}");
        let after = faults(&rounds(3).await?).context("faults are not counted")?;
        // Mappings are of 2 MiB at most.
        ensure!(
            after >= before + pages / 512,
            "{before} became {after} after {pages} pages"
        );
        before = after;
    }
    fleet.runs_soundly_on(&vm.name, "host-a").await?;

    let digest = || async {
        let request = v1::DigestMemoryRequest {
            vm: vm.name.clone(),
            ..Default::default()
        };
        let answer = fleet.memory(&server).digest_memory(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(ApiError::from)
    };
    let error = digest().await.err().context("a running VM has a digest")?;
    ensure!(error.reason == Reason::VmRunning, "{error:?}");
    pause(fleet, &vm.name).await?;
    let before = digest().await?;
    let request = v1::InvalidateMemoryRequest {
        vm: vm.name.clone(),
        range: None,
        ..Default::default()
    };
    fleet.memory(&server).invalidate_memory(request).await?;
    let after = digest().await?;
    ensure!(before == after, "invalidation changed contents");
    resume(fleet, &vm.name).await?;
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn slots_come_and_go_and_move(fleet: &mut Fleet) -> anyhow::Result<()> {
    use v1::slot_change::Change;
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let server = fleet.server();
    let update = |change: Change| {
        let request = v1::UpdateSlotsRequest {
            vm: vm.name.clone(),
            changes: vec![v1::SlotChange {
                change: Some(change),
            }],
            expected_generation: 0,
            ..Default::default()
        };
        let mut memory = fleet.memory(&server);
        async move {
            memory
                .update_slots(request)
                .await
                .map(tonic::Response::into_inner)
        }
    };
    let added = update(Change::Create(v1::slot_change::Create {
        slot: Some(v1::Slot {
            slot: 7,
            base_gfn: 1 << 20,
            pages: 4096,
            ..Default::default()
        }),
    }))
    .await?;
    ensure!(
        added.slots.len() == 2 && added.slots[1].pages == 4096,
        "{added:?}"
    );
    fleet.memory_used("host-a", 80 * MIB).await?;
    let moved = update(Change::Move(v1::slot_change::Move {
        slot: 7,
        base_gfn: 3 << 20,
    }))
    .await?;
    ensure!(moved.slots[1].base_gfn == 3 << 20, "{moved:?}");
    ensure!(moved.generation == added.generation + 1, "{moved:?}");

    // The table goes with the VM.
    fleet.migrate_and_wait(&vm.name, "host-b", fast()).await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await?;
    let request = v1::ListSlotsRequest {
        vm: vm.name.clone(),
        ..Default::default()
    };
    let there = fleet
        .memory(&server)
        .list_slots(request)
        .await?
        .into_inner();
    let places = |slots: &[v1::Slot]| {
        slots
            .iter()
            .map(|slot| (slot.slot, slot.base_gfn, slot.pages))
            .collect::<Vec<_>>()
    };
    ensure!(places(&there.slots) == places(&moved.slots), "{there:?}");
    let gone = update(Change::Delete(v1::slot_change::Delete { slot: 7 })).await?;
    ensure!(gone.slots.len() == 1, "{gone:?}");
    eventually("the memory is given back", || {
        fleet.memory_used("host-b", 64 * MIB)
    })
    .await
}

/// Memstress finds what it did not write: here that is the proof that its pages are gone.
async fn what_is_discarded_is_gone_for_the_guest_and_the_host(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", busy(fleet.backend(), 32, 1, None))
        .await?;
    // In the middle of its pages: its fill wrote all of them.
    let discarded = discard(fleet, &vm.name, 4096, 2048).await?;
    ensure!(discarded.pages == 2048, "{discarded:?}");
    // It writes on meanwhile.
    ensure!(
        (4 * MIB..=8 * MIB).contains(&discarded.freed_bytes),
        "{discarded:?}"
    );
    ensure!(discarded.duration_nanos > 0, "{discarded:?}");
    let server = fleet.server();
    let errors = |vm: &v1::Vm| vm.guest_counters.is_some_and(|seen| seen.errors > 0);
    fleet
        .vm_until(&server, &vm.name, "the guest misses its pages", errors)
        .await?;
    let now = fleet.vm(&server, &vm.name).await?;
    ensure!(now.state() == v1::vm::State::Running, "{now:#?}");
    fleet.memory_used("host-a", 32 * MIB).await
}

/// In the middle of precopy, where it has been sent already and where it has not: digests are
/// compared.
async fn a_migration_takes_what_is_discarded_along(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", busy(fleet.backend(), 32, 1, Some(MIB)))
        .await?;
    let params = verified(paced(8 * MIB), v1::migration_params::Verify::BeforeCommit);
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", params)
        .await?;
    for gfn in [512, 2048, 4096, 6144, 7000] {
        discard(fleet, &vm.name, gfn, 256).await?;
    }
    fleet
        .migration_ends(&migration.name, MigrationPhase::Completed)
        .await?;
    let there = fleet.vm(&fleet.agent("host-b"), &vm.name).await?;
    ensure!(there.state() == v1::vm::State::Running, "{there:#?}");
    Ok(())
}
