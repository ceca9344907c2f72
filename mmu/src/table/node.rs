//! Tables and the entries in them.
//!
//! # Protocol
//!
//! Any thread may read entries under a [`Guard`]; entries change only by atomic operations, so a reader sees the old or
//! the new value, and a table's contents before the entry that links it (release on link, acquire on load). Threads
//! that change entries are serialised by the MMU's lock today, but nothing here relies on it: each change is a
//! compare-exchange or an exchange, because hardware sets Accessed and Dirty at any time.
//!
//! # Invariants
//!
//! 1. An entry that decodes to `Table { pfn }` in a node of level *n* was stored by [`Node::link`], so `pfn` is a live
//!    table of level *n* - 1. [`Node::replace`] and [`Unlinked::set`] refuse to store a table entry.
//! 2. A table is linked by at most one entry: linking consumes its [`Unlinked`], overwriting the entry produces its
//!    [`Detached`], and neither can be copied.
//! 3. A table is freed either as `Unlinked` (nobody ever saw it) or as `Detached` after a grace period.

use alloc::vec::Vec;
use core::{
    fmt,
    marker::PhantomData,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use spin::mutex::SpinMutex;

use super::{
    memory::TableMemory,
    readers::{Grace, ReadGuard, Readers},
};
use crate::{
    addr::{Level, Pfn},
    format::{Entry, Format},
};

/// No root: a frame number that no format can hold.
const NO_ROOT: u64 = u64::MAX;

/// All tables of one MMU.
pub(crate) struct Tables<F: Format, H: TableMemory> {
    memory: H,
    root: AtomicU64,
    readers: Readers,
    limbo: SpinMutex<Limbo>,
    live: AtomicU64,
    format: PhantomData<F>,
}

/// Tables that wait for readers. One batch waits at a time; what is retired meanwhile forms the next.
#[derive(Default)]
struct Limbo {
    next: Vec<Detached>,
    waiting: Vec<Detached>,
    grace: Option<Grace>,
}

/// A table that no entry has ever pointed to.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Unlinked {
    pfn: Pfn,
    level: Level,
}

/// A table that was linked once and is not any more; readers may still be in it.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Detached {
    pfn: Pfn,
    level: Level,
}

impl Detached {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }
}

impl<F: Format, H: TableMemory> Tables<F, H> {
    pub(crate) fn new(memory: H) -> Self {
        Self {
            memory,
            root: AtomicU64::new(NO_ROOT),
            readers: Readers::default(),
            limbo: SpinMutex::new(Limbo::default()),
            live: AtomicU64::new(0),
            format: PhantomData,
        }
    }

    pub(crate) fn memory(&self) -> &H {
        &self.memory
    }

