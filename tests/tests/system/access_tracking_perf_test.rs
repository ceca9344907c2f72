//! What the API has of the kernel's access_tracking_perf_test: there pages are marked idle, vCPUs
//! write or read some, and those must not be idle any more, while the others are. Here a
//! measurement marks all of a VM's memory, and what the guest writes while it lasts is its working
//! set; memory that it leaves alone must not count.
//!
//! Reads are seen by no call of the API, on either backend: that part is SKIPPED, by name.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use slat_proto::{
    model::proto_duration,
    v1::{self, measure_dirty_rate_request::Mode, vm_spec::Guest},
};
use slat_tests::{
    Fleet,
    guest::{MIB, busy},
    slots::{create, update},
    wait::eventually,
};

slat_tests::on_each_backend!(
    written_pages_are_the_working_set_and_idle_ones_are_not,
    an_idle_guest_has_none,
    reads_change_nothing,
);

const MEMORY_MIB: u64 = 8;
const VCPUS: u32 = 2;
/// A slot that the guest never touches, four times its own memory.
const IDLE_PAGES: u64 = 4 * MEMORY_MIB * MIB / 4096;
const IDLE_GFN: u64 = 1 << 20;

async fn measure(
    fleet: &Fleet,
    vm: &str,
    mode: Mode,
) -> anyhow::Result<v1::MeasureDirtyRateResponse> {
    let request = v1::MeasureDirtyRateRequest {
        vm: vm.into(),
        mode: mode.into(),
        duration: Some(proto_duration(Duration::from_secs(1))),
        sample_pages_per_gib: 16_384,
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    Ok(memory.measure_dirty_rate(request).await?.into_inner())
}

async fn written_pages_are_the_working_set_and_idle_ones_are_not(
    fleet: &mut Fleet,
) -> anyhow::Result<()> {
    let spec = busy(fleet.backend(), MEMORY_MIB, VCPUS, None);
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    update(fleet, &vm.name, vec![create(5, IDLE_GFN, IDLE_PAGES)]).await?;
    let own = MEMORY_MIB * MIB / 4096;
    let pages = vm.guest_counters.context("no counters")?.pages;
    // The guest goes over its memory many times a second, unless the machine has no time for it.
    let found = eventually("most of the working set is found", || async {
        let found = measure(fleet, &vm.name, Mode::Unspecified).await?;
        ensure!(found.distinct_pages <= own, "idle pages count: {found:?}");
        let set = found.working_set_pages.context("no working set")?;
        ensure!(
            found.distinct_pages >= pages / 2 && set >= found.distinct_pages,
            "of {pages} pages: {found:?}"
        );
        // An estimate of what is written again and again: none of the idle slot's pages are.
        ensure!(set <= own + own / 10, "idle pages count: {found:?}");
        Ok(found)
    })
    .await?;
    println!("{pages} pages are worked on: {found:?}");
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}

async fn an_idle_guest_has_none(fleet: &mut Fleet) -> anyhow::Result<()> {
    let spec = busy(fleet.backend(), MEMORY_MIB, VCPUS, Some(0));
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    for mode in [Mode::Unspecified, Mode::Sampling] {
        let found = eventually("the guest has come to rest", || async {
            let found = measure(fleet, &vm.name, mode).await?;
            ensure!(found.distinct_pages == 0, "{found:?}");
            Ok(found)
        })
        .await?;
        ensure!(found.working_set_pages.is_none(), "{found:?}");
    }
    Ok(())
}

async fn reads_change_nothing(fleet: &mut Fleet) -> anyhow::Result<()> {
    let mut spec = busy(fleet.backend(), MEMORY_MIB, VCPUS, None);
    if let Some(Guest::Memstress(memstress)) = &mut spec.guest {
        memstress.write_percent = Some(0);
    }
    let mut vms = fleet.vms(&fleet.server());
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(spec),
        host: "hosts/host-a".into(),
        validate_only: false,
    };
    let vm = vms.create_vm(request).await?.into_inner();
    let request = v1::StartVmRequest {
        name: vm.name.clone(),
        ..Default::default()
    };
    vms.start_vm(request).await?;
    let agent = fleet.agent("host-a");
    let reads = |vm: &v1::Vm| vm.guest_counters.is_some_and(|seen| seen.passes > 2);
    let vm = fleet.vm_until(&agent, &vm.name, "it reads", reads).await?;
    let found = measure(fleet, &vm.name, Mode::Sampling).await?;
    // Its visits are counted in a page a vCPU.
    let scale = (MEMORY_MIB * MIB / 4096).div_ceil(found.sampled_pages.max(1));
    ensure!(
        found.distinct_pages <= u64::from(VCPUS) * scale,
        "a guest that writes nothing: {found:?}"
    );
    println!("SKIPPED: ages of pages that are read: the API follows writes alone");
    Ok(())
}
