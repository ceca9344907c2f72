//! Saves, restores and forks of a guest that writes, through the API.
//!
//! Files lie in the page cache when they are read: what is compared is what Slat adds.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, Backend};
use tokio::time::sleep;

use crate::{
    Fleet,
    bench::rows::{Goal, Row},
    guest::{MIB, busy},
};

/// Where the VMs are.
pub const HOST: &str = "host-a";
/// Bytes read at once.
const PIECE: usize = 1 << 20;
/// What is read at random, in one piece.
const RANDOM: u64 = 64 << 10;
/// What a guest has to do until it counts as running.
const FIRST: u64 = 1000;
/// In which a guest's speed is measured.
const WINDOW: Duration = Duration::from_secs(1);

pub(super) async fn delete(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let request = v1::DeleteVmRequest {
        name: vm.into(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).delete_vm(request).await?;
    fleet.vm_dir_gone(HOST, vm).await
}

/// The guest has found nothing that is not as it wrote it.
pub(super) fn sound(vm: &v1::Vm) -> anyhow::Result<()> {
    let counters = vm.guest_counters.context("no counters")?;
    ensure!(counters.errors == 0, "{}: {counters:?}", vm.name);
    Ok(())
}

pub(super) fn written(vm: &v1::Vm) -> u64 {
    vm.guest_counters
        .as_ref()
        .map_or(0, |counters| counters.pages_written)
}

/// Seconds of reading a file from its beginning.
fn read_through(file: &mut File) -> anyhow::Result<f64> {
    let mut piece = vec![0; PIECE];
    let begun = Instant::now();
    while file.read(&mut piece)? > 0 {}
    Ok(begun.elapsed().as_secs_f64())
}

/// Seconds of reading it in pieces at random.
fn read_at_random(file: &File, seed: u64) -> anyhow::Result<f64> {
    let mut at: Vec<u64> = (0..file.metadata()?.len() / RANDOM).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut at);
    let mut piece = vec![0; RANDOM as usize];
    let begun = Instant::now();
    for at in at {
        file.read_exact_at(&mut piece, at * RANDOM)?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// A restored VM: seconds until the call answered, until the guest did [`FIRST`] pages, until all
/// memory was there.
async fn restored(fleet: &Fleet, save: &str, lazy: bool) -> anyhow::Result<[f64; 3]> {
    let begun = Instant::now();
    let vm = fleet.restore(save, "copy", lazy).await?;
    let answered = begun.elapsed().as_secs_f64();
    let agent = fleet.agent(HOST);
    let mut first = None;
    let (ran, whole) = loop {
        let now = fleet.vm(&agent, &vm.name).await?;
        let counted = written(&now);
        let from = *first.get_or_insert(counted);
        sound(&now)?;
        if counted >= from + FIRST {
            let ran = begun.elapsed().as_secs_f64();
            fleet
                .vm_until(&agent, &vm.name, "it is loaded", |vm| vm.paging.is_none())
                .await?;
            break (ran, begun.elapsed().as_secs_f64());
        }
        sleep(Duration::from_millis(1)).await;
    };
    delete(fleet, &vm.name).await?;
    Ok([answered, ran, whole])
}

/// Rows of saving and restoring a guest of so many MiB, all of it random bytes.
///
/// # Errors
/// When something refuses.
pub async fn restores(fleet: &Fleet, runs: u32, memory_mib: u64) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, memory_mib, 1, Some(64 * MIB));
    let vm = fleet.run_vm("web", HOST, spec).await?;
    let what = format!("{memory_mib} MiB");
    let row = |key: &str, name: &str, peer: &str| {
        Row::new(format!("{name}, {what}"), peer, None).keyed(format!("restores.{key}"))
    };
    let mut rows = vec![
        row(
            "eager",
            "restore, all memory before it runs",
            "reading the file",
        ),
        row(
            "lazy",
            "restore lazily, until all memory is there",
            "reading the file at random, 64 KiB",
        ),
        row(
            "first-pages",
            "restore lazily, until the guest did 1,000 pages",
            "the same, all memory first",
        ),
    ];
    let save = fleet.save(&vm.name, "one").await?;
    delete(fleet, &vm.name).await?;
    let files = fleet.save_files(HOST);
    let path = fleet
        .saves_dir(HOST)
        .join(files.first().context("no file")?);
    for run in 0..=runs {
        let [eager, ran_eager, _] = restored(fleet, &save.name, false).await?;
        let through = read_through(&mut File::open(&path)?)?;
        let [_, ran_lazy, whole] = restored(fleet, &save.name, true).await?;
        let random = read_at_random(&File::open(&path)?, u64::from(run))?;
        if run > 0 {
            rows[0].add(eager * 1e9, through * 1e9);
            rows[1].add(whole * 1e9, random * 1e9);
            rows[2].add(ran_lazy * 1e9, ran_eager * 1e9);
        }
    }
    Ok(rows)
}

/// Nanoseconds a page of a guest that writes, in a window.
async fn pace(fleet: &Fleet, vm: &str) -> anyhow::Result<f64> {
    let agent = fleet.agent(HOST);
    let (begun, before) = (Instant::now(), written(&fleet.vm(&agent, vm).await?));
    sleep(WINDOW).await;
    let after = fleet.vm(&agent, vm).await?;
    sound(&after)?;
    let pages = written(&after).saturating_sub(before).max(1);
    Ok(begun.elapsed().as_nanos() as f64 / pages as f64)
}

/// Rows of forking a guest of so many MiB that writes as fast as it can.
///
/// # Errors
/// When something refuses.
pub async fn forks(fleet: &Fleet, runs: u32, memory_mib: u64) -> anyhow::Result<Vec<Row>> {
    let spec = busy(Backend::Kvm, memory_mib, 1, None);
    let vm = fleet.run_vm("web", HOST, spec).await?;
    let what = format!("a writing guest of {memory_mib} MiB");
    let mut rows = vec![
        Row::new(
            format!("fork: pause of {what}"),
            "5 ms",
            Some(Goal::AtMost(1.0)),
        )
        .keyed("forks.pause"),
        Row::new(
            format!("fork: {what} writes a page in the second after"),
            "before",
            None,
        )
        .keyed("forks.slow-down"),
    ];
    // All of its memory is there, and was written.
    fleet
        .vm_until(&fleet.agent(HOST), &vm.name, "it went round twice", |vm| {
            vm.guest_counters
                .as_ref()
                .is_some_and(|counters| counters.passes >= 2)
        })
        .await?;
    for run in 0..=runs {
        let before = pace(fleet, &vm.name).await?;
        let fork = fleet.fork(&vm.name, &["child"]).await?;
        let after = pace(fleet, &vm.name).await?;
        delete(fleet, "vms/child").await?;
        if run > 0 {
            rows[0].add(fork.pause_nanos as f64, 5e6);
            rows[1].add(after, before);
        }
        fleet
            .vm_until(&fleet.agent(HOST), &vm.name, "nobody watches it", |vm| {
                vm.paging.is_none()
            })
            .await?;
    }
    delete(fleet, &vm.name).await?;
    Ok(rows)
}
