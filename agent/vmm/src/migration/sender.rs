//! Sends pages: one thread a data stream, all taking chunks of the same iteration.
//!
//! # Protocol
//! An [`Iteration`] is a set of pages by slot. The coordinator hands the same iteration to every
//! [`Sender`]; each takes the next chunk of 256 pages with something in it until none is left,
//! sends its pages that are not zero with their contents and the zero ones as ranges, ends with
//! `IterEnd` and reports. A page is in one chunk, so one stream sends it once an iteration;
//! iterations are separated by the destination's `IterAck`, so an old copy never overtakes a newer
//! one.
//!
//! # Pace
//! With `max_bandwidth` all senders together keep below it, except while the vCPUs are stopped: the
//! last pages go as fast as the wire takes them, and nothing is made up for afterwards. How fast
//! that would be is measured all along: after a chunk a held-up sender watches until the peer's
//! kernel has it, and that time alone counts as the wire's ([`Counters::wire_nanos`]).
//!
//! A sender stops between chunks when the migration is broken off, which also ends a blocked write.

use std::{
    io::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    breaker::Breaker,
    filter::PageFilter,
    stream::Outlet,
    wire::{FrameWriter, HEADER, Kind, MAX_FRAME_PAGES, PAGE, RUN, Run, WireError, encode_runs},
};
use crate::{
    confine,
    cpu_time::thread_cpu_time,
    memory::{DIRTY_WINDOW as WINDOW, DirtyBatch, DirtyBitmap, SlotMemory, SlotTable},
};

const CHUNK_WORDS: usize = MAX_FRAME_PAGES as usize / 64;
/// A short iteration is cut into so many chunks for each stream.
const CHUNKS_A_STREAM: usize = 4;
/// The wire has a chunk when no more than this is not acknowledged: the peer may hold back the
/// last acknowledgement.
const NEARLY_NOTHING: usize = 64 << 10;
/// A held-up sender looks at the wire after this, then after twice as long each time.
const FIRST_LOOK: Duration = Duration::from_micros(100);
const LAST_LOOK: Duration = Duration::from_millis(10);

/// One slot's pages of an iteration.
#[derive(Debug)]
struct IterationSlot {
    memory: Arc<SlotMemory>,
    bitmap: Arc<DirtyBitmap>,
}

/// Told of a slot and pages of it that are about to be read: first and number.
type BeforeReading = Box<dyn Fn(u32, u64, u64) + Send + Sync>;

/// Pages to send once.
pub(super) struct Iteration {
    pub(super) number: u32,
    /// Words of a bitmap in one chunk: fewer when there is little, so that each stream gets some.
    chunk_words: usize,
    slots: Vec<IterationSlot>,
    pages: u64,
    /// Called with each window of pages, under `next`, before a page of it is given to a sender.
    before: Option<BeforeReading>,
    next: Mutex<Position>,
}

impl std::fmt::Debug for Iteration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iteration")
            .field("number", &self.number)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

/// Where the next chunk is looked for.
#[derive(Debug, Default)]
struct Position {
    slot: usize,
    word: usize,
    /// Pages of the slot below this were said to be about to be read.
    said: u64,
}

impl Iteration {
    fn new(number: u32, slots: Vec<IterationSlot>) -> Self {
        Self {
            number,
            chunk_words: CHUNK_WORDS,
            pages: slots.iter().map(|slot| slot.bitmap.count()).sum(),
            slots,
            before: None,
            next: Mutex::default(),
        }
    }

    /// Cut so that `streams` have some chunks each, where there are pages enough.
    pub(super) fn spread(mut self, streams: usize) -> Self {
        let chunks = (streams * CHUNKS_A_STREAM).max(1) as u64;
        self.chunk_words = (self.pages / 64 / chunks).clamp(1, CHUNK_WORDS as u64) as usize;
        self
    }

    /// The pages of a batch; those of slots that are gone are left out.
    pub(super) fn of(number: u32, batch: DirtyBatch, table: &SlotTable) -> Self {
        let slots = batch.slots.into_iter().filter_map(|(slot, bitmap)| {
            let memory = Arc::clone(table.slot(slot)?);
            Some(IterationSlot { memory, bitmap })
        });
        Self::new(number, slots.collect())
    }

    /// Every page of the slots.
    pub(super) fn bulk(slots: &[Arc<SlotMemory>]) -> Self {
        let whole = |memory: &Arc<SlotMemory>| IterationSlot {
            bitmap: Arc::new(DirtyBitmap::full(memory.spec().pages)),
            memory: Arc::clone(memory),
        };
        Self::new(0, slots.iter().map(whole).collect())
    }

