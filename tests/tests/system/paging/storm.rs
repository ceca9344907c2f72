//! Everything at the same time on one paged guest: mappings are taken away, aged and protected,
//! contents discarded, slots moved, dirty pages read by four readers, snapshots taken; at last it
//! migrates, with digests compared.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use slat_proto::{Reason, v1};
use slat_tests::{
    Fleet,
    guest::patient,
    scene,
    slots::{create, update},
};

use super::{sound, watched};

/// As long as the issue at hand needs: SLAT_STORM_SECONDS; a few seconds in between.
fn length() -> Duration {
    let seconds = std::env::var("SLAT_STORM_SECONDS");
    Duration::from_secs(
        seconds
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(12),
    )
}

/// A slot that the guest does not know: its contents may go, and it may move.
const SPARE: u32 = 7;
const SPARE_GFN: u64 = 0x40_0000;
const SPARE_PAGES: u64 = 2048;

async fn invalidate(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::InvalidateMemoryRequest {
        vm: vm.into(),
        ..Default::default()
    };
    fleet
        .memory(&fleet.server())
        .invalidate_memory(request)
        .await?;
    Ok(())
}

async fn discard(fleet: &Fleet, vm: &str, gfn: u64) -> anyhow::Result<()> {
    let request = v1::DiscardMemoryRequest {
        vm: vm.into(),
        ranges: vec![v1::GfnRange { gfn, pages: 64 }],
        ..Default::default()
    };
    match fleet.memory(&fleet.server()).discard_memory(request).await {
        Ok(_) => Ok(()),
        // The slot is elsewhere at the moment.
        Err(status) => {
            let error = slat_proto::ApiError::from(status);
            let known = [Reason::BadParameter, Reason::HostUnreachable];
            ensure!(known.contains(&error.reason), "{error:#?}");
            Ok(())
        }
    }
}

async fn age(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::HarvestWorkingSetRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet
        .paging(&fleet.server())
        .harvest_working_set(request)
        .await?;
    Ok(())
}

fn is_busy(error: &anyhow::Error) -> bool {
    let status = error.downcast_ref::<tonic::Status>().cloned();
    status.is_some_and(|it| slat_proto::ApiError::from(it).reason == Reason::HostUnreachable)
}

/// The reader knows every page that was written since it began, and the guest writes.
async fn read_dirty(fleet: &Fleet, vm: &str, cursor: &str, until: Instant) -> anyhow::Result<u64> {
    let (mut batch, mut pages) = (0, 0);
    while Instant::now() < until {
        let request = v1::HarvestDirtyPagesRequest {
            vm: vm.into(),
            cursor: cursor.into(),
            acknowledge_batch: batch,
            ..Default::default()
        };
        let mut client = fleet.memory(&fleet.server());
        match client.harvest_dirty_pages(request).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                (batch, pages) = (answer.batch, pages + answer.dirty_pages);
            }
            Err(status) => {
                let error = anyhow::Error::from(status);
                ensure!(is_busy(&error), "{error:#}");
            }
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    Ok(pages)
}

async fn again(
    until: Instant,
    mut step: impl AsyncFnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut steps = 0;
    while Instant::now() < until {
        match step(steps).await {
            // The agent missed the server's few reports that are due so soon here.
            Err(error) if is_busy(&error) => {}
            done => done?,
        }
        steps += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(steps)
}

#[test]
fn all_at_once_and_nothing_is_lost() {
    scene::paged(async |fleet| {
        let vm = fleet
            .run_vm("web", "host-a", watched(64, 2, None))
            .await?
            .name;
        let spare = vec![create(SPARE, SPARE_GFN, SPARE_PAGES)];
        update(fleet, &vm, spare).await?;
        let until = Instant::now() + length();
        let (fleet, vm) = (&*fleet, vm.as_str());
        let zaps = again(until, async |_| invalidate(fleet, vm).await);
        let discards = again(until, async |n| {
            discard(fleet, vm, SPARE_GFN + n * 64 % SPARE_PAGES).await
        });
        let ages = again(until, async |_| age(fleet, vm).await);
        let moves = again(until, async |n| {
            let to = SPARE_GFN + (n + 1) % 2 * SPARE_PAGES;
            let change = v1::slot_change::Move {
                slot: SPARE,
                base_gfn: to,
            };
            let change = v1::SlotChange {
                change: Some(v1::slot_change::Change::Move(change)),
            };
            update(fleet, vm, vec![change]).await?;
            Ok(())
        });
        let forks = again(until, async |n| {
            let name = format!("child-{n}");
            let child = fleet.fork(vm, &[name.as_str()]).await?;
            let child = child.vms.first().context("no child")?.name.clone();
            sound(&fleet.runs_soundly_on(&child, "host-a").await?)?;
            super::delete(fleet, &child).await
        });
        let readers = ["a", "b", "c", "d"].map(|cursor| read_dirty(fleet, vm, cursor, until));
        let [a, b, c, d] = readers;
        let (zaps, discards, ages, moves, forks, a, b, c, d) =
            tokio::try_join!(zaps, discards, ages, moves, forks, a, b, c, d)?;
        println!(
            "{zaps} zaps, {discards} discards, {ages} agings, {moves} moves, {forks} forks, \
             {a} {b} {c} {d} dirty pages"
        );
        ensure!(a > 0 && b > 0 && c > 0 && d > 0);
        let now = fleet
            .vm_until(&fleet.server(), vm, "it runs", |vm| {
                vm.state() == v1::vm::State::Running
            })
            .await?;
        sound(&now)?;
        let verified = v1::MigrationParams {
            verify: v1::migration_params::Verify::BeforeCommit.into(),
            ..patient()
        };
        for cursor in ["a", "b", "c", "d"] {
            let request = v1::DeleteDirtyCursorRequest {
                vm: vm.into(),
                cursor: cursor.into(),
                ..Default::default()
            };
            fleet
                .memory(&fleet.server())
                .delete_dirty_cursor(request)
                .await?;
        }
        fleet.migrate_and_wait(vm, "host-b", verified).await?;
        sound(&fleet.runs_soundly_on(vm, "host-b").await?)?;
        Ok(())
    });
}
