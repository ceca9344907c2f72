//! The oracle of the kernel's memslot_modification_stress_test, through the API: a slot beside the
//! guest's memory is added and deleted more than two thousand times while the guest writes and
//! checks its own; it notices nothing.

use std::time::Instant;

use anyhow::ensure;
use slat_proto::v1;
use slat_tests::{
    Fleet,
    guest::busy,
    slots::{create, delete, list, update},
};

slat_tests::on_each_backend!(a_slot_comes_and_goes_thousands_of_times);

/// One call each: the vCPUs run on.
const SINGLE: u64 = 64;
/// Calls with many: one pause each.
const BATCHES: u64 = 4;
/// Pairs of changes in such a call.
const PAIRS: u64 = 512;
/// Just behind the guest's 32 MiB.
const BESIDE: u64 = 8192;

async fn a_slot_comes_and_goes_thousands_of_times(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", busy(fleet.backend(), 32, 2, None))
        .await?;
    let server = fleet.server();
    let before = list(fleet, &vm.name).await?;
    let begun = Instant::now();
    for round in 0..SINGLE {
        let pages = 1 + round * 37 % 600;
        let added = update(fleet, &vm.name, vec![create(7, BESIDE, pages)]).await?;
        let gone = update(fleet, &vm.name, vec![delete(7)]).await?;
        ensure!(added.paused_nanos == 0 && gone.paused_nanos == 0, "paused");
    }
    let single = begun.elapsed();
    let mut paused = 0;
    for _ in 0..BATCHES {
        let pairs = (0..PAIRS).flat_map(|at| [create(7, BESIDE, 1 + at % 9), delete(7)]);
        let done = update(fleet, &vm.name, pairs.collect()).await?;
        ensure!(done.paused_nanos > 0, "{done:?}");
        paused += done.paused_nanos;
    }
    let after = list(fleet, &vm.name).await?;
    ensure!(after.slots == before.slots, "{after:?}");
    ensure!(after.generation == before.generation + 2 * SINGLE + BATCHES);
    let sound = fleet.runs_soundly_on(&vm.name, "host-a").await?;
    ensure!(sound.guest_counters.is_some_and(|seen| seen.errors == 0));
    let dirty_logging = fleet.vm(&server, &vm.name).await?.dirty_logging;
    ensure!(!dirty_logging, "logging came on by itself");
    println!(
        "{}: {:?} a change through server and agent; {} changes in one pause of {} us",
        v1::Backend::as_str_name(&fleet.backend()),
        single / (2 * SINGLE) as u32,
        2 * PAIRS,
        paused / BATCHES / 1000
    );
    Ok(())
}
