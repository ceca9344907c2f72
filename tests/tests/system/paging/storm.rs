//! Everything at the same time on one paged guest: mappings are taken away, aged and protected,
//! contents discarded, slots moved, dirty pages read by four readers, snapshots taken; and it
//! migrates to and fro all the while, with digests compared each time.
//!
//! A call that meets a migration is refused by name, or finds the VM gone to the other host. It is
//! counted by its reason and made again; any other answer fails the test.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, MigrationPhase},
};
use slat_tests::{
    Fleet,
    fleet::ended,
    guest::{patient, verified},
    scene,
    slots::{create, relocate, update},
};

use super::{sound, watched};

/// SLAT_STORM_SECONDS; a few seconds where it is not set.
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
        Err(status) => match ApiError::from(status) {
            // The slot is elsewhere at the moment.
            error if error.reason == Reason::BadParameter => Ok(()),
            error => Err(error.into()),
        },
    }
}

const READERS: [&str; 4] = ["a", "b", "c", "d"];

async fn no_reader(fleet: &Fleet, vm: &str, cursor: &str) -> anyhow::Result<()> {
    let request = v1::DeleteDirtyCursorRequest {
        vm: vm.into(),
        cursor: cursor.into(),
        ..Default::default()
    };
    let mut client = fleet.memory(&fleet.server());
    match client.delete_dirty_cursor(request).await {
        Ok(_) => Ok(()),
        Err(status) => match ApiError::from(status) {
            // It stayed behind with a migration.
            error if error.reason == Reason::NoSuchCursor => Ok(()),
            error => Err(error.into()),
        },
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

/// What a call may be answered while its VM moves: it cannot be done now; this process has given
/// the VM away; whoever served it there is gone. Or an agent is too busy to report.
const IN_THE_WAY: [Reason; 10] = [
    Reason::MigrationInProgress,
    Reason::MigrationBlocked,
    Reason::StaleEpoch,
    // A slot moved after the migration was prepared.
    Reason::StaleGeneration,
    // Its host let it go, and the server has not heard of it yet.
    Reason::NoSuchVm,
    Reason::HostUnreachable,
    Reason::PeerUnreachable,
    Reason::VmUnreachable,
    Reason::PagerUnreachable,
    Reason::ConnectionLost,
];

fn reason(error: &anyhow::Error) -> Option<Reason> {
    let status = error.downcast_ref::<tonic::Status>().cloned();
    let reason = status.map(|status| ApiError::from(status).reason);
    reason.or_else(|| Some(error.downcast_ref::<ApiError>()?.reason))
}

/// How long it goes on, and what was refused meanwhile: who asked, and why not.
struct Storm {
    until: Instant,
    slot_moves: Cell<u64>,
    refused: RefCell<BTreeMap<(&'static str, &'static str), u64>>,
}

impl Storm {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// What a call gave; nothing when it was refused for a reason that is to be expected.
    fn met<T>(&self, who: &'static str, done: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        let error = match done {
            Ok(done) => return Ok(Some(done)),
            Err(error) => error,
        };
        match reason(&error).filter(|reason| IN_THE_WAY.contains(reason)) {
            Some(reason) => {
                let key = (who, reason.as_str());
                *self.refused.borrow_mut().entry(key).or_default() += 1;
                Ok(None)
            }
            None => Err(error.context(who)),
        }
    }

    /// The same again and again, told how often it was done; says how often.
    async fn again(
        &self,
        who: &'static str,
        mut step: impl AsyncFnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<u64> {
        let mut done = 0;
        while self.goes_on() {
            if self.met(who, step(done).await)?.is_some() {
                done += 1;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(done)
    }

    /// The reader is told of every page that was written since it began, and the guest writes. It
    /// begins anew after a migration, where cursors stay behind.
    async fn read_dirty(&self, fleet: &Fleet, vm: &str, cursor: &str) -> anyhow::Result<u64> {
        let (mut batch, mut pages) = (0, 0);
        while self.goes_on() {
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
                Err(status) => match ApiError::from(status) {
                    error if error.reason == Reason::NoSuchCursor => batch = 0,
                    error => drop(self.met::<()>("reader", Err(error.into()))?),
                },
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        Ok(pages)
    }

    /// To and fro as long as it goes on, and once in any case. Slots cannot move meanwhile, so one
    /// does between two migrations.
    async fn migrate(&self, fleet: &Fleet, vm: &str) -> anyhow::Result<u64> {
        let (mut moved, mut slot_moves) = (0, 0);
        let params = verified(patient(), v1::migration_params::Verify::BeforeCommit);
        while self.goes_on() || moved == 0 {
            while self.goes_on() && self.slot_moves.get() == slot_moves {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            slot_moves = self.slot_moves.get();
            let to = ["host-b", "host-a"][(moved % 2) as usize];
            let begun = fleet.migrate(vm, to, params).await;
            let Some(begun) = self.met("migration", begun.map_err(anyhow::Error::from))? else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let over = |migration: &v1::Migration| ended(migration.phase());
            let last = fleet.migration_until(&begun.name, "its end", over).await?;
            if last.phase() == MigrationPhase::Completed {
                let progress = last.progress.as_ref().context("no progress")?;
                let equal = progress.verification() == v1::Verification::Match;
                ensure!(equal, "digests: {last:#?}");
                moved += 1;
                continue;
            }
            let error = last.error.as_ref().context("FAILED without an error")?;
            let why = Reason::parse(&error.reason).filter(|reason| IN_THE_WAY.contains(reason));
            let Some(why) = why else {
                bail!("it does not move: {last:#?}");
            };
            let key = ("migration, later", why.as_str());
            *self.refused.borrow_mut().entry(key).or_default() += 1;
        }
        Ok(moved)
    }
}

/// Forks it where it is; the child runs and goes again.
async fn fork(fleet: &Fleet, vm: &str, number: u64) -> anyhow::Result<()> {
    let name = format!("child-{number}");
    let child = fleet.fork(vm, &[name.as_str()]).await?;
    let child = child.vms.first().context("no child")?;
    let host = child.host.strip_prefix("hosts/").context("no host")?;
    sound(&fleet.runs_soundly_on(&child.name, host).await?)?;
    super::delete(fleet, &child.name).await
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
        let storm = Storm {
            until: Instant::now() + length(),
            slot_moves: Cell::new(0),
            refused: RefCell::default(),
        };
        let (fleet, vm, storm) = (&*fleet, vm.as_str(), &storm);
        let zaps = storm.again("zap", async |_| invalidate(fleet, vm).await);
        let discards = storm.again("discard", async |n| {
            discard(fleet, vm, SPARE_GFN + n * 64 % SPARE_PAGES).await
        });
        let ages = storm.again("ageing", async |_| age(fleet, vm).await);
        let moves = storm.again("slot move", async |n| {
            let to = SPARE_GFN + (n + 1) % 2 * SPARE_PAGES;
            update(fleet, vm, vec![relocate(SPARE, to)]).await?;
            storm.slot_moves.set(n + 1);
            Ok(())
        });
        let forks = storm.again("fork", async |n| fork(fleet, vm, n).await);
        let readers = READERS.map(|cursor| storm.read_dirty(fleet, vm, cursor));
        let [a, b, c, d] = readers;
        let migrations = storm.migrate(fleet, vm);
        let (zaps, discards, ages, moves, forks, a, b, c, d, migrations) =
            tokio::try_join!(zaps, discards, ages, moves, forks, a, b, c, d, migrations)?;
        println!(
            "{zaps} zaps, {discards} discards, {ages} agings, {moves} moves, {forks} forks, \
             {a} {b} {c} {d} dirty pages, {migrations} migrations"
        );
        println!("refused: {:?}", storm.refused.borrow());
        ensure!(a > 0 && b > 0 && c > 0 && d > 0);
        ensure!(zaps > 0 && discards > 0 && ages > 0 && moves > 0);
        let home = ["host-a", "host-b"][(migrations % 2) as usize];
        // They may have read on after the last migration, and logging lasts as long as they do.
        for cursor in READERS {
            no_reader(fleet, vm, cursor).await?;
        }
        sound(&fleet.runs_soundly_on(vm, home).await?)
    });
}
