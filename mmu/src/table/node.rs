//! Entries, and the tickets that say which tables are linked.
//!
//! # Protocol
//!
//! Any participant that is inside may read entries; they change only by atomic operations, so a reader sees the old or
//! the new value, and a table's contents before the entry that links it (release on link, acquire on load).
//!
//! How an entry may be changed depends on what it holds and on the MMU lock:
//!
//! - *compare-exchange* ([`Node::replace`], [`Node::link`]): always allowed; fails if the entry changed.
//! - *exchange* ([`Node::take`]): for who may remove the entry whatever it holds (exclusive lock, or a table that is
//!   being torn down).
//! - *plain store* ([`Run::bottom`]): for a 4 KiB leaf that nobody else changes: the holder of the exclusive lock, or of the slots
//!   lock and the shared lock, on an entry that is not [volatile](crate::Format::is_volatile). Ageing may clear Accessed at
//!   the same time, and that may be lost.
//!
//! # Invariants
//!
//! 1. An entry that decodes to `Table { pfn }` in a node of level *n* was stored by [`Node::link`], so `pfn` is a live
//!    table of level *n* - 1. [`Node::replace`] and [`Blank::fill`] refuse to store a table entry; at 4 KiB no value is one.
//! 2. A table is linked by at most one entry: linking consumes its [`Unlinked`], overwriting the entry, or taking the table
//!    that holds it apart, produces its [`Detached`], and neither can be copied.
//! 3. A table is freed either as `Blank` or `Unlinked` (nobody ever saw it) or as `Detached` after a grace period.

use core::{marker::PhantomData, ptr::NonNull, slice};

use super::{
    memory::EntryCell,
    tables::{Retiring, Tables},
};
use crate::{
    addr::{Gfn, GfnRange, Level, PAGE_SHIFT, Pfn},
    format::Format,
    rcu::registry::Inside,
    sync::{AcqRel, Acquire, Relaxed, Release},
    table::memory::TableMemory,
};

/// Memory for a table that is not a root, with anything in it.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Blank {
    pub(super) pfn: Pfn,
}

/// A table that no entry has ever pointed to.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Unlinked {
    pub(super) pfn: Pfn,
    pub(super) level: Level,
}

/// A table that was linked once and is not any more; readers may still be in it.
#[derive(Debug)]
#[must_use = "dropping the ticket leaks the table"]
pub(crate) struct Detached {
    pub(super) pfn: Pfn,
    pub(super) level: Level,
}

/// A root's table: live for as long as this is.
#[derive(Debug)]
pub(crate) struct RootTable {
    pub(super) pfn: Pfn,
    entries: NonNull<EntryCell>,
}

// SAFETY: a pointer to atomics, which live as long as the table memory; who follows it shows that the root is live.
unsafe impl Send for RootTable {}
// SAFETY: as above.
unsafe impl Sync for RootTable {}

impl Unlinked {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Detached {
    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }
}

impl RootTable {
    pub(super) fn new(pfn: Pfn, entries: NonNull<EntryCell>) -> Self {
        Self { pfn, entries }
    }

    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }
}

/// Leave to look at tables: nothing that is reachable now is freed while it lives.
pub(crate) struct Guard<'a, F: Format, H: TableMemory> {
    pub(super) tables: &'a Tables<F, H>,
    /// Kept here, where it stays in a register: behind `tables` the compiler must fetch it after each entry. Null if not asked for.
    direct_map: *mut EntryCell,
    inside: Inside<'a>,
}

impl<'a, F: Format, H: TableMemory> Guard<'a, F, H> {
    #[inline(always)]
    pub(crate) fn new(tables: &'a Tables<F, H>, inside: Inside<'a>) -> Self {
        Self {
            tables,
            direct_map: if H::DIRECTLY_MAPPED {
                tables.memory().direct_map()
            } else {
                core::ptr::null_mut()
            },
            inside,
        }
    }

