//! Receives pages: one thread a data stream, straight into guest memory.
//!
//! Every run is checked against the slot table before memory is touched. `received` remembers which
//! pages have ever arrived: a page that never did is found before READY, and a zero range over
//! fresh memory costs nothing. With `verify` on, the digest of each page is taken as it lands; the
//! sums over slots are kept up to date at each iteration's end, so that comparing costs nothing in
//! the blackout.
//!
//! # Locking
//! Within an iteration a page belongs to one stream, and iterations are separated by the barrier of
//! `IterEnd` and `IterAck`; so relaxed atomics are enough for the per-page state, and the channel
//! to the coordinator orders them.

use std::{
    io::Read as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use slat_proto::ApiError;

use super::{
    stream::Inlet,
    wire::{FrameReader, HEADER, Kind, PAGE, RUN, Run, WireError, decode_runs},
};
use crate::{
    cpu_time::thread_cpu_time,
    memory::{SlotMemory, SlotTable, digest_page},
};

/// Destination memory of one slot and what is known of it.
#[derive(Debug)]
struct TargetSlot {
    memory: Arc<SlotMemory>,
    received: Vec<AtomicU64>,
    /// Two words a page; empty without `verify`.
    digests: Vec<[AtomicU64; 2]>,
    sum: Mutex<u128>,
}

/// Everything the receivers of one migration share.
#[derive(Debug)]
pub(super) struct Intake {
    slots: Vec<TargetSlot>,
    verify: bool,
    /// Bytes taken off the wire.
    pub(super) bytes: AtomicU64,
    pub(super) pages_normal: AtomicU64,
    pub(super) pages_zero: AtomicU64,
    /// Of all receiver threads, nanoseconds, brought up to date at each iteration's end.
    pub(super) cpu_nanos: AtomicU64,
}

impl Intake {
    pub(super) fn new(table: &SlotTable, verify: bool) -> Self {
        let slots = table
            .slots()
            .iter()
            .map(|memory| {
                let pages = memory.spec().pages as usize;
                TargetSlot {
                    memory: Arc::clone(memory),
                    received: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
                    digests: (0..if verify { pages } else { 0 })
                        .map(|_| [AtomicU64::new(0), AtomicU64::new(0)])
                        .collect(),
                    sum: Mutex::new(0),
                }
            })
            .collect();
        Self {
            slots,
            verify,
            bytes: AtomicU64::new(0),
            pages_normal: AtomicU64::new(0),
            pages_zero: AtomicU64::new(0),
            cpu_nanos: AtomicU64::new(0),
        }
    }

    /// The first page that has never arrived.
    pub(super) fn first_missing(&self) -> Option<(u32, u64)> {
        self.slots.iter().find_map(|target| {
            let pages = target.memory.spec().pages;
            target
                .received
                .iter()
                .enumerate()
                .find_map(|(index, word)| {
                    let missing = (!word.load(Ordering::Relaxed)).trailing_zeros();
                    let page = index as u64 * 64 + u64::from(missing);
                    (missing < 64 && page < pages).then_some((target.memory.spec().slot, page))
                })
        })
    }

    /// Digest of each slot as received, by slot number. Empty without `verify`.
    pub(super) fn digests(&self) -> Vec<(u32, u128)> {
        if !self.verify {
            return Vec::new();
        }
        let mut digests: Vec<(u32, u128)> = self
            .slots
            .iter()
            .map(|target| {
                let sum = *target.sum.lock().unwrap_or_else(PoisonError::into_inner);
                (target.memory.spec().slot, sum)
            })
            .collect();
        digests.sort_unstable();
        digests
    }
}

/// What a receiver tells the coordinator.
#[derive(Debug)]
pub(crate) enum Event {
    /// Stream has everything of the iteration.
    IterationEnd { stream: u16, iteration: u32 },
    /// Stream has ended; an error unless the source closed it between frames.
    Ended {
        stream: u16,
        error: Option<ApiError>,
    },
}

/// Receives on one data stream until it ends, or until `emit` answers false. The body of its
/// thread.
pub(super) fn receive(
    stream: u16,
    connection: Inlet,
    mut reader: FrameReader,
    intake: &Intake,
    emit: impl Fn(Event) -> bool,
) {
    let mut worker = Worker {
        connection,
        intake,
        runs: Vec::new(),
        page: Box::new([0; PAGE]),
        deltas: vec![0; intake.slots.len()],
        cpu: Duration::ZERO,
    };
    let error = loop {
        match worker.frame(&mut reader) {
            Ok(None) => {}
            Ok(Some(iteration)) => {
                worker.end_iteration();
                if !emit(Event::IterationEnd { stream, iteration }) {
                    return;
                }
            }
            Err(WireError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                break None;
            }
            Err(error) => break Some(ApiError::from(error)),
        }
    };
    emit(Event::Ended { stream, error });
}

struct Worker<'a> {
    connection: Inlet,
    intake: &'a Intake,
    runs: Vec<u8>,
    page: Box<[u8; PAGE]>,
    /// What this stream adds to each slot's digest in this iteration.
    deltas: Vec<u128>,
    cpu: Duration,
}

