//! Readers of dirty pages beside each other: a backup, a working-set estimate, rate measurements
//! and migrations, with a writing guest and changes of slots. What each was told is held against
//! guest memory itself, read from the VM process's memory files while the VM is paused: a page that
//! memstress wrote has another stamp than before.
//!
//! `SLAT_CURSORS_SECONDS` says for how long (6 unless set; the acceptance test is 60).

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    model::proto_duration,
    v1::{
        self, Backend, DirtyEngine, DirtyFormat, MigrationPhase, measure_dirty_rate_request::Mode,
        memory_service_client::MemoryServiceClient, slot_change::Change,
    },
};
use slat_tests::{
    Fleet, Layout,
    guest::{MIB, asking, busy, crawling, fast, usual, verified},
    memory_file::MemoryFile,
    scene::{self, by_rings, probe},
    wait::eventually,
};
use tokio::time::sleep;

slat_tests::on_each_backend!(
    four_cursors_each_see_what_the_guest_wrote,
    a_dirty_rate_is_measured_beside_a_migration,
    a_measurement_ends_with_its_caller,
);

type Memory = MemoryServiceClient<slat_proto::transport::TracedChannel>;

/// The slot that comes, moves and goes, beside the guest's own.
const EXTRA: u32 = 7;
const EXTRA_PAGES: u64 = 64;
const VCPUS: u32 = 2;
/// memstress writes pages from here on; below are its code and its control pages.
const WORKED_ON: u64 = 0x50;
/// Pages at the end of 64 MiB that are the guest's page tables on x86-64: a processor that walks
/// them through nested tables does so as if it wrote them.
const TABLES: u64 = 3;
const PLACES: [u64; 2] = [1 << 20, 3 << 20];

#[test]
fn four_cursors_by_rings() {
    by_rings(async |fleet| four_cursors(fleet, DirtyEngine::Ring).await);
}

#[test]
fn a_dirty_rate_is_measured_by_rings() {
    by_rings(async |fleet| rate(fleet, DirtyEngine::Ring).await);
}

#[test]
fn a_wish_for_rings_goes_with_the_vm() {
    by_rings(async |fleet| {
        let vm = fleet
            .run_vm(
                "web",
                "host-a",
                asking(usual(Backend::Kvm), DirtyEngine::Ring),
            )
            .await?;
        ensure!(vm.dirty_engine() == DirtyEngine::Ring, "{vm:#?}");
        let rings: i32 = v1::Capability::DirtyRing.into();
        ensure!(vm.capabilities.contains(&rings), "{vm:#?}");
        fleet
            .migrate_and_wait(&vm.name, "host-b", checked())
            .await?;
        let there = fleet.runs_soundly_on(&vm.name, "host-b").await?;
        ensure!(there.dirty_engine() == DirtyEngine::Ring, "{there:#?}");
        let spec = there.spec.context("no spec")?;
        ensure!(spec.dirty_engine() == DirtyEngine::Ring, "{spec:#?}");
        Ok(())
    });
}

#[test]
fn rings_are_refused_by_name_where_there_are_none() {
    scene::run(Layout::two(Backend::Software), async |fleet| {
        let request = probe(asking(usual(Backend::Software), DirtyEngine::Ring));
        let refused = fleet.vms(&fleet.server()).create_vm(request).await;
        let error = ApiError::from(refused.err().context("software VMs have no rings")?);
        ensure!(error.reason == Reason::CapabilityMissing, "{error:?}");
        ensure!(
            error.metadata["capability"] == "CAPABILITY_DIRTY_RING",
            "{error:?}"
        );
        // Without a wish the host decides, and says so.
        let vm = fleet
            .run_vm("web", "host-a", usual(Backend::Software))
            .await?;
        ensure!(vm.dirty_engine() == DirtyEngine::Bitmap, "{vm:#?}");
        ensure!(!vm.dirty_engine_reason.is_empty(), "{vm:#?}");
        Ok(())
    });
}