    /// Has `before` called with every window of pages before a page of it is read.
    pub(super) fn protected_by(
        mut self,
        before: impl Fn(u32, u64, u64) + Send + Sync + 'static,
    ) -> Self {
        self.before = Some(Box::new(before));
        self
    }

    pub(super) fn bytes(&self) -> u64 {
        self.pages * PAGE as u64
    }

    /// The next chunk nobody has taken: its slot, first page and words. Clean regions are passed
    /// over by the bitmap's summary.
    fn take(&self) -> Option<(&IterationSlot, u32, &[u64])> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(slot) = self.slots.get(next.slot) {
            if let Some((word, words)) = slot.bitmap.next_piece(next.word, self.chunk_words) {
                next.word = word + self.chunk_words;
                self.say(&mut next, slot);
                return Some((slot, (word * 64) as u32, words));
            }
            *next = Position {
                slot: next.slot + 1,
                ..Position::default()
            };
        }
        None
    }

    /// Says that the pages up to `next.word` are about to be read, by windows.
    fn say(&self, next: &mut Position, slot: &IterationSlot) {
        let Some(before) = &self.before else {
            return;
        };
        let spec = slot.memory.spec();
        while next.said < (next.word as u64 * 64).min(spec.pages) {
            before(spec.slot, next.said, WINDOW.min(spec.pages - next.said));
            next.said += WINDOW;
        }
    }
}

/// Figures that all senders add to and the coordinator reads while they work.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// On the wire, headers included.
    pub(super) bytes: AtomicU64,
    pub(super) pages_normal: AtomicU64,
    pub(super) pages_zero: AtomicU64,
    /// Of all sender threads, nanoseconds, brought up to date after each iteration.
    pub(super) cpu_nanos: AtomicU64,
    /// With a pacer: time in which the wire, and not the pacer, held a sender up, added up over
    /// all senders, nanoseconds.
    pub(super) wire_nanos: AtomicU64,
}

/// Keeps all streams together below a number of bytes a second.
#[derive(Debug)]
pub(super) struct BandwidthPacer {
    bytes_per_second: u64,
    /// When the wire is free again.
    free_at: Mutex<Instant>,
    /// The vCPUs are stopped: nobody waits.
    lifted: AtomicBool,
}

impl BandwidthPacer {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            free_at: Mutex::new(Instant::now()),
            lifted: AtomicBool::new(false),
        }
    }

    /// While lifted nobody waits. What was booked before is forgotten.
    pub(super) fn lift(&self, lifted: bool) {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        self.lifted.store(lifted, Ordering::Relaxed);
        *free_at = Instant::now();
    }

    /// Books `bytes`; how long to wait until the wire would have taken what was booked before.
    fn book(&self, bytes: u64) -> Duration {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lifted.load(Ordering::Relaxed) {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let start = (*free_at).max(now);
        let takes = bytes as f64 / self.bytes_per_second as f64;
        *free_at = start + Duration::from_secs_f64(takes.min(86_400.0));
        start.saturating_duration_since(now)
    }
}

/// What all senders of a migration share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) counters: Counters,
    pub(super) breaker: Arc<Breaker>,
    pub(super) pacer: Option<BandwidthPacer>,
    pub(super) filter: Arc<dyn PageFilter>,
}

/// A sender's report: the iteration is sent, or what went wrong.
pub(super) type Report = (usize, Result<(), WireError>);

/// A running sender thread. Dropping the channel ends it after its iteration.
#[derive(Debug)]
pub(super) struct Sender {
    iterations: mpsc::Sender<Arc<Iteration>>,
    thread: JoinHandle<()>,
}

impl Sender {
    /// Starts a thread that sends on `stream`, whose introduction is done.
    pub(super) fn spawn(
        number: usize,
        stream: Outlet,
        writer: FrameWriter,
        shared: Arc<Shared>,
        reports: mpsc::Sender<Report>,
    ) -> std::io::Result<Self> {
        let (iterations, inbox) = mpsc::channel::<Arc<Iteration>>();
        let thread = std::thread::Builder::new()
            .name(format!("send-{number}"))
            .spawn(move || {
                confine::enter(confine::Role::Stream);
                let mut worker = Worker::new(stream, writer, shared);
                let mut cpu = Duration::ZERO;
                for iteration in inbox {
                    let result = worker.send_iteration(&iteration);
                    // The dirty log uses its bitmaps again, once this is the last to let go.
                    drop(iteration);
                    let now = thread_cpu_time();
                    let spent = now.saturating_sub(cpu).as_nanos() as u64;
                    worker
                        .shared
                        .counters
                        .cpu_nanos
                        .fetch_add(spent, Ordering::Relaxed);
                    cpu = now;
                    let failed = result.is_err();
                    // The coordinator is gone only when the whole side has ended.
                    if reports.send((number, result)).is_err() || failed {
                        return;
                    }
                }
            })?;
        Ok(Self { iterations, thread })
    }