    #[inline(always)]
    pub(crate) fn inside(&self) -> &Inside<'a> {
        &self.inside
    }

    #[inline(always)]
    pub(crate) fn root<'g>(&'g self, root: &'g RootTable) -> Node<'g, F> {
        // SAFETY: the root is live while `root` is.
        unsafe { self.node(root.pfn.hpa(), F::ROOT_LEVEL) }
    }

    /// A table that was unlinked but not retired.
    pub(crate) fn detached(&self, node: &Detached) -> Node<'_, F> {
        // SAFETY: the ticket exists, so the table is not retired yet; if it is retired later, this guard is older.
        unsafe { self.node(node.pfn.hpa(), node.level) }
    }

    /// Takes a cut-off table apart: all tables below it, and then itself, become `gone`. Entries stay as they are, and who is
    /// still in there goes on reading them.
    ///
    /// # Safety
    ///
    /// Nobody else exchanges an entry that points to a table, in this table or below it, since it was cut off.
    pub(crate) unsafe fn take_apart(&self, table: Detached, gone: &mut Retiring) {
        let node = self.detached(&table);
        for entry in node.entries {
            // Relaxed: whoever linked the table was done before this one was cut off.
            let Some(child) = node.detach(entry.0.load(Relaxed)) else {
                continue;
            };
            if child.level == Level::SIZE_4K {
                gone.push(self.tables, child);
            } else {
                // SAFETY: the caller's promise covers what is below.
                unsafe { self.take_apart(child, gone) };
            }
        }
        gone.push(self.tables, table);
    }

    /// The table that entry `index` of `node` points to now, if it points to one.
    #[inline(always)]
    pub(crate) fn child<'g>(&'g self, node: Node<'g, F>, index: usize) -> Option<Node<'g, F>> {
        let hpa = F::table_hpa(node.load(index), node.level)?;
        let level = node.level.child()?;
        // SAFETY: invariant 1, and the entry was read under this guard.
        Some(unsafe { self.node(hpa, level) })
    }

    /// The 4 KiB table for `gfn`, if the tables go down so far. Its entry is not looked at.
    #[inline(always)]
    pub(crate) fn bottom<'g>(&'g self, root: &'g RootTable, gfn: Gfn) -> Option<Node<'g, F>> {
        self.descend_tables(root, gfn, |_, _, _| ()).ok()
    }

    /// Walks from `root` to the entry for `gfn` that is not a table.
    #[inline(always)]
    pub(crate) fn descend<'g>(&'g self, root: &'g RootTable, gfn: Gfn) -> (Node<'g, F>, u64) {
        self.descend_to(root, gfn, |node, raw, _| (node, raw))
    }

    /// As [`descend`](Self::descend), and tells `end` where the walk ended.
    #[inline(always)]
    pub(crate) fn descend_to<'g, R>(
        &'g self,
        root: &'g RootTable,
        gfn: Gfn,
        mut end: impl FnMut(Node<'g, F>, u64, Level) -> R,
    ) -> R {
        match self.descend_tables(root, gfn, &mut end) {
            Ok(node) => {
                let raw = node.load(F::index(gfn, Level::SIZE_4K));
                end(node, raw, Level::SIZE_4K)
            }
            Err(result) => result,
        }
    }

    /// To the 4 KiB table, or to `end` at a coarser level.
    ///
    /// Level by level with each level a constant, also to `end`, because this is what every TLB miss and every fault does.
    #[inline(always)]
    fn descend_tables<'g, R>(
        &'g self,
        root: &'g RootTable,
        gfn: Gfn,
        mut end: impl FnMut(Node<'g, F>, u64, Level) -> R,
    ) -> Result<Node<'g, F>, R> {
        let mut node = Node {
            // SAFETY: this many entries are at this pointer while the root is live, which it is while `root` is.
            entries: unsafe {
                slice::from_raw_parts(root.entries.as_ptr(), F::entries(F::ROOT_LEVEL))
            },
            hpa: root.pfn.hpa(),
            level: F::ROOT_LEVEL,
            format: PhantomData,
        };
        macro_rules! step {
            ($level:expr, $below:expr) => {
                if F::ROOT_LEVEL.get() >= $level.get() {
                    let raw = node.load(F::index(gfn, $level));
                    match F::table_hpa(raw, $level) {
                        // SAFETY: invariant 1, and the entry was read under this guard.
                        Some(hpa) => node = unsafe { self.node(hpa, $below) },
                        None => return Err(end(node, raw, $level)),
                    }
                }
            };
        }
        step!(Level::SIZE_256T, Level::SIZE_512G);
        step!(Level::SIZE_512G, Level::SIZE_1G);
        step!(Level::SIZE_1G, Level::SIZE_2M);
        step!(Level::SIZE_2M, Level::SIZE_4K);
        Ok(node)
    }

    /// # Safety
    ///
    /// At `hpa` is a live table of `level`, and it is not freed while this guard lives.
    #[inline(always)]
    pub(super) unsafe fn node(&self, hpa: u64, level: Level) -> Node<'_, F> {
        let first = if H::DIRECTLY_MAPPED {
            // SAFETY: it is what `entries` would return, as `TableMemory` promises.
            unsafe { NonNull::new_unchecked(self.direct_map.wrapping_byte_add(hpa as usize)) }
        } else {
            // SAFETY: a live table was allocated and not freed.
            unsafe { self.tables.memory().entries(Pfn(hpa >> PAGE_SHIFT)) }
        };
        Node {
            // SAFETY: `TableMemory` promises `node_size(level)` bytes of atomics at this pointer while the table is live;
            // the caller promises that it is.
            entries: unsafe { slice::from_raw_parts(first.as_ptr(), F::entries(level)) },
            hpa,
            level,
            format: PhantomData,
        }
    }
}