fn checked() -> v1::MigrationParams {
    verified(fast(), v1::migration_params::Verify::AfterCommit)
}

async fn set_running(fleet: &Fleet, vm: &str, running: bool) -> anyhow::Result<()> {
    let mut vms = fleet.vms(&fleet.server());
    let name = vm.to_owned();
    if running {
        let request = v1::ResumeVmRequest {
            name,
            ..Default::default()
        };
        vms.resume_vm(request).await?;
    } else {
        let request = v1::PauseVmRequest {
            name,
            ..Default::default()
        };
        vms.pause_vm(request).await?;
    }
    Ok(())
}

/// A hash of each page of slot 0, from the memory file of the VM's process.
fn pages_of(pid: u32) -> anyhow::Result<Vec<u64>> {
    MemoryFile::of(pid, 0)?.hashes()
}

/// One cursor, and every frame that it was told of.
struct Reader {
    memory: Memory,
    vm: String,
    cursor: &'static str,
    format: DirtyFormat,
    most: u32,
    batch: u64,
    told: BTreeSet<u64>,
}

impl Reader {
    fn new(fleet: &Fleet, vm: &str, cursor: &'static str, format: DirtyFormat, most: u32) -> Self {
        Self {
            memory: fleet.memory(&fleet.server()),
            vm: vm.to_owned(),
            cursor,
            format,
            most,
            batch: 0,
            told: BTreeSet::new(),
        }
    }

    /// Harvests; acknowledges the last batch or leaves it to come again.
    async fn harvest(
        &mut self,
        acknowledge: bool,
    ) -> anyhow::Result<v1::HarvestDirtyPagesResponse> {
        let request = v1::HarvestDirtyPagesRequest {
            vm: self.vm.clone(),
            cursor: self.cursor.to_owned(),
            acknowledge_batch: if acknowledge { self.batch } else { 0 },
            format: self.format.into(),
            max_items: self.most,
            ..Default::default()
        };
        let answer = self.memory.harvest_dirty_pages(request).await?.into_inner();
        self.batch = answer.batch;
        let mut frames: BTreeSet<u64> = BTreeSet::new();
        for range in &answer.ranges {
            frames.extend(range.gfn..range.gfn + range.pages);
        }
        for piece in &answer.bitmaps {
            let bits = 0..piece.bits.len() as u64 * 8;
            let set = bits.filter(|bit| piece.bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1);
            frames.extend(set.map(|bit| piece.gfn + bit));
        }
        ensure!(frames.len() as u64 == answer.dirty_pages, "{answer:?}");
        let items = answer.ranges.len().max(answer.bitmaps.len());
        ensure!(
            self.most == 0 || items <= self.most as usize,
            "{items} items"
        );
        self.told.extend(frames);
        Ok(answer)
    }

    /// Until `stop`: reads at its own pace, and lets each third batch come again.
    async fn follow(mut self, pace: Duration, stop: Arc<AtomicBool>) -> anyhow::Result<Self> {
        let mut round = 0;
        while !stop.load(Ordering::Relaxed) {
            round += 1;
            let answer = self.harvest(round % 3 != 0).await?;
            if !answer.more {
                sleep(pace).await;
            }
        }
        Ok(self)
    }

    /// All that is left.
    async fn finish(&mut self) -> anyhow::Result<()> {
        while self.harvest(true).await?.dirty_pages > 0 {}
        Ok(())
    }

    /// What it was told of the guest's own memory.
    fn of_guest(&self, pages: usize) -> BTreeSet<u64> {
        self.told.range(..pages as u64).copied().collect()
    }
}

async fn change_slots(fleet: &Fleet, vm: &str, change: Change) -> anyhow::Result<()> {
    let request = v1::UpdateSlotsRequest {
        vm: vm.to_owned(),
        changes: vec![v1::SlotChange {
            change: Some(change),
        }],
        ..Default::default()
    };
    fleet.memory(&fleet.server()).update_slots(request).await?;
    Ok(())
}

