//! Makes the destination's memory real before the first page is sent.
//!
//! The first touch of a page costs more than its transfer, and memory that turns out to be missing
//! in the middle of a migration is worse than memory that is missing before it. So the whole of the
//! VM's memory is populated in PREPARING, while the guest runs undisturbed at the source and dirty
//! logging is still off; precopy then runs at the speed of the wire and is as short as it can be.
//! Both views are: receivers place pages through our own, and the guest begins on its own at once.
//!
//! Threads take chunks by an atomic counter; the coordinator looks at the progress and never waits.
//! Dropping stops and joins the threads.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use super::cpu_time::thread_cpu_time;
use crate::memory::{SlotMemory, SlotTable};

/// Pages of one system call; short enough that a stop is prompt.
const CHUNK: u64 = 1024;
const MAX_THREADS: usize = 8;

#[derive(Debug)]
struct Shared {
    slots: Vec<Arc<SlotMemory>>,
    chunks: u64,
    next: AtomicU64,
    done: AtomicU64,
    bytes: AtomicU64,
    cpu_nanos: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<io::Error>>,
}

impl Shared {
    /// Slot, first page and pages of a chunk.
    fn chunk(&self, mut number: u64) -> Option<(&SlotMemory, u64, u64)> {
        self.slots.iter().find_map(|slot| {
            let pages = slot.spec().pages;
            let chunks = pages.div_ceil(CHUNK);
            if number < chunks {
                let first = number * CHUNK;
                return Some((&**slot, first, CHUNK.min(pages - first)));
            }
            number -= chunks;
            None
        })
    }

    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((slot, first, pages)) = self.chunk(number) else {
                break;
            };
            if let Err(error) = slot.populate(first, pages) {
                self.stop.store(true, Ordering::Relaxed);
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                break;
            }
            let page_bytes = slot.spec().bytes() / slot.spec().pages;
            self.bytes.fetch_add(pages * page_bytes, Ordering::Relaxed);
            self.done.fetch_add(1, Ordering::Release);
        }
        self.cpu_nanos
            .fetch_add(thread_cpu_time().as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Populating under way, or done.
#[derive(Debug)]
pub(super) struct Populate {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Populate {
    /// Starts on all of `table`.
    pub(super) fn start(table: &SlotTable) -> io::Result<Self> {
        let slots = table.slots().to_vec();
        let chunks = slots
            .iter()
            .map(|slot| slot.spec().pages.div_ceil(CHUNK))
            .sum();
        let shared = Arc::new(Shared {
            slots,
            chunks,
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            cpu_nanos: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
        });
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let mut populate = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..count.min(MAX_THREADS) {
            let shared = Arc::clone(&populate.shared);
            let thread = std::thread::Builder::new()
                .name("populate".to_owned())
                .spawn(move || shared.work())?;
            populate.threads.push(thread);
        }
        Ok(populate)
    }

    /// Per cent of the memory that is there; 100 only when all is.
    ///
    /// # Errors
    /// What the kernel said when memory was short.
    pub(super) fn percent(&self) -> io::Result<u32> {
        if let Some(error) = self
            .shared
            .failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
        {
            return Err(io::Error::new(error.kind(), error.to_string()));
        }
        let done = self.shared.done.load(Ordering::Acquire);
        Ok((done * 100)
            .checked_div(self.shared.chunks)
            .map_or(100, |percent| percent as u32))
    }

    /// Bytes of the memory that are there; all of them at 100 per cent.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Waits for the threads, which have nothing left to do at 100 per cent, and says what they
    /// cost.
    pub(super) fn finish(self) -> Duration {
        let shared = Arc::clone(&self.shared);
        drop(self);
        Duration::from_nanos(shared.cpu_nanos.load(Ordering::Relaxed))
    }
}

impl Drop for Populate {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a populating thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use slat_proto::model::SlotSpec;

    use super::*;
    use crate::memory::{GuestMemory, resident};

    #[test]
    fn every_page_is_there_at_a_hundred_per_cent() {
        let memory = GuestMemory::new();
        let slot = |number, base, pages| {
            let spec = SlotSpec::new(number, base, pages, false).unwrap();
            Arc::new(SlotMemory::new(spec).unwrap())
        };
        memory.publish(vec![slot(0, 0, 2500), slot(1, 10_000, 3)]);
        let populate = Populate::start(&memory.table()).unwrap();
        let begun = Instant::now();
        while populate.percent().unwrap() < 100 {
            assert!(begun.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
        let table = memory.table();
        let all = table.slots().iter().map(|slot| slot.spec().bytes());
        assert_eq!(populate.bytes(), all.sum::<u64>());
        for slot in memory.table().slots() {
            let host = slot.host().range_ptr(0, 1).addr() as u64;
            for view in [slot.guest().address(), host] {
                assert_eq!(resident(view), slot.spec().bytes());
            }
        }
    }
}
