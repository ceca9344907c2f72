//! Makes memory real before it is used, by several threads.
//!
//! At a migration's destination: the first touch of a page costs more than its transfer, and memory
//! that turns out to be missing in the middle of a migration is worse than memory that is missing
//! before it. So the whole of the VM's memory is populated in PREPARING, while the guest runs
//! undisturbed at the source and dirty logging is still off; precopy then runs at the speed of the
//! wire and is as short as it can be. Both views are: receivers place pages through our own, and
//! the guest begins on its own at once. Elsewhere where a VM asks for it (prefault), and for
//! reserved pages, of which no touch must find too few.
//!
//! Threads take chunks by an atomic counter; whoever started them looks at the progress and never
//! waits for a thread. Dropping stops and joins them, within one chunk.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use slat_proto::model::PAGE_SIZE;

use super::{
    huge::{BLOCK, RUN},
    slots::{SlotMemory, SlotTable},
};
use crate::cpu_time::thread_cpu_time;

/// Pages that a thread takes at a time: a run of huge ones, and short enough that a stop is prompt.
const CHUNK: u64 = RUN * BLOCK;
const MAX_THREADS: usize = 8;
/// Whoever waits looks this often.
const LOOK: Duration = Duration::from_millis(2);

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
            let (pages, chunk) = (slot.spec().pages, chunk_of(slot));
            let chunks = pages.div_ceil(chunk);
            if number < chunks {
                let first = number * chunk;
                return Some((&**slot, first, chunk.min(pages - first)));
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

/// Pages of a slot that a thread takes at a time: a reserved page at least, or threads would touch
/// the same one and wait for each other.
fn chunk_of(slot: &SlotMemory) -> u64 {
    let reserved = slot.region().mode().backing.reserved_page();
    CHUNK.max(reserved.unwrap_or(PAGE_SIZE) / PAGE_SIZE)
}

/// Populating under way, or done.
#[derive(Debug)]
pub(crate) struct Populate {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Populate {
    /// Starts on all of `table`.
    pub(crate) fn start(table: &SlotTable) -> io::Result<Self> {
        Self::of(table.slots().to_vec())
    }

    /// Starts on these slots.
    pub(crate) fn of(slots: Vec<Arc<SlotMemory>>) -> io::Result<Self> {
        let chunks = slots
            .iter()
            .map(|slot| slot.spec().pages.div_ceil(chunk_of(slot)))
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
    pub(crate) fn percent(&self) -> io::Result<u32> {
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
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Waits until all of it is there, no longer than `patience`.
    ///
    /// # Errors
    /// What the kernel said when memory was short; TimedOut.
    pub(crate) fn wait(&self, patience: Duration) -> io::Result<()> {
        let begun = Instant::now();
        while self.percent()? < 100 {
            if begun.elapsed() > patience {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Waits for the threads, which have nothing left to do at 100 per cent, and says what they
    /// cost.
    pub(crate) fn finish(self) -> Duration {
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
        populate.wait(Duration::from_secs(30)).unwrap();
        let table = memory.table();
        let all: u64 = table.slots().iter().map(|slot| slot.spec().bytes()).sum();
        assert_eq!(populate.bytes(), all);
        for slot in memory.table().slots() {
            let host = slot.host().range_ptr(0, 1).addr() as u64;
            for view in [slot.guest().address(), host] {
                assert_eq!(resident(view), slot.spec().bytes());
            }
        }
    }
}