    /// Hands an iteration over. A sender whose thread has ended has reported why.
    pub(super) fn start(&self, iteration: &Arc<Iteration>) {
        drop(self.iterations.send(Arc::clone(iteration)));
    }

    /// Waits for the thread's end.
    pub(super) fn join(self) {
        drop(self.iterations);
        if self.thread.join().is_err() {
            tracing::error!("a sender thread panicked");
        }
    }
}

struct Worker {
    stream: Outlet,
    writer: FrameWriter,
    shared: Arc<Shared>,
    head: Vec<u8>,
    normal: Vec<Run>,
    zero: Vec<Run>,
}

/// Adds a page to the last run, or begins one.
fn push(runs: &mut Vec<Run>, page: u32) {
    match runs.last_mut() {
        Some(run) if run.page + run.pages == page => run.pages += 1,
        _ => runs.push(Run { page, pages: 1 }),
    }
}

fn total(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.pages)).sum()
}

impl Worker {
    fn new(stream: Outlet, writer: FrameWriter, shared: Arc<Shared>) -> Self {
        Self {
            stream,
            writer,
            shared,
            head: Vec::with_capacity(HEADER + MAX_FRAME_PAGES as usize * RUN),
            normal: Vec::new(),
            zero: Vec::new(),
        }
    }

