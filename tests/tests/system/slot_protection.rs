//! A slot is taken away and put back, protected and opened again under a guest that writes it all
//! the time. What it writes arrives before and after, and nothing in between. The guest exists for
//! every architecture, unlike that of `mmu_stress_test`.

use anyhow::ensure;
use slat_proto::v1;
use slat_tests::{
    Fleet, Layout, scene,
    slots::{
        USED_GFN, USED_PAGES, create, delete, goes_round, no_slot_user, read_only, run_slot_user,
        update,
    },
};

const ROUNDS: usize = 5;
/// Times that the guest may go round before the log must say that it wrote the slot.
const LOOKS: usize = 5;

fn in_slot(ranges: &[v1::GfnRange]) -> bool {
    ranges
        .iter()
        .any(|range| (range.gfn..range.gfn + range.pages).contains(&USED_GFN))
}

/// Until the guest is seen to write the slot.
async fn writes_arrive(fleet: &Fleet, vm: &str, batch: &mut u64) -> anyhow::Result<()> {
    for _ in 0..LOOKS {
        if in_slot(&goes_round(fleet, vm, batch).await?) {
            return Ok(());
        }
    }
    anyhow::bail!("the guest goes round and writes no slot")
}

#[test]
fn writes_stop_at_protection_and_go_on_after_it() {
    if let Some(why) = no_slot_user() {
        println!("SKIPPED: {why}");
        return;
    }
    scene::run(Layout::two(v1::Backend::Kvm), async |fleet: &mut Fleet| {
        let vm = run_slot_user(fleet, "web", "host-a").await?.name;
        let mut batch = 0;
        for _ in 0..ROUNDS {
            writes_arrive(fleet, &vm, &mut batch).await?;
            let anew = vec![delete(5), create(5, USED_GFN, USED_PAGES)];
            update(fleet, &vm, anew).await?;
            // A new slot is dirty as a whole, once.
            goes_round(fleet, &vm, &mut batch).await?;
            writes_arrive(fleet, &vm, &mut batch).await?;
            update(fleet, &vm, vec![read_only(5, true)]).await?;
            // What was written until then.
            goes_round(fleet, &vm, &mut batch).await?;
            let written = goes_round(fleet, &vm, &mut batch).await?;
            ensure!(!in_slot(&written), "a protected slot was written");
            update(fleet, &vm, vec![read_only(5, false)]).await?;
            goes_round(fleet, &vm, &mut batch).await?;
        }
        writes_arrive(fleet, &vm, &mut batch).await
    });
}
