//! The functional part of the kernel's memslot_perf_test, through the API under a running guest: a
//! thousand slots are mapped, moved, migrated, discarded and unmapped. What it takes is printed,
//! and is no part of the oracle.

use std::time::Duration;

use anyhow::ensure;
use slat_proto::v1;
use slat_tests::{
    Fleet,
    guest::{MIB, patient, usual, verified},
    slots::{create, delete, discard, list, relocate, update},
};

slat_tests::on_each_backend!(a_thousand_slots);

const SLOTS: u32 = 1000;
/// Of a slot; there is as much space between two.
const PAGES: u64 = 2;
const PLACE: u64 = 1 << 20;
const ELSEWHERE: u64 = (3 << 20) + 1;

fn at(base: u64, slot: u32) -> u64 {
    base + u64::from(slot) * 2 * PAGES
}

fn changes(of: impl Fn(u32) -> v1::SlotChange) -> Vec<v1::SlotChange> {
    (1..=SLOTS).map(of).collect()
}

async fn a_thousand_slots(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?
        .name;
    let report = |what: &str, done: &v1::UpdateSlotsResponse| {
        println!(
            "{}: {what} {SLOTS} slots: {:?}, paused {:?}",
            v1::Backend::as_str_name(&fleet.backend()),
            Duration::from_nanos(done.duration_nanos),
            Duration::from_nanos(done.paused_nanos)
        );
    };
    let placed = |slots: &[v1::Slot], base: u64| {
        slots.len() == SLOTS as usize + 1
            && slots.iter().all(|slot| {
                slot.slot == 0 || (slot.base_gfn, slot.pages) == (at(base, slot.slot), PAGES)
            })
    };
    let done = update(
        fleet,
        &vm,
        changes(|slot| create(slot, at(PLACE, slot), PAGES)),
    )
    .await?;
    report("map", &done);
    ensure!(done.paused_nanos == 0 && placed(&done.slots, PLACE), "map");
    fleet
        .memory_used("host-a", 64 * MIB + u64::from(SLOTS) * PAGES * 4096)
        .await?;
    let done = update(
        fleet,
        &vm,
        changes(|slot| relocate(slot, at(ELSEWHERE, slot))),
    )
    .await?;
    report("move", &done);
    ensure!(
        done.paused_nanos > 0 && placed(&done.slots, ELSEWHERE),
        "move"
    );
    fleet.runs_soundly_on(&vm, "host-a").await?;

    let params = verified(patient(), v1::migration_params::Verify::BeforeCommit);
    let moved = fleet.migrate_and_wait(&vm, "host-b", params).await?;
    let progress = moved.progress.unwrap_or_default();
    println!("downtime with {SLOTS} slots: {:?}", progress.downtime);
    let there = list(fleet, &vm).await?;
    ensure!(placed(&there.slots, ELSEWHERE), "the table went along");
    ensure!(there.generation == done.generation, "{}", there.generation);
    // A destination populates its memory.
    let freed = discard(fleet, &vm, at(ELSEWHERE, 1), PAGES).await?;
    ensure!(freed.freed_bytes == PAGES * 4096, "{freed:?}");
    let done = update(fleet, &vm, changes(delete)).await?;
    report("unmap", &done);
    ensure!(done.paused_nanos > 0 && done.slots.len() == 1, "unmap");
    fleet.runs_soundly_on(&vm, "host-b").await?;
    fleet.memory_used("host-b", 64 * MIB).await
}