fn extra() -> Change {
    Change::Create(v1::slot_change::Create {
        slot: Some(v1::Slot {
            slot: EXTRA,
            base_gfn: PLACES[0],
            pages: EXTRA_PAGES,
            ..Default::default()
        }),
    })
}

fn measure(vm: &str, mode: Mode, duration: Duration) -> v1::MeasureDirtyRateRequest {
    v1::MeasureDirtyRateRequest {
        vm: vm.to_owned(),
        mode: mode.into(),
        duration: Some(proto_duration(duration)),
        ..Default::default()
    }
}

/// Measures again and again until `stop`; returns how often.
async fn keep_measuring(
    mut memory: Memory,
    vm: String,
    stop: Arc<AtomicBool>,
) -> anyhow::Result<u32> {
    let mut times = 0;
    while !stop.load(Ordering::Relaxed) {
        let mode = if times % 2 == 0 {
            Mode::Unspecified
        } else {
            Mode::Sampling
        };
        let request = measure(&vm, mode, Duration::from_millis(300));
        let answer = memory.measure_dirty_rate(request).await?.into_inner();
        ensure!(answer.looks > 0, "{answer:?}");
        times += 1;
    }
    Ok(times)
}

async fn four_cursors_each_see_what_the_guest_wrote(fleet: &mut Fleet) -> anyhow::Result<()> {
    four_cursors(fleet, DirtyEngine::Unspecified).await
}

