//! The functional part of the kernel's dirty_log_perf_test, through the API under a running guest:
//! memory is populated, the log turned on, and in each iteration all vCPUs write all their memory,
//! and the log is read and cleared, whole. What each iteration's harvests tell is held against
//! guest memory: exactly the pages whose contents changed. Times are printed, and are no part of
//! the oracle.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{
    self, Backend, DirtyEngine, DirtyFormat,
    memstress::{self, Pattern},
    vm_spec::Guest,
};
use slat_tests::{
    Fleet,
    guest::{MIB, asking, busy},
    memory_file::MemoryFile,
    scene::by_rings,
    wait::eventually,
};

slat_tests::on_each_backend!(in_order, at_random);

#[test]
fn in_order_by_rings() {
    by_rings(async |fleet| iterations(fleet, DirtyEngine::Ring, Pattern::Sequential).await);
}

const MEMORY_MIB: u64 = 64;
const VCPUS: u32 = 4;
const ITERATIONS: usize = 4;
/// memstress' count table begins here, its pages follow; before are its code and control pages.
const WORKED_ON: u64 = 0x50;
/// Of the end of memory, what the CPU needs.
const SUPPORT: u64 = 3;

async fn in_order(fleet: &mut Fleet) -> anyhow::Result<()> {
    iterations(fleet, DirtyEngine::Unspecified, Pattern::Sequential).await
}

async fn at_random(fleet: &mut Fleet) -> anyhow::Result<()> {
    iterations(fleet, DirtyEngine::Unspecified, Pattern::Random).await
}

/// One VM and its reader.
struct Scene<'a> {
    fleet: &'a Fleet,
    vm: v1::Vm,
    memory: MemoryFile,
    batch: u64,
}

impl Scene<'_> {
    async fn counters(&self) -> anyhow::Result<v1::GuestCounters> {
        let agent = self.fleet.agent("host-a");
        let vm = self.fleet.vm(&agent, &self.vm.name).await?;
        vm.guest_counters.context("no counters")
    }

    /// Waits until as many pages were written since `before` as the guest has.
    async fn written(&self, before: u64) -> anyhow::Result<()> {
        eventually("the guest writes all its memory", || async {
            let now = self.counters().await?;
            ensure!(now.errors == 0, "{now:?}");
            ensure!(now.pages_written >= before + now.pages, "{now:?}");
            Ok(())
        })
        .await
    }

    async fn pause(&self) -> anyhow::Result<()> {
        let name = self.vm.name.clone();
        let request = v1::PauseVmRequest {
            name,
            ..Default::default()
        };
        let mut vms = self.fleet.vms(&self.fleet.server());
        vms.pause_vm(request).await?;
        Ok(())
    }

    async fn resume(&self) -> anyhow::Result<()> {
        let name = self.vm.name.clone();
        let request = v1::ResumeVmRequest {
            name,
            ..Default::default()
        };
        let mut vms = self.fleet.vms(&self.fleet.server());
        vms.resume_vm(request).await?;
        Ok(())
    }

    /// Reads and clears the whole log; returns the frames it told.
    async fn get_and_clear(&mut self) -> anyhow::Result<BTreeSet<u64>> {
        let mut frames = BTreeSet::new();
        loop {
            let request = v1::HarvestDirtyPagesRequest {
                vm: self.vm.name.clone(),
                acknowledge_batch: self.batch,
                format: DirtyFormat::Ranges.into(),
                max_items: 1000,
                ..Default::default()
            };
            let mut memory = self.fleet.memory(&self.fleet.server());
            let answer = memory.harvest_dirty_pages(request).await?.into_inner();
            self.batch = answer.batch;
            for range in &answer.ranges {
                frames.extend(range.gfn..range.gfn + range.pages);
            }
            if !answer.more {
                return Ok(frames);
            }
        }
    }

    /// What the guest worked on, of frames.
    fn worked_on(&self, frames: impl Iterator<Item = u64>) -> BTreeSet<u64> {
        let end = MEMORY_MIB * MIB / 4096 - SUPPORT;
        frames
            .filter(|frame| (WORKED_ON..end).contains(frame))
            .collect()
    }
}

async fn iterations(
    fleet: &Fleet,
    engine: DirtyEngine,
    pattern: memstress::Pattern,
) -> anyhow::Result<()> {
    let backend = fleet.backend();
    let mut spec = asking(busy(backend, MEMORY_MIB, VCPUS, None), engine);
    if let Some(Guest::Memstress(memstress)) = &mut spec.guest {
        memstress.pattern = pattern.into();
    }
    let begun = Instant::now();
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    let mut scene = Scene {
        fleet,
        memory: MemoryFile::of(vm.pid, 0)?,
        vm,
        batch: 0,
    };
    scene.written(0).await?;
    scene.pause().await?;
    let label = format!(
        "{} {}",
        Backend::as_str_name(&backend),
        pattern.as_str_name()
    );
    println!("{label}: populated and written once: {:?}", begun.elapsed());

    let begun = Instant::now();
    ensure!(
        scene.get_and_clear().await?.is_empty(),
        "a new log is empty"
    );
    println!("{label}: log on: {:?}", begun.elapsed());
    let mut before = scene.memory.hashes()?;
    // KVM: a vCPU may have been stopped between its fault and the store that it repeats.
    let spare = if backend == Backend::Kvm {
        VCPUS as usize
    } else {
        0
    };
    for iteration in 0..ITERATIONS {
        let written = scene.counters().await?.pages_written;
        let begun = Instant::now();
        scene.resume().await?;
        scene.written(written).await?;
        scene.pause().await?;
        let wrote_in = begun.elapsed();
        let begun = Instant::now();
        let told = scene.get_and_clear().await?;
        let read_in = begun.elapsed();
        let after = scene.memory.hashes()?;
        let changed = (0..before.len()).filter(|page| before[*page] != after[*page]);
        let changed = scene.worked_on(changed.map(|page| page as u64));
        let told = scene.worked_on(told.into_iter());
        println!(
            "{label}: iteration {iteration}: {} pages written in {wrote_in:?}, told in {read_in:?}",
            changed.len()
        );
        ensure!(changed.len() > 1000, "{} pages changed", changed.len());
        let lost: Vec<_> = changed.difference(&told).collect();
        ensure!(lost.is_empty(), "iteration {iteration}: lost: {lost:?}");
        let more: Vec<_> = told.difference(&changed).collect();
        ensure!(
            more.len() <= spare,
            "iteration {iteration}: not written: {more:?}"
        );
        let again = scene.get_and_clear().await?;
        ensure!(again.is_empty(), "told twice: {again:?}");
        before = after;
    }

    let begun = Instant::now();
    let request = v1::DeleteDirtyCursorRequest {
        vm: scene.vm.name.clone(),
        ..Default::default()
    };
    let mut memory = fleet.memory(&fleet.server());
    memory.delete_dirty_cursor(request).await?;
    println!("{label}: log off: {:?}", begun.elapsed());
    let off = fleet.vm(&fleet.agent("host-a"), &scene.vm.name).await?;
    ensure!(!off.dirty_logging && off.dirty_cursors == 0, "{off:#?}");
    let written = scene.counters().await?.pages_written;
    let begun = Instant::now();
    scene.resume().await?;
    scene.written(written).await?;
    println!("{label}: written without a log in {:?}", begun.elapsed());
    fleet
        .runs_soundly_on(&scene.vm.name, "host-a")
        .await
        .map(drop)
}