/// A table being looked at.
pub(crate) struct Node<'g, F> {
    entries: &'g [EntryCell],
    /// Host physical address, in bytes.
    hpa: u64,
    level: Level,
    format: PhantomData<F>,
}

impl<F> Clone for Node<'_, F> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Node<'_, F> {}

/// Entries in a cache line.
pub(crate) const LINE: usize = 64 / size_of::<u64>();

/// What [`Node::take`] leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    /// An entry that a fault may fill.
    Empty,
    /// An entry of a table that is being torn down: nobody may fill it.
    Frozen,
}

impl<'g, F: Format> Node<'g, F> {
    #[inline(always)]
    pub(crate) fn pfn(&self) -> Pfn {
        Pfn(self.hpa >> PAGE_SHIFT)
    }

    #[inline(always)]
    pub(super) fn hpa(&self) -> u64 {
        self.hpa
    }

    /// Host physical address of an entry, in bytes.
    pub(crate) fn address_of(&self, index: usize) -> u64 {
        self.hpa + (index * size_of::<u64>()) as u64
    }

    #[inline(always)]
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    #[inline(always)]
    pub(crate) fn load(&self, index: usize) -> u64 {
        self.entries[index].0.load(Acquire)
    }

    /// Stores `new`, which is not a table, if the entry is still `old`. If `old` linked a table, that table is returned.
    ///
    /// # Errors
    ///
    /// The entry's present value if it is not `old` (or if `new` is a table: a caller's mistake that changes nothing).
    #[inline(always)]
    pub(crate) fn replace(
        &self,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<Option<Detached>, u64> {
        if F::as_table(new, self.level).is_some() {
            return Err(self.load(index));
        }
        self.entries[index]
            .0
            .compare_exchange(old, new, AcqRel, Acquire)?;
        Ok(self.detach(old))
    }

    /// Empties the entry whatever it holds, and returns what that was.
    pub(crate) fn take(&self, index: usize, leave: Absent) -> (u64, Option<Detached>) {
        let new = match leave {
            Absent::Empty => F::EMPTY,
            Absent::Frozen => F::FROZEN,
        };
        let old = self.entries[index].0.swap(new, AcqRel);
        (old, self.detach(old))
    }

    /// Points the entry to `child`, with all that was written into it, if the entry is still `old` and `old` is no table.
    ///
    /// # Errors
    ///
    /// `child` comes back if the entry has changed, or if it is not of the level below.
    pub(crate) fn link(&self, index: usize, old: u64, child: Unlinked) -> Result<(), Unlinked> {
        if F::as_table(old, self.level).is_some() || Some(child.level) != self.level.child() {
            return Err(child);
        }
        let new = F::make_table(child.pfn);
        match self.entries[index]
            .0
            .compare_exchange(old, new, AcqRel, Acquire)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(child),
        }
    }

    #[inline(always)]
    fn detach(&self, old: u64) -> Option<Detached> {
        let pfn = F::as_table(old, self.level)?;
        let level = self.level.child()?;
        Some(Detached { pfn, level })
    }

    /// Asks for the entries, so that they are near when their turn comes. Nothing waits, and nothing is read.
    #[inline(always)]
    pub(crate) fn fetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for entry in self.entries.iter().step_by(LINE) {
            // SAFETY: prefetching reads nothing and cannot fault; every x86-64 has it.
            unsafe {
                core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
                    core::ptr::from_ref(entry).cast(),
                );
            }
        }
    }

    /// The part of a 4 KiB table that covers `range`, of which it covers at least one frame from `first` on.
    pub(crate) fn entries_at_bottom(&self) -> Option<&'g [EntryCell]> {
        (self.level == Level::SIZE_4K).then_some(self.entries)
    }
}

/// Neighbouring entries of one table: what a sweep visits at a time.
pub(crate) struct Run<'g, F> {
    pub(crate) node: Node<'g, F>,
    /// Positions in the table.
    pub(crate) first: usize,
    pub(crate) end: usize,
    /// First frame that entry `first` covers.
    pub(crate) gfn: Gfn,
}

impl<'g, F: Format> Run<'g, F> {
    /// The frames that entry `index` of the table covers.
    pub(crate) fn span_of(&self, index: usize) -> GfnRange {
        let span = F::span(self.node.level);
        GfnRange::new(Gfn(self.gfn.0 + (index - self.first) as u64 * span), span)
    }

