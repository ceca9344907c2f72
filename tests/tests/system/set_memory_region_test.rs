//! The oracles of the kernel's set_memory_region_test, through the API under a running guest: slots
//! are added, moved, deleted, made read-only; overlaps and more than the most are refused.
//!
//! Memstress has memory of its own and checks it meanwhile, on both backends. The guest of the
//! tests on KVM alone uses the very slot that is changed: it ends when it finds nothing there,
//! or what it did not write.

use anyhow::{Context as _, ensure};
use slat_proto::{ApiError, Reason, v1};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, patient, usual, verified},
    scene,
    slots::{
        USED_GFN, USED_PAGES, create, delete, discard, goes_round, list, no_slot_user, read_only,
        relocate, run_slot_user, update,
    },
    wait::eventually,
};

slat_tests::on_each_backend!(
    slots_move_and_go_and_overlaps_are_refused,
    a_vm_has_as_many_slots_as_it_says,
    read_only_slots_migrate,
);

/// Far from the guest's own memory.
const PLACE: u64 = 1 << 20;

fn refused<T: std::fmt::Debug>(
    answer: Result<T, ApiError>,
    reason: Reason,
    metadata: (&str, &str),
) -> anyhow::Result<()> {
    let error = answer.err().context("it was done")?;
    let (key, value) = metadata;
    let seen = error.metadata.get(key).map(String::as_str);
    ensure!(error.reason == reason && seen == Some(value), "{error:?}");
    Ok(())
}

async fn slots_move_and_go_and_overlaps_are_refused(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let vm = vm.name.as_str();
    let added = update(
        fleet,
        vm,
        vec![create(5, PLACE, 512), create(6, PLACE + 512, 512)],
    )
    .await?;
    ensure!(added.paused_nanos == 0, "creating paused: {added:?}");
    ensure!(added.duration_nanos > 0);
    let overlap = Reason::BadSlotTable;
    for (change, other) in [
        (create(7, PLACE + 511, 1), "5"),
        (create(7, PLACE - 1, 2), "5"),
        (create(7, PLACE, 1024), "6"),
        (create(7, 16_383, 2), "0"),
        (relocate(5, PLACE + 1), "6"),
        (relocate(6, 0), "0"),
    ] {
        refused(
            update(fleet, vm, vec![change]).await,
            overlap,
            ("other_slot", other),
        )?;
    }
    // Onto its own frames, onto others, and both at once in one pause.
    let moved = update(fleet, vm, vec![relocate(5, PLACE - 10)]).await?;
    ensure!(moved.paused_nanos > 0, "{moved:?}");
    ensure!(moved.duration_nanos >= moved.paused_nanos, "{moved:?}");
    let swapped = vec![
        relocate(5, 3 * PLACE),
        relocate(6, PLACE),
        relocate(5, PLACE + 512),
    ];
    let swapped = update(fleet, vm, swapped).await?;
    let places: Vec<_> = swapped.slots[1..]
        .iter()
        .map(|slot| (slot.slot, slot.base_gfn))
        .collect();
    ensure!(places == [(6, PLACE), (5, PLACE + 512)], "{places:?}");
    let gone = update(fleet, vm, vec![delete(5)]).await?;
    ensure!(gone.paused_nanos == 0, "deleting one paused: {gone:?}");
    let none = update(fleet, vm, vec![delete(6)]).await?;
    ensure!(none.slots.len() == 1, "{none:?}");
    refused(
        update(fleet, vm, vec![delete(0)]).await,
        overlap,
        ("slot", "0"),
    )?;
    fleet.runs_soundly_on(vm, "host-a").await.map(drop)
}