    pub(crate) fn pin(&self) -> ReadGuard<'_> {
        self.readers.pin()
    }

    pub(crate) fn guard(&self) -> Guard<'_, F, H> {
        Guard {
            tables: self,
            _readers: self.readers.pin(),
        }
    }

    /// Tables that occupy memory: linked, not yet linked, or waiting for readers.
    pub(crate) fn live(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    /// Tables that wait for readers.
    pub(crate) fn retired(&self) -> u64 {
        let limbo = self.limbo.lock();
        (limbo.next.len() + limbo.waiting.len()) as u64
    }

    /// First frame of the root, if there is one.
    pub(crate) fn root_pfn(&self) -> Option<Pfn> {
        let pfn = self.root.load(Ordering::Acquire);
        (pfn != NO_ROOT).then_some(Pfn(pfn))
    }

    /// An empty table of `level`.
    pub(crate) fn allocate(&self, level: Level) -> Option<Unlinked> {
        let bytes = F::node_size(level);
        let pfn = self.memory.allocate(bytes)?;
        if pfn.0 >= F::MAX_PFN.0 {
            // SAFETY: allocated just now with this size; nobody else knows the frame.
            unsafe { self.memory.free(pfn, bytes) };
            return None;
        }
        self.live.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `pfn` is a fresh table of `level` that outlives this borrow of `self.memory`.
        for entry in unsafe { self.entries(pfn, level) } {
            entry.store(F::EMPTY, Ordering::Relaxed);
        }
        Some(Unlinked { pfn, level })
    }

    /// Gives back a table that was never linked.
    pub(crate) fn free_unlinked(&self, node: Unlinked) {
        // SAFETY: the ticket proves that nobody has seen the table (invariant 3).
        unsafe { self.free(node.pfn, node.level) };
    }

    /// Makes `node`, a table of the root level, the root; returns the old one.
    pub(crate) fn set_root(&self, node: Option<Unlinked>) -> Option<Detached> {
        let pfn = match node {
            Some(Unlinked { pfn, level }) if level == F::ROOT_LEVEL => pfn.0,
            Some(other) => {
                self.free_unlinked(other);
                NO_ROOT
            }
            None => NO_ROOT,
        };
        let old = self.root.swap(pfn, Ordering::AcqRel);
        (old != NO_ROOT).then_some(Detached {
            pfn: Pfn(old),
            level: F::ROOT_LEVEL,
        })
    }

    /// Hands an unlinked table, which must no longer link any other, to the grace period.
    pub(crate) fn retire(&self, node: Detached) {
        self.limbo.lock().next.push(node);
    }

    /// Frees the retired tables that no reader can see any more. Never waits.
    pub(crate) fn reclaim(&self) {
        let mut limbo = self.limbo.lock();
        // Two rounds: the batch that waits, and the one that forms behind it.
        for _ in 0..2 {
            if let Some(grace) = &mut limbo.grace {
                if !self.readers.poll(grace) {
                    return;
                }
                limbo.grace = None;
                for node in limbo.waiting.drain(..) {
                    // SAFETY: the ticket was consumed by `retire`, so the table is unlinked for good, and each reader
                    // that could have seen it is gone (invariant 3).
                    unsafe { self.free(node.pfn, node.level) };
                }
            }
            if limbo.next.is_empty() {
                return;
            }
            limbo.waiting = core::mem::take(&mut limbo.next);
            limbo.grace = Some(self.readers.grace());
        }
    }

    /// # Safety
    ///
    /// `pfn` is the first frame of a live table of `level`, and stays one while the result is used.
    unsafe fn entries(&self, pfn: Pfn, level: Level) -> &[AtomicU64] {
        let first = self.memory.entries(pfn);
        // SAFETY: `TableMemory` promises `node_size(level)` bytes of atomics at this pointer while the table is live;
        // the caller promises that it is.
        unsafe { slice::from_raw_parts(first.as_ptr(), F::entries(level)) }
    }

    /// # Safety
    ///
    /// `pfn` is a live table of `level` that nobody uses or can reach.
    unsafe fn free(&self, pfn: Pfn, level: Level) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: allocated by `allocate` with this size; unused, as the caller promises.
        unsafe { self.memory.free(pfn, F::node_size(level)) };
    }
}

impl<F: Format, H: TableMemory> Drop for Tables<F, H> {
    fn drop(&mut self) {
        // `&mut self`: no guard is left, whatever the counters say of guards that were forgotten.
        let limbo = core::mem::take(self.limbo.get_mut());
        for node in limbo.next.into_iter().chain(limbo.waiting) {
            // SAFETY: retired, and no reader can exist.
            unsafe { self.free(node.pfn, node.level) };
        }
    }
}

impl<F: Format, H: TableMemory> fmt::Debug for Tables<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables")
            .field("root", &self.root_pfn())
            .field("live", &self.live())
            .field("retired", &self.retired())
            .finish_non_exhaustive()
    }
}

/// What [`Node::take`] leaves behind.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Absent {
    /// An entry that a fault may fill.
    Empty,
    /// An entry of a table that is being torn down: nobody may fill it.
    Frozen,
}

/// Leave to look at tables; see [`ReadGuard`].
pub(crate) struct Guard<'a, F: Format, H: TableMemory> {
    tables: &'a Tables<F, H>,
    _readers: ReadGuard<'a>,
}

