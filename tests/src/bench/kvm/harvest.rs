//! Harvests of dirty pages beside KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, and rings beside
//! bitmaps.
//!
//! A harvest is asked for as a bitmap, and acknowledges the one before. It is timed twice: by the
//! caller, with the call and the answer's way through the socket, and by the VM's process
//! (`duration_nanos`), which is what its own readers, a migration's among them, wait for. The
//! kernel's calls get and clear each slot as a whole, whatever is set; the VM is stopped meanwhile.
//!
//! Where all is dirty, a guest wrote each page it works on before each harvest, in both VMs.

use std::time::{Duration, Instant};

use anyhow::ensure;
use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend, DirtyEngine, DirtyFormat, memstress, vm_spec::Guest},
};
use slat_vmm::RawVm;
use tokio::time::sleep;

use super::{HOST, Lab, Memory, OTHER, size};
use crate::{
    bench::rows::{Goal, Row},
    guest::MIB,
};

/// Clean harvests for each of the runs asked for.
const CLEAN: u32 = 20;
/// A guest writes all its memory within this.
const PASS_LIMIT: Duration = Duration::from_secs(120);
const PEER: &str = "KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG";

/// Zeroes; written in order, as fast as it goes or, `idle`, not at all.
fn spec(memory_mib: u64, engine: DirtyEngine, idle: bool) -> v1::VmSpec {
    v1::VmSpec {
        memory_bytes: memory_mib * MIB,
        vcpus: 1,
        backend: Backend::Kvm.into(),
        dirty_engine: engine.into(),
        guest: Some(Guest::Memstress(v1::Memstress {
            pattern: memstress::Pattern::Sequential.into(),
            dirty_rate_bytes_per_second: idle.then_some(0),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// One reader of a VM.
struct Reader {
    memory: Memory,
    vm: String,
    batch: u64,
}

/// One whole harvest.
#[derive(Clone, Copy, Default)]
struct Harvest {
    /// As the caller sees it, nanoseconds.
    whole: f64,
    /// In the VM's process.
    inside: f64,
    pages: u64,
}

impl Reader {
    async fn new(lab: &Lab, vm: &v1::Vm) -> anyhow::Result<Self> {
        let mut reader = Self {
            memory: lab.memory(vm),
            vm: vm.name.clone(),
            batch: 0,
        };
        reader.harvest().await?;
        Ok(reader)
    }

    async fn harvest(&mut self) -> anyhow::Result<Harvest> {
        let mut all = Harvest::default();
        loop {
            let request = v1::HarvestDirtyPagesRequest {
                vm: self.vm.clone(),
                acknowledge_batch: self.batch,
                format: DirtyFormat::Bitmap.into(),
                ..Default::default()
            };
            let begun = Instant::now();
            let answer = self.memory.harvest_dirty_pages(request).await?.into_inner();
            all.whole += begun.elapsed().as_nanos() as f64;
            all.inside += answer.duration_nanos as f64;
            all.pages += answer.dirty_pages;
            self.batch = answer.batch;
            if !answer.more {
                return Ok(all);
            }
        }
    }
}

/// Nothing is written.
///
/// # Errors
/// When something refuses.
pub async fn clean(lab: &Lab, memory_mib: u64) -> anyhow::Result<Vec<Row>> {
    let what = size(memory_mib);
    let vm = lab
        .create("clean", spec(memory_mib, DirtyEngine::Bitmap, true))
        .await?;
    let mut reader = Reader::new(lab, &vm).await?;
    let mut beside = RawVm::new(memory_mib * MIB, 1, 1)?;
    beside.log()?;
    let goal = Some(Goal::AtMost(1.2));
    let mut rows = vec![
        Row::new(
            format!("harvest, clean, {what}, in the VM's process"),
            PEER,
            goal,
        ),
        Row::new(
            format!("harvest, clean, {what}, by the VM's socket"),
            PEER,
            goal,
        ),
    ];
    let samples = lab.runs * CLEAN;
    for sample in 0..samples + CLEAN {
        let slat = reader.harvest().await?;
        let begun = Instant::now();
        beside.get_and_clear()?;
        let peer = begun.elapsed().as_nanos() as f64;
        ensure!(slat.pages == 0 && beside.found() == 0, "nobody wrote");
        if sample >= CLEAN {
            rows[0].add(slat.inside, peer);
            rows[1].add(slat.whole, peer);
        }
    }
    drop(beside);
    match lab
        .create_on(OTHER, "rings", spec(memory_mib, DirtyEngine::Ring, true))
        .await
    {
        Ok(rings) => {
            let mut by_rings = Reader::new(lab, &rings).await?;
            let name = format!("harvest by rings, clean, {what}, in the VM's process");
            let mut row = Row::new(name, "by bitmap", None);
            for sample in 0..samples + CLEAN {
                let (ring, bitmap) = (by_rings.harvest().await?, reader.harvest().await?);
                if sample >= CLEAN {
                    row.add(ring.inside, bitmap.inside);
                }
            }
            rows.push(row);
            lab.delete(&rings).await?;
        }
        Err(error) => no_rings(error)?,
    }
    lab.delete(&vm).await?;
    Ok(rows)
}

/// Says so, when that is why.
fn no_rings(error: anyhow::Error) -> anyhow::Result<()> {
    let error = match error.downcast::<tonic::Status>() {
        Ok(status) => ApiError::from(status),
        Err(other) => return Err(other),
    };
    ensure!(error.reason == Reason::CapabilityMissing, "{error:?}");
    eprintln!("SKIPPED: rings beside bitmaps: {error}");
    Ok(())
}

/// Lets the guest write all its pages, and stops it; returns how long that took, nanoseconds.
async fn write_all(lab: &Lab, vm: &v1::Vm) -> anyhow::Result<f64> {
    let before = lab.counters(vm).await?;
    let begun = Instant::now();
    lab.resume(vm).await?;
    while lab.counters(vm).await?.pages_written < before.pages_written + before.pages {
        ensure!(begun.elapsed() < PASS_LIMIT, "the guest does not write");
        sleep(Duration::from_millis(1)).await;
    }
    lab.pause(vm).await?;
    Ok(begun.elapsed().as_nanos() as f64)
}

/// A VM that was written once, stopped, with a reader.
async fn written(
    lab: &Lab,
    (host, id): (&str, &str),
    memory_mib: u64,
    engine: DirtyEngine,
) -> anyhow::Result<(v1::Vm, Reader)> {
    let vm = lab
        .create_on(host, id, spec(memory_mib, engine, false))
        .await?;
    lab.start(&vm).await?;
    lab.pause(&vm).await?;
    let mut reader = Reader::new(lab, &vm).await?;
    write_all(lab, &vm).await?;
    reader.harvest().await?;
    Ok((vm, reader))
}

/// Every page that the guest works on was written.
///
/// # Errors
/// When something refuses.
pub async fn dirty(lab: &Lab, memory_mib: u64) -> anyhow::Result<Vec<Row>> {
    let what = size(memory_mib);
    let (vm, mut reader) = written(lab, (HOST, "dirty"), memory_mib, DirtyEngine::Bitmap).await?;
    let pages = lab.counters(&vm).await?.pages;
    let mut beside = RawVm::new(memory_mib * MIB, 1, 1)?;
    beside.log()?;
    beside.write_all()?;
    beside.get_and_clear()?;
    let goal = Some(Goal::AtMost(1.2));
    let mut rows = vec![
        Row::new(
            format!("harvest, all dirty, {what}, in the VM's process"),
            PEER,
            goal,
        ),
        Row::new(
            format!("harvest, all dirty, {what}, by the VM's socket"),
            PEER,
            goal,
        ),
    ];
    for _ in 0..lab.runs {
        write_all(lab, &vm).await?;
        let slat = reader.harvest().await?;
        beside.write_all()?;
        let begun = Instant::now();
        beside.get_and_clear()?;
        let peer = begun.elapsed().as_nanos() as f64;
        ensure!(
            slat.pages >= pages && beside.found() >= pages,
            "of {pages} written pages {} and {} were told",
            slat.pages,
            beside.found()
        );
        rows[0].add(slat.inside, peer);
        rows[1].add(slat.whole, peer);
    }
    drop(beside);
    match written(lab, (OTHER, "rings"), memory_mib, DirtyEngine::Ring).await {
        Ok((rings, mut by_rings)) => {
            let names = [
                format!("a dirty page by rings, {what}: its harvest, in the VM's process"),
                format!("a dirty page by rings, {what}: written and harvested"),
            ];
            let mut both = names.map(|name| Row::new(name, "by bitmap", None));
            for _ in 0..lab.runs {
                let ring = (write_all(lab, &rings).await?, by_rings.harvest().await?);
                let bitmap = (write_all(lab, &vm).await?, reader.harvest().await?);
                let each = |(wrote, harvest): (f64, Harvest)| {
                    let pages = harvest.pages.max(1) as f64;
                    (harvest.inside / pages, (wrote + harvest.inside) / pages)
                };
                let (ring, bitmap) = (each(ring), each(bitmap));
                both[0].add(ring.0, bitmap.0);
                both[1].add(ring.1, bitmap.1);
            }
            rows.extend(both);
            lab.delete(&rings).await?;
        }
        Err(error) => no_rings(error)?,
    }
    lab.delete(&vm).await?;
    Ok(rows)
}
