//! What the kernel's own tests ask of paging in user space, asked through Slat's API on KVM, and
//! the mirror held against the kernel's page tables.
//!
//! * `demand_paging_test`: every page that the guest touches is served by the handler, missing and
//!   minor, and holds what it should.
//! * The mirror says what `/proc/PID/pagemap` says, page by page.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader},
    os::unix::fs::FileExt as _,
};

use anyhow::{Context as _, ensure};
use slat_proto::v1;
use slat_tests::{
    Fleet,
    guest::{MIB, busy},
    scene,
};

use super::{sound, status, watched};

const PRESENT: u64 = 1 << 63;
const PROTECTED: u64 = 1 << 57;
const PAGE: u64 = 4096;

/// Where the watched view of each slot is in a VM's process, by the slot's number.
pub(super) fn views(pid: u32) -> anyhow::Result<BTreeMap<u32, u64>> {
    let mut views = BTreeMap::new();
    let mut at = None;
    for line in BufReader::new(File::open(format!("/proc/{pid}/smaps"))?).lines() {
        let line = line?;
        if let Some((range, rest)) = line.split_once(' ')
            && let Some((start, _)) = range.split_once('-')
            && let Ok(start) = u64::from_str_radix(start, 16)
        {
            let slot = rest.split_once("memfd:slat-slot").map(|(_, name)| name);
            let slot = slot.and_then(|name| name.split([' ', '-']).next()?.parse().ok());
            at = slot.map(|slot: u32| (slot, start));
        }
        // Watched: missing (um), minor (ui), protected (uw).
        if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split(' ').any(|flag| matches!(flag, "um" | "ui"))
            && let Some((slot, start)) = at
        {
            views.insert(slot, start);
        }
    }
    Ok(views)
}

/// What the kernel maps of a slot: by frame, whether it may be written.
pub(super) fn kernel_says(
    pid: u32,
    view: u64,
    slot: &v1::Slot,
) -> anyhow::Result<BTreeMap<u64, bool>> {
    let mut entries = vec![0; slot.pages as usize * 8];
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    pagemap.read_exact_at(&mut entries, view / PAGE * 8)?;
    let (entries, _) = entries.as_chunks::<8>();
    let entries = entries.iter().map(|entry| u64::from_ne_bytes(*entry));
    let mapped = (slot.base_gfn..).zip(entries);
    let mapped = mapped.filter(|(_, entry)| entry & PRESENT != 0);
    Ok(mapped
        .map(|(gfn, entry)| (gfn, entry & PROTECTED == 0))
        .collect())
}

/// What the mirror maps.
pub(super) async fn mirror_says(fleet: &Fleet, vm: &str) -> anyhow::Result<BTreeMap<u64, bool>> {
    let mut mapped = BTreeMap::new();
    let mut from_gfn = 0;
    loop {
        let request = v1::ListMappingsRequest {
            name: vm.into(),
            from_gfn,
            ..Default::default()
        };
        let mut client = fleet.paging(&fleet.server());
        let answer = client.list_mappings(request).await?.into_inner();
        for run in answer.runs {
            mapped.extend((run.gfn..run.gfn + run.pages).map(|gfn| (gfn, run.writable)));
        }
        if answer.next_gfn == 0 {
            return Ok(mapped);
        }
        from_gfn = answer.next_gfn;
    }
}

/// Pauses the guest and compares.
async fn equal(fleet: &Fleet, vm: &str) -> anyhow::Result<u64> {
    let request = v1::PauseVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    let paused = fleet
        .vms(&fleet.server())
        .pause_vm(request)
        .await?
        .into_inner();
    let mirror = mirror_says(fleet, vm).await?;
    let request = v1::ListSlotsRequest {
        vm: vm.into(),
        ..Default::default()
    };
    let slots = fleet.memory(&fleet.server()).list_slots(request).await?;
    let views = views(paused.pid)?;
    let mut kernel = BTreeMap::new();
    for slot in &slots.into_inner().slots {
        let view = views
            .get(&slot.slot)
            .context("a slot that nobody watches")?;
        kernel.extend(kernel_says(paused.pid, *view, slot)?);
    }
    let differ = kernel
        .iter()
        .filter(|(gfn, leave)| mirror.get(gfn) != Some(leave));
    let differ: Vec<_> = differ.take(8).collect();
    ensure!(
        differ.is_empty(),
        "the kernel has, the mirror has not: {differ:?}"
    );
    let more = mirror.iter().filter(|(gfn, _)| !kernel.contains_key(gfn));
    let more: Vec<_> = more.take(8).collect();
    ensure!(
        more.is_empty(),
        "the mirror has, the kernel has not: {more:?}"
    );
    super::resume(fleet, vm).await?;
    Ok(mirror.len() as u64)
}

#[test]
fn the_mirror_is_what_the_kernel_maps() {
    scene::paged(async |fleet| {
        let spec = watched(64, 2, Some(32 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?.name;
        println!("{} pages equal", equal(fleet, &vm).await?);
        // After everything that changes mappings.
        let whole = v1::InvalidateMemoryRequest {
            vm: vm.clone(),
            ..Default::default()
        };
        fleet
            .memory(&fleet.server())
            .invalidate_memory(whole)
            .await?;
        println!("{} pages equal", equal(fleet, &vm).await?);
        fleet.fork(&vm, &["child"]).await?;
        println!("{} pages equal", equal(fleet, &vm).await?);
        println!("{} pages equal", equal(fleet, "vms/child").await?);
        Ok(())
    });
}

/// Missing: new memory. The handler serves each page that the guest touches.
#[test]
fn demand_paging_test_missing() {
    scene::paged(async |fleet| {
        let vm = fleet
            .run_vm("web", "host-a", watched(64, 4, None))
            .await?
            .name;
        let pages = 64 * MIB / PAGE;
        let all = fleet
            .vm_until(&fleet.server(), &vm, "all its pages were touched", |vm| {
                let passes = vm.guest_counters.map_or(0, |counters| counters.passes);
                vm.paging.as_ref().is_some_and(|paging| {
                    let served =
                        paging.faults_missing + paging.faults_minor + paging.pages_prefetched;
                    passes >= 2 && served >= pages / 2
                })
            })
            .await?;
        sound(&all)?;
        let paging = status(&all)?;
        ensure!(paging.mapped_pages <= pages, "{paging:#?}");
        Ok(())
    });
}

/// Minor: pages that are in the file already, with contents that the guest knows.
#[test]
fn demand_paging_test_minor() {
    scene::paged(async |fleet| {
        let spec = busy(v1::Backend::Kvm, 64, 4, None);
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let save = fleet.save(&vm.name, "one").await?;
        super::delete(fleet, &vm.name).await?;
        let request = v1::RestoreVmRequest {
            save: save.name,
            vm_id: "copy".into(),
            start: true,
            paging: v1::Paging::Agent.into(),
            ..Default::default()
        };
        let mut client = fleet.snapshots(&fleet.server());
        let copy = client
            .restore_vm(request)
            .await?
            .into_inner()
            .vm
            .context("no VM")?;
        fleet.runs_soundly_on(&copy.name, "host-a").await?;
        fleet
            .vm_until(&fleet.server(), &copy.name, "its faults are told", |vm| {
                vm.paging
                    .as_ref()
                    .is_some_and(|paging| paging.faults_minor > 0)
            })
            .await?;
        println!("{} pages equal", equal(fleet, &copy.name).await?);
        sound(&fleet.runs_soundly_on(&copy.name, "host-a").await?)
    });
}
