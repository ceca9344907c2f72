//! Pages that are mapped before the guest touches them, as the kernel's `pre_fault_memory_test`
//! asks of KVM_PRE_FAULT_MEMORY: the whole, a part and an offset of a slot; beyond its end, where
//! progress comes first and then the error; and beside a slot that comes and goes. Mappings are
//! looked at in the mirror and in the kernel's page tables. And a save's working set, which a lazy
//! restore reads first.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use slat_proto::{ApiError, Reason, v1, v1::slot_change::Change};
use slat_tests::{Fleet, guest::MIB, scene};

use super::{
    oracles::{kernel_says, mirror_says, views},
    sound, status, watched,
};

/// A VM that has never run: nothing of it is mapped.
async fn created(fleet: &Fleet, spec: v1::VmSpec) -> anyhow::Result<(v1::Vm, v1::Slot)> {
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        host: "hosts/host-a".into(),
        spec: Some(spec),
        ..Default::default()
    };
    let mut client = fleet.vms(&fleet.server());
    let vm = client.create_vm(request).await?.into_inner();
    let slots = slots(fleet, &vm.name).await?;
    let last = slots.into_iter().max_by_key(|slot| slot.base_gfn);
    Ok((vm, last.context("no slot")?))
}

async fn slots(fleet: &Fleet, vm: &str) -> anyhow::Result<Vec<v1::Slot>> {
    let request = v1::ListSlotsRequest {
        vm: vm.into(),
        ..Default::default()
    };
    let slots = fleet.memory(&fleet.server()).list_slots(request).await?;
    Ok(slots.into_inner().slots)
}

async fn prefault(
    fleet: &Fleet,
    vm: &str,
    gfn: u64,
    pages: u64,
) -> Result<v1::PrefaultMemoryResponse, ApiError> {
    let request = v1::PrefaultMemoryRequest {
        name: vm.into(),
        gfn,
        pages,
        ..Default::default()
    };
    let mut client = fleet.paging(&fleet.server());
    let answer = client.prefault_memory(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(ApiError::from)
}

async fn update(fleet: &Fleet, vm: &str, change: Change) -> anyhow::Result<()> {
    let request = v1::UpdateSlotsRequest {
        vm: vm.into(),
        changes: vec![v1::SlotChange {
            change: Some(change),
        }],
        ..Default::default()
    };
    fleet.memory(&fleet.server()).update_slots(request).await?;
    Ok(())
}

/// What is mapped, by the mirror and by the kernel, which must say the same.
async fn mapped(fleet: &Fleet, vm: &v1::Vm) -> anyhow::Result<BTreeSet<u64>> {
    let mirror = mirror_says(fleet, &vm.name).await?;
    let views = views(vm.pid)?;
    let mut kernel = std::collections::BTreeMap::new();
    for slot in slots(fleet, &vm.name).await? {
        let view = views.get(&slot.slot);
        let view = view.context("a slot that nobody watches")?;
        kernel.extend(kernel_says(vm.pid, *view, &slot)?);
    }
    ensure!(
        mirror == kernel,
        "{} pages in the mirror, {} in the kernel's tables",
        mirror.len(),
        kernel.len()
    );
    ensure!(mirror.values().all(|writable| *writable));
    Ok(mirror.into_keys().collect())
}

#[test]
fn pre_fault_memory_test() {
    scene::paged(async |fleet| {
        let (vm, slot) = created(fleet, watched(64, 1, None)).await?;
        let (base, end) = (slot.base_gfn, slot.base_gfn + slot.pages);
        let mut wanted = BTreeSet::new();
        // A part at an offset; a part that overlaps it; the whole.
        for (gfn, pages) in [
            (base + 1000, 600),
            (base + 1500, 1),
            (base + 1555, 300),
            (base, slot.pages),
        ] {
            let done = prefault(fleet, &vm.name, gfn, pages).await?;
            ensure!(done.pages == pages && done.next_gfn == 0, "{done:?}");
            wanted.extend(gfn..gfn + pages);
            let found = mapped(fleet, &vm).await?;
            ensure!(
                found == wanted,
                "{} pages, not {}",
                found.len(),
                wanted.len()
            );
        }
        // Beyond the end: progress first, then the error.
        let done = prefault(fleet, &vm.name, end - 7, 20).await?;
        ensure!(done.pages == 7 && done.next_gfn == end, "{done:?}");
        let error = prefault(fleet, &vm.name, done.next_gfn, 13).await;
        let error = error.unwrap_err();
        ensure!(error.reason == Reason::BadParameter, "{error:#?}");
        ensure!(error.metadata["gfn"] == end.to_string(), "{error:#?}");
        let none = prefault(fleet, &vm.name, base, 0).await.unwrap_err();
        ensure!(none.reason == Reason::BadParameter, "{none:#?}");
        // It runs on what was mapped without a fault.
        let before = status(&fleet.vm(&fleet.server(), &vm.name).await?)?.clone();
        let start = v1::StartVmRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).start_vm(start).await?;
        let now = fleet.runs_soundly_on(&vm.name, "host-a").await?;
        sound(&now)?;
        let after = status(&now)?;
        let faults = |of: &v1::PagingStatus| of.faults_missing + of.faults_minor;
        ensure!(faults(after) == faults(&before), "{before:#?} {after:#?}");
        Ok(())
    });
}