async fn a_vm_has_as_many_slots_as_it_says(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let most = list(fleet, &vm.name).await?.max_slots;
    ensure!(most >= 509, "{most} slots");
    update(fleet, &vm.name, vec![create(most - 1, PLACE, 1)]).await?;
    let limit = most.to_string();
    // The API takes no number above 32,766.
    if most <= 32_766 {
        refused(
            update(fleet, &vm.name, vec![create(most, PLACE + 1, 1)]).await,
            Reason::LimitReached,
            ("limit", &limit),
        )?;
    }
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn read_only_slots_migrate(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let mut rom = create(5, PLACE, 512);
    if let Some(v1::slot_change::Change::Create(create)) = &mut rom.change {
        create.slot.as_mut().context("a slot")?.read_only = true;
    }
    update(fleet, &vm.name, vec![rom, create(6, 2 * PLACE, 512)]).await?;
    let set = update(fleet, &vm.name, vec![read_only(6, true)]).await?;
    ensure!(set.paused_nanos > 0, "{set:?}");
    let same = update(fleet, &vm.name, vec![read_only(5, true)]).await?;
    ensure!(same.slots == set.slots, "{same:?}");
    fleet.memory_used("host-a", 68 * MIB).await?;
    let shown = fleet.vm(&fleet.agent("host-a"), &vm.name).await?;
    ensure!(shown.memory_bytes == 68 * MIB, "{shown:#?}");

    let params = verified(patient(), v1::migration_params::Verify::BeforeCommit);
    fleet.migrate_and_wait(&vm.name, "host-b", params).await?;
    fleet.memory_used("host-b", 68 * MIB).await?;
    let there = list(fleet, &vm.name).await?;
    let flags: Vec<_> = there
        .slots
        .iter()
        .map(|slot| (slot.slot, slot.read_only))
        .collect();
    ensure!(flags == [(0, false), (5, true), (6, true)], "{there:?}");
    let back = vec![read_only(5, false), read_only(6, false)];
    let back = update(fleet, &vm.name, back).await?;
    ensure!(back.slots.iter().all(|slot| !slot.read_only), "{back:?}");
    update(fleet, &vm.name, vec![delete(5), delete(6)]).await?;
    eventually("the memory is given back", || {
        fleet.memory_used("host-b", 64 * MIB)
    })
    .await?;
    fleet.runs_soundly_on(&vm.name, "host-b").await.map(drop)
}

fn on_kvm_with_a_slot_user(test: impl AsyncFnOnce(&mut Fleet) -> anyhow::Result<()>) {
    match no_slot_user() {
        None => scene::run(Layout::two(v1::Backend::Kvm), test),
        Some(why) => println!("SKIPPED: {why}"),
    }
}

fn dropped(vm: &v1::Vm) -> u64 {
    let stats = vm.mmu_stats.as_ref();
    stats.and_then(|stats| stats.read_only_writes).unwrap_or(0)
}

/// Every change is made in one pause: the guest, which reads and writes the slot all the time, sees
/// what was before or what is after.
#[test]
fn a_guest_never_sees_a_slot_half_changed() {
    on_kvm_with_a_slot_user(async |fleet: &mut Fleet| {
        let vm = run_slot_user(fleet, "web", "host-a").await?.name;
        let mut batch = 0;
        goes_round(fleet, &vm, &mut batch).await?;
        for round in 0..10 {
            for changes in [
                vec![read_only(5, true)],
                vec![read_only(5, false)],
                vec![read_only(5, true), read_only(5, false)],
                vec![relocate(5, 1 << 20), relocate(5, USED_GFN)],
                vec![delete(5), create(5, USED_GFN, USED_PAGES)],
                vec![relocate(5, 1 << 20), create(6, USED_GFN, USED_PAGES)],
                vec![delete(6), relocate(5, USED_GFN)],
            ] {
                let done = update(fleet, &vm, changes.clone()).await?;
                ensure!(done.paused_nanos > 0, "{changes:?}: {done:?}");
                if round == 0 {
                    goes_round(fleet, &vm, &mut batch).await?;
                }
            }
            // Nothing of this takes memory away from where the guest uses it.
            update(fleet, &vm, vec![create(7, 1 << 21, 8)]).await?;
            update(fleet, &vm, vec![delete(7)]).await?;
        }
        // What is discarded reads zero; the guest writes its word again.
        discard(fleet, &vm, USED_GFN, USED_PAGES).await?;
        // The first may tell of a round from before, the second of one that had passed there.
        for _ in 0..3 {
            goes_round(fleet, &vm, &mut batch).await?;
        }
        // Of a guest that writes on, all may be there again before it is counted.
        let mut vms = fleet.vms(&fleet.server());
        let name = vm.clone();
        let pause = v1::PauseVmRequest {
            name: name.clone(),
            ..Default::default()
        };
        vms.pause_vm(pause).await?;
        let again = discard(fleet, &vm, USED_GFN, USED_PAGES).await?;
        ensure!(again.freed_bytes > 0, "{again:?}");
        let resume = v1::ResumeVmRequest {
            name,
            ..Default::default()
        };
        vms.resume_vm(resume).await?;
        goes_round(fleet, &vm, &mut batch).await.map(drop)
    });
}

#[test]
fn writes_to_a_read_only_slot_are_dropped_and_counted_wherever_the_vm_is() {
    on_kvm_with_a_slot_user(async |fleet: &mut Fleet| {
        let vm = run_slot_user(fleet, "web", "host-a").await?.name;
        let mut batch = 0;
        goes_round(fleet, &vm, &mut batch).await?;
        update(fleet, &vm, vec![read_only(5, true)]).await?;
        goes_round(fleet, &vm, &mut batch).await?;
        let written = goes_round(fleet, &vm, &mut batch).await?;
        ensure!(
            written.iter().all(|range| range.gfn < USED_GFN),
            "a read-only slot was written: {written:?}"
        );
        let agent = fleet.agent("host-a");
        let counts = |vm: &v1::Vm| dropped(vm) > 10;
        fleet
            .vm_until(&agent, &vm, "dropped writes", counts)
            .await?;
        let params = verified(patient(), v1::migration_params::Verify::BeforeCommit);
        fleet.migrate_and_wait(&vm, "host-b", params).await?;
        // The word that it wrote is there, or it would have ended.
        let agent = fleet.agent("host-b");
        fleet
            .vm_until(&agent, &vm, "dropped writes", counts)
            .await?;

        // Memory that is taken away under the guest's hands ends it, by name.
        update(fleet, &vm, vec![delete(5)]).await?;
        let failed = |vm: &v1::Vm| vm.state() == v1::vm::State::Failed;
        let ended = fleet.vm_until(&agent, &vm, "it ends", failed).await?;
        ensure!(
            ended.state_message.contains("0x1000000, where no slot is")
                || ended.state_message.contains("0x1000008, where no slot is"),
            "{ended:#?}"
        );
        Ok(())
    });
}
