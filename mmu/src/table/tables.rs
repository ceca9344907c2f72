//! Allocation and reclamation of tables.
//!
//! A table that was unlinked waits in *limbo* for the end of a grace period, with the number of the
//! era that its unlinking ended. Nobody waits for it: who retires tables, or asks for it, frees
//! those whose time has come.
//!
//! *Locking*: limbo's lock (`locks`), offered to others between batches. *Invariants*: `live`
//! counts every table between its allocation and its being given back; eras in limbo never fall.

use alloc::{collections::VecDeque, sync::Arc, vec::Vec};
use core::{fmt, marker::PhantomData, slice};

use super::{
    header::{Header, PageRole, frames_of},
    memory::TableMemory,
    ticket::{Blank, Detached, RootTable, Unlinked},
};
use crate::{
    addr::{Gfn, Pfn},
    format::Format,
    rcu::participants::Participants,
    sync::{AcqRel, Acquire, AtomicU64, Counted, Mutex, Relaxed, Statistic, give_way},
};

/// All tables of one MMU.
pub(crate) struct Tables<F: Format, H: TableMemory> {
    memory: H,
    participants: Arc<Participants>,
    limbo: Mutex<VecDeque<Retired>>,
    live: Statistic,
    /// Tables in limbo.
    retired: Statistic,
    /// How many tables were ever retired: a hint that is older than this may be stale.
    unlinks: AtomicU64,
    format: PhantomData<F>,
}

/// Tables after whose freeing limbo's lock is let go of. What was retired at once, at most 513
/// tables, is freed at once.
const BATCH: u64 = 512;

struct Retired {
    era: u64,
    table: Gone,
}

enum Gone {
    Tables(Retiring),
    Root(Counted<RootTable>),
}

impl Gone {
    fn count(&self) -> u64 {
        match self {
            Self::Tables(tables) => tables.0.len() as u64,
            Self::Root(_) => 1,
        }
    }
}

/// Roots that were to be freed and that someone holds still.
#[derive(Default)]
#[must_use = "dropping it leaks the roots"]
pub(crate) struct Held(Vec<Retired>);

/// Tables on their way out, none of them a root: tickets, consumed, of which the frames are left.
#[must_use = "dropping it leaks the tables"]
pub(crate) struct Retiring(Vec<Pfn>);

impl Retiring {
    pub(crate) fn with_capacity(tables: usize) -> Self {
        Self(Vec::with_capacity(tables))
    }

    /// First frames of the tables.
    pub(crate) fn pfns(&self) -> &[Pfn] {
        &self.0
    }

    #[inline(always)]
    pub(super) fn push<F: Format, H: TableMemory>(
        &mut self,
        tables: &Tables<F, H>,
        node: Detached,
    ) {
        tables.memory.header(node.pfn).forget();
        self.0.push(node.pfn);
    }
}

impl<F: Format, H: TableMemory> Tables<F, H> {
    pub(crate) fn new(memory: H, participants: Arc<Participants>) -> Self {
        Self {
            memory,
            participants,
            limbo: Mutex::new(VecDeque::new()),
            live: Statistic::new(0),
            retired: Statistic::new(0),
            unlinks: AtomicU64::new(0),
            format: PhantomData,
        }
    }

    pub(crate) fn memory(&self) -> &H {
        &self.memory
    }

    /// Tables that occupy memory: linked, in a cache, or waiting for readers.
    pub(crate) fn live(&self) -> u64 {
        self.live.load(Relaxed)
    }

    /// Tables that wait for readers.
    pub(crate) fn retired(&self) -> u64 {
        self.retired.load(Relaxed)
    }

    #[inline(always)]
    pub(crate) fn unlinks(&self) -> u64 {
        self.unlinks.load(Acquire)
    }

    /// Bytes of a table that is not a root.
    const fn node_bytes() -> usize {
        8 << F::INDEX_BITS[0]
    }

