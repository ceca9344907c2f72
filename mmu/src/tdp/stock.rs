//! Table memory at hand: the caches of vCPUs, and what is fetched for work ahead of faults.
//!
//! A fault fetches tables into its vCPU's cache before it takes the MMU lock. Work ahead of faults,
//! which splits huge mappings when logging begins or dirty bits are taken, fetches batches. It
//! could take all memory there is, and faults of slots that have nothing to do with it would find
//! none.
//!
//! So it works with what faults can spare. Before each batch it fills the *reserve*
//! ([`MmuConfig::fault_reserve`](super::MmuConfig::fault_reserve) tables), from which a fault takes
//! what it cannot get elsewhere; if the reserve cannot be filled there is no batch. What is left of
//! the reserve goes back to the memory when the work is over, so it is there for faults then, and
//! costs nothing while no such work runs.
//!
//! *Locking*: the reserve has a lock of its own (`locks`). Work ahead of faults holds the slots
//! lock, so one at a time fills the reserve.

use alloc::{sync::Arc, vec::Vec};
use core::cell::{Cell, RefCell};

use super::{mmu::TdpMmu, vcpu::Vcpu, work::Work};
use crate::{
    addr::MAX_LEVELS,
    format::Format,
    table::{hint::Hint, memory::TableMemory, ticket::Blank},
};

/// Tables that a vCPU fetches at a time. A model needs no more than one fault does.
const CACHE: usize = if cfg!(any(feature = "loom", feature = "shuttle", miri)) {
    MAX_LEVELS - 1
} else {
    8
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_vcpu(&self) -> Vcpu {
        Vcpu {
            reader: self.participants.reader_slot(),
            as_id: 0,
            cache: Vec::new(),
            root: None,
            mirror: None,
            slot: None,
            hint: Hint::default(),
            linked: false,
            work: Work::default(),
            free_list: Arc::clone(&self.free_list),
        }
    }

    /// Whether `vcpu` was made by this MMU.
    #[inline(always)]
    pub(super) fn owns(&self, vcpu: &Vcpu) -> bool {
        Arc::ptr_eq(&self.free_list, &vcpu.free_list)
    }

    /// Makes sure that a fault finds a table for each level; false without memory. Never with a
    /// lock held.
    #[inline(always)]
    pub(super) fn top_up(&self, cache: &mut Vec<Blank>) -> bool {
        cache.len() >= MAX_LEVELS - 1 || self.refill(cache)
    }

    /// Fills a vCPU's cache; true if a fault has enough.
    #[cold]
    fn refill(&self, cache: &mut Vec<Blank>) -> bool {
        let enough = F::INDEX_BITS.len() - 1;
        self.take_blanks(cache, CACHE);
        if cache.len() < enough {
            // What other vCPUs left, and what waited for readers, may do.
            self.tidy();
            self.take_blanks(cache, enough);
        }
        if cache.len() < enough {
            let mut reserve = self.reserve.lock();
            while cache.len() < enough
                && let Some(blank) = reserve.pop()
            {
                cache.push(blank);
            }
        }
        cache.len() >= enough
    }

    fn take_blanks(&self, cache: &mut Vec<Blank>, count: usize) {
        let before = cache.len();
        while cache.len() < count
            && let Some(blank) = self.tables.blank()
        {
            cache.push(blank);
        }
        // They are taken from the end. Tables of neighbouring frames then lie as their frames do,
        // which makes sweeps faster.
        cache[before..].reverse();
    }

    /// Fills the reserve; whether it is full.
    fn fill_reserve(&self) -> bool {
        let wanted = self.config.fault_reserve as usize;
        if wanted == 0 {
            return true;
        }
        let missing = wanted.saturating_sub(self.reserve.lock().len());
        let mut fetched = Vec::new();
        self.take_blanks(&mut fetched, missing);
        if fetched.len() < missing {
            self.tidy();
            self.take_blanks(&mut fetched, missing);
        }
        let full = fetched.len() == missing;
        self.reserve.lock().extend(fetched);
        full
    }
}

/// Tables for work ahead of faults. What is left when this is dropped goes back to the memory, and
/// the reserve with it. Whoever has one holds the slots lock, and drops it without the MMU lock.
pub(super) struct Ahead<'m, F: Format, H: TableMemory> {
    mmu: &'m TdpMmu<F, H>,
    /// A cell, because the visitor of a sweep takes from it and the refill between two bursts puts
    /// into it.
    tables: RefCell<Vec<Blank>>,
    /// Something was fetched, for this or for the reserve.
    used: Cell<bool>,
}

impl<'m, F: Format, H: TableMemory> Ahead<'m, F, H> {
    pub(super) fn new(mmu: &'m TdpMmu<F, H>) -> Self {
        Self {
            mmu,
            tables: RefCell::new(Vec::new()),
            used: Cell::new(false),
        }
    }

    /// Fetches up to `count` tables, unless faults need them. Never with the MMU lock held. Whether
    /// there is any.
    pub(super) fn refill(&self, count: usize) -> bool {
        self.used.set(true);
        let mut tables = self.tables.borrow_mut();
        if self.mmu.fill_reserve() {
            self.mmu.take_blanks(&mut tables, count);
            if tables.is_empty() {
                self.mmu.tidy();
                self.mmu.take_blanks(&mut tables, count);
            }
        }
        !tables.is_empty()
    }

    pub(super) fn take(&self) -> Option<Blank> {
        self.tables.borrow_mut().pop()
    }

    pub(super) fn put_back(&self, blank: Blank) {
        self.tables.borrow_mut().push(blank);
    }
}

impl<F: Format, H: TableMemory> Drop for Ahead<'_, F, H> {
    fn drop(&mut self) {
        if !self.used.get() {
            return;
        }
        let reserve = core::mem::take(&mut *self.mmu.reserve.lock());
        for blank in self.tables.take().into_iter().chain(reserve) {
            self.mmu.tables.free_blank(blank);
        }
    }
}