    fn send_iteration(&mut self, iteration: &Iteration) -> Result<(), WireError> {
        while let Some((slot, first, words)) = iteration.take() {
            if self.shared.breaker.is_broken() {
                return Err(WireError::Io(std::io::ErrorKind::ConnectionAborted.into()));
            }
            self.collect(slot, first, words, iteration.number);
            self.send_chunk(&slot.memory)?;
        }
        let end = self.writer.header(Kind::IterEnd, 0, iteration.number, 0);
        self.stream.write_all(&end)?;
        self.shared
            .counters
            .bytes
            .fetch_add(HEADER as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Sorts a chunk's pages into runs with contents and runs of zeroes.
    fn collect(&mut self, slot: &IterationSlot, first: u32, words: &[u64], iteration: u32) {
        self.normal.clear();
        self.zero.clear();
        let (memory, filter) = (&slot.memory, &*self.shared.filter);
        for (index, &word) in words.iter().enumerate() {
            let mut bits = word;
            while bits != 0 {
                let page = first + index as u32 * 64 + bits.trailing_zeros();
                bits &= bits - 1;
                if !filter.sends(memory.spec().slot, page, iteration) {
                    continue;
                }
                if memory.page_is_zero(page.into()) {
                    push(&mut self.zero, page);
                } else {
                    push(&mut self.normal, page);
                }
            }
        }
    }

    fn send_chunk(&mut self, memory: &SlotMemory) -> Result<(), WireError> {
        let begun = Instant::now();
        let slot = memory.spec().slot;
        let counters = &self.shared.counters;
        let mut sent = 0;
        if !self.normal.is_empty() {
            let pages = total(&self.normal);
            let length = self.normal.len() * RUN + pages as usize * PAGE;
            self.head.clear();
            self.head.extend_from_slice(&self.writer.header(
                Kind::Pages,
                slot,
                self.normal.len() as u32,
                length as u32,
            ));
            encode_runs(&self.normal, &mut self.head);
            self.stream.send(&self.head, memory.host(), &self.normal)?;
            counters.pages_normal.fetch_add(pages, Ordering::Relaxed);
            sent += (HEADER + length) as u64;
        }
        if !self.zero.is_empty() {
            let length = self.zero.len() * RUN;
            self.head.clear();
            self.head.extend_from_slice(&self.writer.header(
                Kind::Zero,
                slot,
                self.zero.len() as u32,
                length as u32,
            ));
            encode_runs(&self.zero, &mut self.head);
            self.stream.write_all(&self.head)?;
            counters
                .pages_zero
                .fetch_add(total(&self.zero), Ordering::Relaxed);
            sent += (HEADER + length) as u64;
        }
        counters.bytes.fetch_add(sent, Ordering::Relaxed);
        if let Some(pacer) = &self.shared.pacer {
            self.hold_up(begun, pacer.book(sent));
        }
        Ok(())
    }

    /// Waits for `time`. The wire's part of it, since `begun`, ends when the peer has the chunk.
    fn hold_up(&self, begun: Instant, time: Duration) {
        let breaker = &self.shared.breaker;
        let until = Instant::now() + time;
        let mut look = FIRST_LOOK;
        while self
            .stream
            .unacknowledged()
            .is_some_and(|bytes| bytes > NEARLY_NOTHING)
        {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !breaker.sleep(look.min(left)) {
                break;
            }
            look = (look * 2).min(LAST_LOOK);
        }
        let wire = begun.elapsed().as_nanos() as u64;
        let counters = &self.shared.counters;
        counters.wire_nanos.fetch_add(wire, Ordering::Relaxed);
        breaker.sleep(until.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::SlotSpec;

    use super::*;

    fn slot(number: u32, base: u64, pages: u64) -> Arc<SlotMemory> {
        let spec = SlotSpec::new(number, base, pages, false).unwrap();
        Arc::new(SlotMemory::new(spec).unwrap())
    }

    /// Every page of every chunk, as (slot, page).
    fn taken(iteration: &Iteration) -> std::collections::BTreeSet<(u32, u32)> {
        let mut seen = std::collections::BTreeSet::new();
        while let Some((slot, first, words)) = iteration.take() {
            assert!(words.len() <= CHUNK_WORDS && words.iter().any(|word| *word != 0));
            for (index, word) in words.iter().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let page = first + index as u32 * 64 + bit;
                    assert!(u64::from(page) < slot.memory.spec().pages);
                    assert!(seen.insert((slot.memory.spec().slot, page)));
                }
            }
        }
        seen
    }

    #[test]
    fn a_bulk_iteration_has_every_page_once() {
        let iteration = Iteration::bulk(&[slot(0, 0, 1000), slot(1, 5000, 64)]);
        assert_eq!(iteration.bytes(), 1064 * 4096);
        assert_eq!(taken(&iteration).len(), 1064);
    }

    #[test]
    fn chunks_without_dirty_pages_are_not_handed_out() {
        let pages = [3, 255, 256, 70_000, 99_999];
        let mut bitmap = DirtyBitmap::new(100_000);
        pages.iter().for_each(|page| bitmap.set(*page, 1));
        let slots = [(0, 0, bitmap), (1, 1 << 20, DirtyBitmap::new(5))];
        let slots = slots.map(|(number, base, bitmap)| IterationSlot {
            memory: slot(number, base, bitmap.pages()),
            bitmap: Arc::new(bitmap),
        });
        let iteration = Iteration::new(1, slots.into());
        assert_eq!(iteration.bytes(), 5 * 4096);
        let mut chunks = 0;
        while iteration.take().is_some() {
            chunks += 1;
        }
        assert_eq!(chunks, 4);
        *iteration.next.lock().unwrap() = Position::default();
        assert_eq!(taken(&iteration), pages.map(|page| (0, page as u32)).into());
    }

    #[test]
    fn a_pacer_keeps_the_rate_and_drops_its_debt_when_it_is_lifted() {
        let pacer = BandwidthPacer::new(1 << 20);
        let begun = Instant::now();
        let waits: Vec<Duration> = (0..5).map(|_| pacer.book(1 << 16)).collect();
        // The first booking waits for nothing; four of 1/16 s each come before the last.
        assert_eq!(waits[0], Duration::ZERO);
        let last = *waits.last().unwrap() + begun.elapsed();
        assert!(last >= Duration::from_millis(240), "{waits:?}");
        pacer.lift(true);
        assert_eq!(pacer.book(1 << 30), Duration::ZERO);
        pacer.lift(false);
        assert_eq!(pacer.book(1), Duration::ZERO, "nothing is made up for");
    }

    #[test]
    fn a_short_iteration_is_spread_over_the_streams() {
        let whole = [slot(0, 0, 512)];
        let count = |iteration: &Iteration| {
            let mut chunks = 0;
            while iteration.take().is_some() {
                chunks += 1;
            }
            chunks
        };
        assert_eq!(count(&Iteration::bulk(&whole)), 2);
        let spread = Iteration::bulk(&whole).spread(4);
        assert_eq!(count(&spread), 8, "all four streams have some");
        *spread.next.lock().unwrap() = Position::default();
        assert_eq!(taken(&spread).len(), 512);
        // Where there is plenty, chunks are as large as ever.
        let plenty = Iteration::bulk(&[slot(0, 0, 1 << 16)]).spread(4);
        assert_eq!(count(&plenty), (1 << 16) / 256);
    }
}
