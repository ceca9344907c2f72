//! Windows of time in which readers of dirty pages stand beside a guest that writes as fast as it
//! can: how much it writes, and how long a harvest takes.
//!
//! Each reader harvests and acknowledges at one pace. Several look at the same moments, or spread
//! over the pace: memory is then protected more often, which no way of reading can spare the guest.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use slat_proto::v1::{self, DirtyFormat};
use tokio::{task::JoinHandle, time::sleep};

use crate::Fleet;

/// What begins a log is not what a reader costs.
const SETTLE: Duration = Duration::from_millis(200);

/// How one window is.
#[derive(Clone, Copy, Debug)]
pub struct Readers {
    /// How many.
    pub readers: usize,
    /// Whether they look at the same moments.
    pub together: bool,
    /// How long it is measured.
    pub length: Duration,
    /// A reader harvests again after this.
    pub pace: Duration,
}

/// What was seen in a window.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// Pages a second that the guest wrote.
    pub rate: f64,
    /// Mean time of a harvest in seconds; 0 without a reader.
    pub harvest: f64,
}

async fn written(fleet: &Fleet, vm: &str) -> anyhow::Result<(u64, Instant)> {
    let vm = fleet.vm(&fleet.agent("host-a"), vm).await?;
    let counters = vm.guest_counters.context("no counters")?;
    ensure!(counters.errors == 0, "the guest found errors: {counters:?}");
    Ok((counters.pages_written, Instant::now()))
}

/// Until the next of the moments at which a reader looks, `pace` apart, `late` by some of it.
async fn beat(origin: Instant, pace: Duration, late: Duration) {
    let pace_nanos = pace.as_nanos().max(1);
    let since = origin.elapsed().saturating_sub(late).as_nanos();
    let next = (since / pace_nanos + 1) * pace_nanos;
    let next = Duration::from_nanos(u64::try_from(next).unwrap_or(u64::MAX)) + late;
    sleep(next.saturating_sub(origin.elapsed())).await;
}

/// Harvests until `stop`, then ends its cursor; returns the times of its harvests.
async fn read(
    fleet: &Fleet,
    (vm, cursor): (&str, String),
    (origin, pace, late): (Instant, Duration, Duration),
    stop: Arc<AtomicBool>,
) -> anyhow::Result<JoinHandle<anyhow::Result<Vec<f64>>>> {
    let mut memory = fleet.memory(&fleet.agent("host-a"));
    let vm = vm.to_owned();
    let of = vm.clone();
    let request = move |cursor: &str, acknowledge_batch| v1::HarvestDirtyPagesRequest {
        vm: of.clone(),
        cursor: cursor.to_owned(),
        acknowledge_batch,
        format: DirtyFormat::Bitmap.into(),
        ..Default::default()
    };
    let made = memory.harvest_dirty_pages(request(&cursor, 0)).await?;
    let mut batch = made.into_inner().batch;
    Ok(tokio::spawn(async move {
        let mut times = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            beat(origin, pace, late).await;
            let begun = Instant::now();
            let answer = memory.harvest_dirty_pages(request(&cursor, batch)).await?;
            times.push(begun.elapsed().as_secs_f64());
            batch = answer.into_inner().batch;
        }
        let request = v1::DeleteDirtyCursorRequest {
            vm,
            cursor,
            ..Default::default()
        };
        memory.delete_dirty_cursor(request).await?;
        Ok(times)
    }))
}

/// Measures one window of a VM on `host-a`.
///
/// # Errors
/// What the agent answers, or that the guest found errors.
pub async fn window(fleet: &Fleet, vm: &str, how: Readers) -> anyhow::Result<Window> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut reading = Vec::new();
    let origin = Instant::now();
    for number in 0..how.readers {
        let late = if how.together {
            Duration::ZERO
        } else {
            how.pace.mul_f64(number as f64 / how.readers as f64)
        };
        let of = (vm, format!("r{number}"));
        let pace = (origin, how.pace, late);
        reading.push(read(fleet, of, pace, Arc::clone(&stop)).await?);
    }
    sleep(SETTLE).await;
    let (before, begun) = written(fleet, vm).await?;
    sleep(how.length).await;
    let (after, ended) = written(fleet, vm).await?;
    stop.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for task in reading {
        times.extend(task.await??);
    }
    Ok(Window {
        rate: (after - before) as f64 / (ended - begun).as_secs_f64(),
        harvest: times.iter().sum::<f64>() / times.len().max(1) as f64,
    })
}