impl Worker<'_> {
    /// Takes one frame; `Some(iteration)` at an iteration's end.
    fn frame(&mut self, reader: &mut FrameReader) -> Result<Option<u32>, WireError> {
        let header = reader.header(&mut self.connection)?;
        let intake = self.intake;
        intake
            .bytes
            .fetch_add(HEADER as u64 + u64::from(header.length), Ordering::Relaxed);
        match header.kind {
            Kind::IterEnd => return Ok(Some(header.count)),
            Kind::Pages | Kind::Zero => {}
            other => {
                return Err(WireError::corrupt(
                    "kind",
                    format!("{other:?} on a data stream"),
                ));
            }
        }
        let Some(index) = intake
            .slots
            .iter()
            .position(|target| target.memory.spec().slot == header.slot)
        else {
            return Err(WireError::OutOfSlot {
                slot: header.slot,
                page: 0,
                pages: 0,
            });
        };
        let target = &intake.slots[index];
        self.runs.resize(header.count as usize * RUN, 0);
        self.connection.read_exact(&mut self.runs)?;
        let runs = decode_runs(&header, &self.runs, target.memory.spec().pages)?;
        if header.kind == Kind::Pages {
            self.contents(index, target, &runs)?;
        } else {
            self.zeroes(index, target, &runs);
        }
        Ok(None)
    }

    fn contents(
        &mut self,
        index: usize,
        target: &TargetSlot,
        runs: &[Run],
    ) -> Result<(), WireError> {
        self.connection.receive(target.memory.host(), runs)?;
        for page in runs.iter().flat_map(|run| run.page..run.page + run.pages) {
            if self.intake.verify {
                target.memory.read_page(page.into(), &mut self.page);
                let digest = digest_page(page.into(), &self.page[..]);
                self.note(index, target, page, digest);
            }
            set(&target.received, page);
        }
        let pages: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
        self.intake.pages_normal.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    fn zeroes(&mut self, index: usize, target: &TargetSlot, runs: &[Run]) {
        self.page.fill(0);
        for page in runs.iter().flat_map(|run| run.page..run.page + run.pages) {
            // Fresh memory is zero already.
            if is_set(&target.received, page) {
                target.memory.clear_page(page.into());
            }
            if self.intake.verify {
                self.note(
                    index,
                    target,
                    page,
                    digest_page(page.into(), &self.page[..]),
                );
            }
            set(&target.received, page);
        }
        let pages: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
        self.intake.pages_zero.fetch_add(pages, Ordering::Relaxed);
    }

    /// Replaces a page's digest in the ledger and its slot's sum.
    fn note(&mut self, index: usize, target: &TargetSlot, page: u32, digest: u128) {
        let [low, high] = &target.digests[page as usize];
        let old = u128::from(low.load(Ordering::Relaxed))
            | u128::from(high.load(Ordering::Relaxed)) << 64;
        low.store(digest as u64, Ordering::Relaxed);
        high.store((digest >> 64) as u64, Ordering::Relaxed);
        self.deltas[index] = self.deltas[index].wrapping_add(digest).wrapping_sub(old);
    }

    fn end_iteration(&mut self) {
        for (target, delta) in self.intake.slots.iter().zip(&mut self.deltas) {
            let mut sum = target.sum.lock().unwrap_or_else(PoisonError::into_inner);
            *sum = sum.wrapping_add(std::mem::take(delta));
        }
        let now = thread_cpu_time();
        let spent = now.saturating_sub(self.cpu).as_nanos() as u64;
        self.intake.cpu_nanos.fetch_add(spent, Ordering::Relaxed);
        self.cpu = now;
    }
}

fn is_set(bits: &[AtomicU64], page: u32) -> bool {
    bits[page as usize / 64].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
}

fn set(bits: &[AtomicU64], page: u32) {
    bits[page as usize / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
}