async fn four_cursors(fleet: &mut Fleet, engine: DirtyEngine) -> anyhow::Result<()> {
    let seconds = std::env::var("SLAT_CURSORS_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(6);
    let spec = asking(busy(fleet.backend(), 64, VCPUS, Some(8 * MIB)), engine);
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let name = vm.name.clone();
    set_running(fleet, &name, false).await?;
    let before = pages_of(vm.pid)?;
    let mut backup = Reader::new(fleet, &name, "backup", DirtyFormat::Ranges, 0);
    let mut set = Reader::new(fleet, &name, "working-set", DirtyFormat::Bitmap, 0);
    let mut slow = Reader::new(fleet, &name, "slow", DirtyFormat::Ranges, 50);
    for reader in [&mut backup, &mut set, &mut slow] {
        let made = reader.harvest(false).await?;
        ensure!(made.created && made.dirty_pages == 0, "{made:?}");
    }
    set_running(fleet, &name, true).await?;

    let stop = Arc::new(AtomicBool::new(false));
    let backup = tokio::spawn(backup.follow(Duration::from_millis(20), Arc::clone(&stop)));
    let set = tokio::spawn(set.follow(Duration::from_millis(70), Arc::clone(&stop)));
    let slow = tokio::spawn(slow.follow(Duration::from_millis(500), Arc::clone(&stop)));
    let rates = tokio::spawn(keep_measuring(
        fleet.memory(&fleet.server()),
        name.clone(),
        Arc::clone(&stop),
    ));
    let begun = Instant::now();
    let mut rounds = 0;
    while begun.elapsed() < Duration::from_secs(seconds) {
        change_slots(fleet, &name, extra()).await?;
        let there = Change::Move(v1::slot_change::Move {
            slot: EXTRA,
            base_gfn: PLACES[1],
        });
        change_slots(fleet, &name, there).await?;
        let delete = Change::Delete(v1::slot_change::Delete { slot: EXTRA });
        change_slots(fleet, &name, delete).await?;
        // The fourth: a migration, which gives up its cursor when it is cancelled.
        let migration = fleet
            .migrate_until_precopy(&name, "host-b", crawling())
            .await?;
        sleep(Duration::from_millis(300)).await;
        let cancel = v1::CancelMigrationRequest {
            name: migration.name.clone(),
        };
        fleet.migrations().cancel_migration(cancel).await?;
        fleet
            .migration_ends(&migration.name, MigrationPhase::Cancelled)
            .await?;
        fleet
            .vm_until(&fleet.server(), &name, "free of the migration", |vm| {
                vm.migration.is_empty()
            })
            .await?;
        rounds += 1;
    }
    stop.store(true, Ordering::Relaxed);
    let times = rates.await??;
    let mut readers = [backup.await??, set.await??, slow.await??];
    set_running(fleet, &name, false).await?;
    let after = pages_of(vm.pid)?;
    let wrote: BTreeSet<u64> = (0..before.len())
        .filter(|page| before[*page] != after[*page])
        .map(|page| page as u64)
        .collect();
    println!(
        "{} of {} pages written, {rounds} rounds of slots and migrations, {times} measurements",
        wrote.len(),
        before.len(),
    );
    ensure!(wrote.len() > 100, "the guest wrote {} pages", wrote.len());
    let kvm = fleet.backend() == Backend::Kvm;
    for reader in &mut readers {
        reader.finish().await?;
        let told = reader.of_guest(before.len());
        let (lost, more) = (wrote.difference(&told).count(), told.difference(&wrote));
        ensure!(lost == 0, "{}: {lost} pages lost", reader.cursor);
        // KVM may say more: when a slot goes it drops every mapping, and what is then read, such as
        // code, is mapped for writing and logged; page tables are walked as if they were written;
        // and a vCPU may be stopped between its fault and the store that it repeats.
        let spare = if kvm { VCPUS as usize } else { 0 };
        let end = before.len() as u64
            - if cfg!(target_arch = "x86_64") {
                TABLES
            } else {
                0
            };
        let more: Vec<_> = more
            .filter(|page| !kvm || (WORKED_ON..end).contains(*page))
            .collect();
        ensure!(
            more.len() <= spare,
            "{}: not written: {more:?}",
            reader.cursor
        );
        let elsewhere = reader.told.range(before.len() as u64..);
        let mut of_extra = elsewhere.filter(|gfn| {
            !PLACES
                .iter()
                .any(|place| (*place..place + EXTRA_PAGES).contains(gfn))
        });
        ensure!(
            of_extra.next().is_none(),
            "{}: frames of no slot",
            reader.cursor
        );
    }
    // A slot that comes is dirty as a whole, for everybody, and nothing else is.
    change_slots(fleet, &name, extra()).await?;
    for reader in &mut readers {
        let answer = reader.harvest(true).await?;
        ensure!(answer.dirty_pages == EXTRA_PAGES, "{answer:?}");
    }
    let request = v1::ListDirtyCursorsRequest {
        vm: name.clone(),
        ..Default::default()
    };
    let listed = fleet
        .memory(&fleet.server())
        .list_dirty_cursors(request)
        .await?
        .into_inner();
    let names: Vec<&str> = listed.cursors.iter().map(|one| one.name.as_str()).collect();
    ensure!(names == ["backup", "slow", "working-set"], "{listed:?}");
    for reader in &readers {
        let request = v1::DeleteDirtyCursorRequest {
            vm: name.clone(),
            cursor: reader.cursor.to_owned(),
            ..Default::default()
        };
        let mut memory = fleet.memory(&fleet.server());
        memory.delete_dirty_cursor(request).await?;
    }
    set_running(fleet, &name, true).await?;
    // A migration that goes through: what its cursor missed, the digests would tell.
    fleet.migrate_and_wait(&name, "host-b", checked()).await?;
    let there = fleet.runs_soundly_on(&name, "host-b").await?;
    ensure!(
        there.dirty_cursors == 0 && !there.dirty_logging,
        "{there:#?}"
    );
    Ok(())
}

async fn a_dirty_rate_is_measured_beside_a_migration(fleet: &mut Fleet) -> anyhow::Result<()> {
    rate(fleet, DirtyEngine::Unspecified).await
}

async fn rate(fleet: &mut Fleet, engine: DirtyEngine) -> anyhow::Result<()> {
    // 4 MiB a second at random over 64 MiB: 1024 pages.
    let spec = asking(busy(fleet.backend(), 64, 1, Some(4 * MIB)), engine);
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let mut memory = fleet.memory(&fleet.server());
    let own = match vm.dirty_engine() {
        DirtyEngine::Ring => Mode::Ring,
        _ => Mode::Bitmap,
    };
    let second = Duration::from_secs(1);
    for mode in [own, Mode::Unspecified, Mode::Sampling] {
        let request = v1::MeasureDirtyRateRequest {
            sample_pages_per_gib: 16_384,
            ..measure(&vm.name, mode, second)
        };
        let answer = memory.measure_dirty_rate(request).await?.into_inner();
        println!("{answer:?}");
        let used = if mode == Mode::Sampling { mode } else { own };
        ensure!(answer.mode() == used, "{answer:?}");
        // Its pace is a ceiling, and the machine may be busy; but no page is made up.
        ensure!(answer.distinct_pages > 0, "{answer:?}");
        if mode != Mode::Sampling {
            ensure!(
                answer.looks >= 1 && answer.distinct_pages < 8 * 1024,
                "{answer:?}"
            );
        } else {
            ensure!(
                answer.sampled_pages == 1024 && answer.looks == 3,
                "{answer:?}"
            );
        }
    }
    // Beside a migration, which it neither disturbs nor is disturbed by.
    let migration = fleet
        .migrate_until_precopy(&vm.name, "host-b", crawling())
        .await?;
    let request = measure(&vm.name, own, second);
    let answer = memory.measure_dirty_rate(request).await?.into_inner();
    ensure!(answer.distinct_pages > 0, "{answer:?}");
    let cancel = v1::CancelMigrationRequest {
        name: migration.name.clone(),
    };
    fleet.migrations().cancel_migration(cancel).await?;
    fleet
        .migration_ends(&migration.name, MigrationPhase::Cancelled)
        .await?;
    let after = fleet.vm(&fleet.agent("host-a"), &vm.name).await?;
    ensure!(
        !after.dirty_logging && after.dirty_cursors == 0,
        "{after:#?}"
    );

    let other = if own == Mode::Ring {
        Mode::Bitmap
    } else {
        Mode::Ring
    };
    let refused = async |memory: &mut Memory, request| {
        let refused = memory.measure_dirty_rate(request).await.err();
        anyhow::Ok(ApiError::from(refused.context("it was measured")?))
    };
    let error = refused(&mut memory, measure(&vm.name, other, second)).await?;
    ensure!(error.reason == Reason::CapabilityMissing, "{error:?}");
    let error = refused(&mut memory, measure(&vm.name, own, 90 * second)).await?;
    ensure!(error.reason == Reason::BadParameter, "{error:?}");
    set_running(fleet, &vm.name, false).await?;
    let error = refused(&mut memory, measure(&vm.name, Mode::Sampling, second)).await?;
    ensure!(error.reason == Reason::VmNotRunning, "{error:?}");
    Ok(())
}

async fn a_measurement_ends_with_its_caller(fleet: &mut Fleet) -> anyhow::Result<()> {
    let vm = fleet
        .run_vm("web", "host-a", usual(fleet.backend()))
        .await?;
    let agent = fleet.agent("host-a");
    // Through server, agent and VM process.
    let mut memory = fleet.memory(&fleet.server());
    let request = measure(&vm.name, Mode::Unspecified, Duration::from_secs(60));
    let caller = tokio::spawn(async move { memory.measure_dirty_rate(request).await });
    fleet
        .vm_until(&agent, &vm.name, "measured", |vm| {
            vm.dirty_logging && vm.dirty_cursors == 1
        })
        .await?;
    caller.abort();
    eventually("the measurement has ended", || async {
        let vm = fleet.vm(&agent, &vm.name).await?;
        ensure!(!vm.dirty_logging && vm.dirty_cursors == 0, "{vm:#?}");
        Ok(())
    })
    .await?;
    fleet.runs_soundly_on(&vm.name, "host-a").await.map(drop)
}