    /// Memory for a table that is not a root.
    pub(crate) fn blank(&self) -> Option<Blank> {
        const {
            let (mut level, bits) = (0, F::INDEX_BITS);
            while level + 1 < bits.len() {
                assert!(
                    bits[level] == bits[0],
                    "every table but the root has the same size"
                );
                level += 1;
            }
        }
        let pfn = self.allocate(Self::node_bytes())?;
        Some(Blank { pfn })
    }

    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        let pfn = self.memory.allocate(bytes)?;
        if pfn.0 >= F::MAX_PFN.0 {
            // SAFETY: allocated just now with this size; nobody else knows the frame.
            unsafe { self.memory.free(pfn, bytes) };
            return None;
        }
        self.live.fetch_add(1, Relaxed);
        Some(pfn)
    }

    /// An empty root table, described.
    pub(crate) fn root(&self, as_id: u8, mirror: bool) -> Option<Counted<RootTable>> {
        let level = F::ROOT_LEVEL;
        let pfn = self.allocate(F::node_size(level))?;
        // SAFETY: allocated just now.
        let first = unsafe { self.memory.entries(pfn) };
        // SAFETY: `TableMemory` promises so many entries at this pointer; the table is fresh, and
        // nobody else knows it.
        for entry in unsafe { slice::from_raw_parts(first.as_ptr(), F::entries(level)) } {
            entry.0.store(F::EMPTY, Relaxed);
        }
        self.memory
            .header(pfn)
            .describe(PageRole::new(as_id, level, mirror), Gfn(0), None);
        for frame in 1..frames_of(F::node_size(level)) {
            let tail = self.memory.header(Pfn(pfn.0 + frame));
            tail.describe_tail(frame as usize);
        }
        Some(Counted::new(RootTable::new(pfn, first)))
    }

    #[inline(always)]
    pub(crate) fn header(&self, pfn: Pfn) -> &Header {
        self.memory.header(pfn)
    }

    /// Gives back memory that was never linked.
    pub(crate) fn free_blank(&self, blank: Blank) {
        // SAFETY: the ticket proves that nobody has seen the table (invariant 3 of `node`).
        unsafe { self.free(blank.pfn, Self::node_bytes()) };
    }

    /// A table that was never linked, as memory for the next one.
    pub(crate) fn blank_again(&self, node: Unlinked) -> Blank {
        self.memory.header(node.pfn).forget();
        Blank { pfn: node.pfn }
    }

    /// Hands an unlinked table, which must no longer link any other, to the grace period.
    pub(crate) fn retire(&self, node: Detached) {
        let mut gone = Retiring::with_capacity(1);
        gone.push(self, node);
        self.retire_all(gone);
    }

    /// The same for many at once.
    pub(crate) fn retire_all(&self, tables: Retiring) {
        if !tables.0.is_empty() {
            self.put_off(Gone::Tables(tables));
        }
    }

    /// The same for a root that nobody can find any more. Who still holds it delays it.
    pub(crate) fn retire_root(&self, root: Counted<RootTable>) {
        self.put_off(Gone::Root(root));
    }

    fn put_off(&self, table: Gone) {
        // First the count, then the era: a hint taken before is refused, or its user is waited for
        // (see `hint`).
        self.unlinks.fetch_add(1, AcqRel);
        self.retired.fetch_add(table.count(), Relaxed);
        let mut limbo = self.limbo.lock();
        // Under the lock, so that eras in the queue never fall.
        let era = self.participants.end_era();
        limbo.push_back(Retired { era, table });
    }

    /// Frees the retired tables that no reader can see any more. Never waits for readers.
    ///
    /// In batches, with limbo's lock offered to others in between, such as a vCPU that gives a root
    /// up.
    pub(crate) fn reclaim(&self) {
        let mut held = Held::default();
        while self.reclaim_batch(&mut held) {}
        self.put_back(held);
    }

    /// Puts roots back that someone holds, each to its place: another reclaimer may have put back
    /// older ones, or newer ones, meanwhile.
    pub(crate) fn put_back(&self, held: Held) {
        if held.0.is_empty() {
            return;
        }
        let mut limbo = self.limbo.lock();
        for retired in held.0 {
            let place = limbo.partition_point(|other| other.era < retired.era);
            limbo.insert(place, retired);
        }
    }

    /// Frees a batch; whether there may be another. Roots that someone holds become `held`.
    pub(crate) fn reclaim_batch(&self, held: &mut Held) -> bool {
        let mut limbo = self.limbo.lock();
        let (Some(first), Some(last)) = (limbo.front(), limbo.back()) else {
            return false;
        };
        // All or the oldest: asking about each would look at every cell as often.
        let (oldest, all) = (first.era, last.era);
        let upto = if self.participants.is_over(all) {
            all
        } else if self.participants.is_over(oldest) {
            oldest
        } else {
            return false;
        };
        let mut looked_at = 0;
        while looked_at < BATCH {
            if limbo.front().is_none_or(|retired| retired.era > upto) {
                return upto != all;
            }
            let Some(retired) = limbo.pop_front() else {
                return false;
            };
            let count = retired.table.count();
            looked_at += count;
            match retired.table {
                // SAFETY: the ticket was consumed by `retire`, so the table is unlinked for good,
                // and each reader that could have seen it is gone (invariant 3 of `node`).
                Gone::Tables(tables) => unsafe { self.free_all(tables) },
                Gone::Root(root) => match Counted::try_unwrap(root) {
                    Ok(root) => self.free_root(root),
                    Err(root) => {
                        held.0.push(Retired {
                            era: retired.era,
                            table: Gone::Root(root),
                        });
                        continue;
                    }
                },
            }
            self.retired.fetch_sub(count, Relaxed);
        }
        let more = !limbo.is_empty();
        drop(limbo);
        if more {
            give_way();
        }
        more
    }

    fn free_root(&self, root: RootTable) {
        let bytes = F::node_size(F::ROOT_LEVEL);
        for frame in 0..frames_of(bytes) {
            self.memory.header(Pfn(root.pfn.0 + frame)).forget();
        }
        // SAFETY: nobody holds the root any more, and the grace period is over.
        unsafe { self.free(root.pfn, bytes) };
    }

    /// # Safety
    ///
    /// The tables were retired, and nobody uses or can reach them.
    unsafe fn free_all(&self, tables: Retiring) {
        self.live.fetch_sub(tables.0.len() as u64, Relaxed);
        // SAFETY: allocated by `blank` with this size; unused, as the caller promises.
        unsafe { self.memory.free_all(&tables.0, Self::node_bytes()) };
    }

    /// # Safety
    ///
    /// `pfn` is a live table of `bytes` that nobody uses or can reach.
    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        self.live.fetch_sub(1, Relaxed);
        // SAFETY: allocated by `allocate` with this size; unused, as the caller promises.
        unsafe { self.memory.free(pfn, bytes) };
    }
}

impl<F: Format, H: TableMemory> Drop for Tables<F, H> {
    fn drop(&mut self) {
        // `&mut self`: nobody is inside.
        let limbo = core::mem::take(&mut *self.limbo.lock());
        for retired in limbo {
            match retired.table {
                // SAFETY: retired, and no reader can exist.
                Gone::Tables(tables) => unsafe { self.free_all(tables) },
                Gone::Root(root) => {
                    if let Ok(root) = Counted::try_unwrap(root) {
                        self.free_root(root);
                    }
                }
            }
        }
    }
}

impl<F: Format, H: TableMemory> fmt::Debug for Tables<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables")
            .field("live", &self.live())
            .field("retired", &self.retired())
            .finish_non_exhaustive()
    }
}