/// The kernel's test has a thread that deletes the slot meanwhile.
#[test]
fn pre_fault_memory_test_with_a_slot_that_comes_and_goes() {
    scene::paged(async |fleet| {
        let (vm, slot) = created(fleet, watched(64, 1, None)).await?;
        let end = slot.base_gfn + slot.pages;
        let come = Change::Create(v1::slot_change::Create {
            slot: Some(v1::Slot {
                slot: 9,
                base_gfn: end,
                pages: 512,
                ..Default::default()
            }),
        });
        let go = Change::Delete(v1::slot_change::Delete { slot: 9 });
        let changes = async {
            for _ in 0..15 {
                update(fleet, &vm.name, come).await?;
                update(fleet, &vm.name, go).await?;
            }
            anyhow::Ok(())
        };
        let prefaults = async {
            for _ in 0..30 {
                let done = prefault(fleet, &vm.name, end - 8, 8 + 512).await?;
                ensure!((8..=520).contains(&done.pages), "{done:?}");
                match prefault(fleet, &vm.name, end, 512).await {
                    Ok(done) => ensure!((1..=512).contains(&done.pages), "{done:?}"),
                    Err(error) => ensure!(error.reason == Reason::BadParameter, "{error:#?}"),
                }
            }
            Ok(())
        };
        tokio::try_join!(changes, prefaults)?;
        let found = mapped(fleet, &vm).await?;
        ensure!(found == (end - 8..end).collect(), "{} pages", found.len());
        Ok(())
    });
}

#[test]
fn a_guest_that_the_kernel_pages_is_refused_by_name() {
    scene::paged(async |fleet| {
        let spec = slat_tests::guest::usual(v1::Backend::Kvm);
        let (vm, slot) = created(fleet, spec).await?;
        let error = prefault(fleet, &vm.name, slot.base_gfn, 1).await;
        let error = error.unwrap_err();
        ensure!(error.reason == Reason::CapabilityMissing, "{error:#?}");
        ensure!(error.metadata.contains_key("advice"), "{error:#?}");
        Ok(())
    });
}

#[test]
fn a_lazy_restore_knows_the_working_set_of_its_save() {
    scene::paged(async |fleet| {
        let spec = watched(64, 1, Some(8 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let mapped = status(&fleet.runs_soundly_on(&vm.name, "host-a").await?)?.mapped_pages;
        let save = fleet.save(&vm.name, "one").await?;
        let copy = fleet.restore(&save.name, "copy", true).await?;
        let loaded = fleet
            .vm_until(
                &fleet.server(),
                &copy.name,
                "its working set is there",
                |vm| {
                    vm.paging.as_ref().is_some_and(|paging| {
                        let all = paging.working_set_bytes;
                        all > 0 && paging.working_set_loaded_bytes == all
                    })
                },
            )
            .await?;
        let all = status(&loaded)?.working_set_bytes;
        ensure!(
            all >= mapped * 4096 / 2 && all <= 64 * MIB,
            "{all} of {mapped} pages"
        );
        sound(&fleet.runs_soundly_on(&copy.name, "host-a").await?)
    });
}