impl<F: Format, H: TableMemory> Guard<'_, F, H> {
    pub(crate) fn root(&self) -> Option<Node<'_, F>> {
        let pfn = self.tables.root_pfn()?;
        // SAFETY: the root was live when it was read under this guard, so it is not freed before the guard ends.
        let entries = unsafe { self.tables.entries(pfn, F::ROOT_LEVEL) };
        Some(Node {
            entries,
            pfn,
            level: F::ROOT_LEVEL,
            format: PhantomData,
        })
    }

    /// A table that was unlinked but not retired.
    pub(crate) fn detached(&self, node: &Detached) -> Node<'_, F> {
        // SAFETY: the ticket exists, so the table is not retired yet; if it is retired later, this guard is older.
        let entries = unsafe { self.tables.entries(node.pfn, node.level) };
        Node {
            entries,
            pfn: node.pfn,
            level: node.level,
            format: PhantomData,
        }
    }

    /// The table that entry `index` of `node` points to now, if it points to one.
    pub(crate) fn child<'g>(&'g self, node: Node<'g, F>, index: usize) -> Option<Node<'g, F>> {
        let Entry::Table { pfn } = F::decode(node.load(index), node.level) else {
            return None;
        };
        let level = node.level.child()?;
        // SAFETY: invariant 1, and the entry was read under this guard.
        let entries = unsafe { self.tables.entries(pfn, level) };
        Some(Node {
            entries,
            pfn,
            level,
            format: PhantomData,
        })
    }
}

/// A table being looked at.
pub(crate) struct Node<'g, F> {
    entries: &'g [AtomicU64],
    pfn: Pfn,
    level: Level,
    format: PhantomData<F>,
}

impl<F> Clone for Node<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Node<'_, F> {}

impl<F: Format> Node<'_, F> {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn load(&self, index: usize) -> u64 {
        self.entries[index].load(Ordering::Acquire)
    }

    /// Stores `new`, which is not a table, if the entry is still `old`. If `old` linked a table, that table is returned.
    ///
    /// # Errors
    ///
    /// The entry's present value, if it is not `old` or if `new` is a table.
    pub(crate) fn replace(
        &self,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<Option<Detached>, u64> {
        if matches!(F::decode(new, self.level), Entry::Table { .. }) {
            return Err(self.load(index));
        }
        self.entries[index].compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)?;
        Ok(self.detach(old))
    }

    /// Empties the entry whatever it holds, and returns what that was.
    pub(crate) fn take(&self, index: usize, leave: Absent) -> (u64, Option<Detached>) {
        let new = match leave {
            Absent::Empty => F::EMPTY,
            Absent::Frozen => F::FROZEN,
        };
        let old = self.entries[index].swap(new, Ordering::AcqRel);
        (old, self.detach(old))
    }

    /// Points the entry to `child`, with all that was written into it, if the entry is still `old` and `old` is no table.
    ///
    /// # Errors
    ///
    /// `child` comes back if the entry has changed, or if it is not of the level below.
    pub(crate) fn link(&self, index: usize, old: u64, child: Unlinked) -> Result<(), Unlinked> {
        let is_table = matches!(F::decode(old, self.level), Entry::Table { .. });
        if is_table || Some(child.level) != self.level.child() {
            return Err(child);
        }
        let new = F::make_table(child.pfn);
        match self.entries[index].compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(_) => Err(child),
        }
    }

    fn detach(&self, old: u64) -> Option<Detached> {
        match (F::decode(old, self.level), self.level.child()) {
            (Entry::Table { pfn }, Some(level)) => Some(Detached { pfn, level }),
            _ => None,
        }
    }
}

impl Unlinked {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// Writes all entries; a value that would be a table becomes empty.
    pub(crate) fn set<F: Format, H: TableMemory>(
        &self,
        tables: &Tables<F, H>,
        value: impl Fn(usize) -> u64,
    ) {
        // SAFETY: the ticket exists, so the table is live for as long as `self` is borrowed.
        let entries = unsafe { tables.entries(self.pfn, self.level) };
        for (index, entry) in entries.iter().enumerate() {
            let raw = value(index);
            let is_table = matches!(F::decode(raw, self.level), Entry::Table { .. });
            entry.store(if is_table { F::EMPTY } else { raw }, Ordering::Relaxed);
        }
    }
}
