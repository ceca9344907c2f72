//! A guest that the agent pages from its first instruction.

use anyhow::ensure;
use slat_proto::v1;
use slat_tests::{guest::MIB, scene};

use super::{delete, sound, status, watched};

#[test]
fn a_paged_guest_runs_and_its_faults_are_counted() {
    scene::paged(async |fleet| {
        let vm = fleet.run_vm("web", "host-a", watched(64, 2, None)).await?;
        fleet.runs_soundly_on(&vm.name, "host-a").await?;
        // The pager's figures are told every 250 ms: a guest may have run before the first of them.
        let now = fleet
            .vm_until(&fleet.server(), &vm.name, "its faults are told", |vm| {
                vm.paging.as_ref().is_some_and(|paging| {
                    paging.faults_missing + paging.faults_minor > 0
                        && paging.mapped_pages > 0
                        && paging.table_pages > 0
                        && paging.latency_buckets.iter().sum::<u64>() > 0
                })
            })
            .await?;
        let paging = status(&now)?;
        ensure!(
            paging.state() == v1::paging_status::State::Serving,
            "{paging:#?}"
        );
        ensure!(paging.because == ["paging: AGENT"], "{paging:#?}");
        // It can move, and is paged where it arrives.
        fleet
            .migrate_and_wait(&vm.name, "host-b", slat_tests::guest::patient())
            .await?;
        let there = fleet.runs_soundly_on(&vm.name, "host-b").await?;
        sound(&there)?;
        let there = fleet
            .vm_until(&fleet.server(), &vm.name, "it is paged there", |vm| {
                vm.paging
                    .as_ref()
                    .is_some_and(|paging| paging.mapped_pages > 0)
            })
            .await?;
        sound(&there)?;
        delete(fleet, &vm.name).await
    });
}

/// A harvest takes mappings away and names them; what is touched again comes again.
#[test]
fn the_working_set_is_what_was_touched_since() {
    scene::paged(async |fleet| {
        let spec = watched(64, 1, Some(8 * MIB));
        let vm = fleet.run_vm("web", "host-a", spec).await?;
        let harvest = v1::HarvestWorkingSetRequest {
            name: vm.name.clone(),
            ..Default::default()
        };
        let mut client = fleet.paging(&fleet.server());
        let first = client
            .harvest_working_set(harvest.clone())
            .await?
            .into_inner();
        ensure!(first.pages > 0, "{first:?}");
        let sum = |ranges: &[v1::GfnRange]| ranges.iter().map(|range| range.pages).sum::<u64>();
        ensure!(sum(&first.ranges) == first.pages, "{first:?}");
        sound(&fleet.runs_soundly_on(&vm.name, "host-a").await?)?;
        let second = client.harvest_working_set(harvest).await?.into_inner();
        ensure!(second.pages > 0 && second.pages <= 64 * 256, "{second:?}");
        sound(&fleet.runs_soundly_on(&vm.name, "host-a").await?)
    });
}