    /// The entries, if this is a 4 KiB table: there no value is ever followed, so every store is sound.
    #[inline(always)]
    pub(crate) fn bottom(&self) -> Option<Bottom<'g>> {
        let entries = self.node.entries_at_bottom()?;
        Some(Bottom(&entries[self.first..self.end]))
    }
}

/// Entries of a 4 KiB table.
#[derive(Clone, Copy)]
pub(crate) struct Bottom<'g>(&'g [EntryCell]);

impl Bottom<'_> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    pub(crate) fn load(&self, index: usize) -> u64 {
        self.0[index].0.load(Relaxed)
    }

    /// Brings the entries near before they are looked at one by one: one load a cache line, none of which waits for another,
    /// where a loop that decides about each entry has only a few lines under way.
    #[inline(always)]
    pub(crate) fn warm(&self) {
        let all = self.0.iter().step_by(LINE);
        core::hint::black_box(all.fold(0, |all, entry| all ^ entry.0.load(Relaxed)));
    }

    /// A line of neighbours, each as it is at one moment.
    #[inline(always)]
    pub(crate) fn load_line(&self, index: usize) -> [u64; LINE] {
        let line = &self.0[index..index + LINE];
        core::array::from_fn(|i| line[i].0.load(Relaxed))
    }

    /// Changes each of a line of neighbours that nobody else changes.
    #[inline(always)]
    pub(crate) fn change_line(&self, index: usize, new: impl Fn(u64) -> u64) {
        for entry in index..index + LINE {
            self.store(entry, new(self.load(entry)));
        }
    }

    /// Overwrites a line of neighbours that nobody else changes.
    #[inline(always)]
    pub(crate) fn store_line(&self, index: usize, raw: [u64; LINE]) {
        if cfg!(feature = "loom") {
            // As in `store`.
            for (i, raw) in raw.into_iter().enumerate() {
                self.store(index + i, raw);
            }
            return;
        }
        let line = &self.0[index..index + LINE];
        for (entry, raw) in line.iter().zip(raw) {
            entry.0.store(raw, Release);
        }
    }

    /// Overwrites an entry that nobody else changes (see the module).
    #[inline(always)]
    pub(crate) fn store(&self, index: usize, raw: u64) {
        // loom lets another thread's exchange come after a store that it did not read, which no machine does. An exchange
        // overwrites as blindly as the store.
        if cfg!(feature = "loom") {
            self.0[index].0.swap(raw, Release);
            return;
        }
        self.0[index].0.store(raw, Release);
    }

    #[inline(always)]
    pub(crate) fn swap(&self, index: usize, raw: u64) -> u64 {
        self.0[index].0.swap(raw, AcqRel)
    }

    /// # Errors
    ///
    /// The entry's present value if it is not `old`.
    #[inline(always)]
    pub(crate) fn replace(&self, index: usize, old: u64, new: u64) -> Result<u64, u64> {
        self.0[index].0.compare_exchange(old, new, AcqRel, Acquire)
    }
}

impl Blank {
    /// Writes all entries of a table of `level`; a value that would be a table becomes empty.
    #[inline(always)]
    pub(crate) fn fill<F: Format, H: TableMemory>(
        self,
        tables: &Tables<F, H>,
        level: Level,
        value: impl Fn(usize) -> u64,
    ) -> Unlinked {
        assert!(
            F::index_bits(level) <= F::INDEX_BITS[0],
            "a wide root does not fit into this memory"
        );
        let (pfn, bottom) = (self.pfn, level == Level::SIZE_4K);
        // SAFETY: the ticket exists, so the memory is allocated.
        let first = unsafe { tables.memory().entries(pfn) };
        for index in 0..F::entries(level) {
            let raw = value(index);
            let raw = if !bottom && F::as_table(raw, level).is_some() {
                F::EMPTY
            } else {
                raw
            };
            // SAFETY: the ticket exists, so the memory is ours alone, and as long as every table's that is not a root;
            // nobody reads it before it is linked.
            unsafe { init(first.add(index), raw) };
        }
        Unlinked { pfn, level }
    }
}

/// Makes an entry that nobody else knows hold `raw`.
///
/// # Safety
///
/// `entry` is valid, and used by nobody else.
#[inline(always)]
unsafe fn init(entry: NonNull<EntryCell>, raw: u64) {
    // A plain write, so that a loop of them is as fast as memory.
    #[cfg(not(any(feature = "loom", feature = "shuttle")))]
    // SAFETY: the caller's promise.
    unsafe {
        entry.write(EntryCell::new(raw));
    }
    // Model checkers keep their own record of each atomic, which a plain write would lose.
    #[cfg(any(feature = "loom", feature = "shuttle"))]
    // SAFETY: the caller's promise.
    unsafe {
        entry.as_ref().0.store(raw, Relaxed);
    }
}
