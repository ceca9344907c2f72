//! The TDP MMU: one guest's second-stage page table.
//!
//! # Locking
//!
//! One spin lock (*the MMU lock*) serialises everything that changes slots or tables. It is never held across a call
//! out of the crate, except into [`TableMemory`]. Walks take no lock: they hold a [`Guard`], and what they see may
//! be one change old, which is what a TLB would do.
//!
//! # Observers
//!
//! - A vCPU that walks sees each entry before or after a change, and never a table that was given back.
//! - Once an operation has returned, no *walk* that begins later uses what it removed; once the operation's
//!   [`Flush`] has been carried out, no *TLB* does.
//! - A page's dirty bit is set after its writable entry is installed and before the MMU lock is released, and a
//!   harvest takes bits, then protects, under the lock: no write goes unseen.
//!
//! # Invariants
//!
//! - A leaf maps what the slot over it says; a frame without a slot has no leaf.
//! - While a slot logs writes, each page under a writable leaf has its dirty bit set.
//! - `MmuStats::pages` counts the leaves reachable from roots, valid or not.

mod age;
mod dirty;
mod header;
mod iter;
mod map;
mod root;
mod split;
mod stage;
mod walk;
mod zap;

#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::fmt;

use spin::mutex::SpinMutex;

pub use self::{
    dirty::DirtyLogError,
    header::{PageHeader, PageRole},
    root::Root,
    stage::SecondStage,
    walk::{Translation, Walk, WalkFault, WalkStep},
};
use self::{header::Headers, iter::TdpIter, root::Generation};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::Flush,
    format::{DirtyLogPolicy, Format},
    invalidate::{InProgress, Sequence},
    slot::{DEFAULT_MAX_SLOTS, Limits, SlotError, SlotFlags, SlotId, SlotSet, SlotSpec},
    stats::{MmuStats, Stats},
    table::{
        memory::TableMemory,
        node::{Detached, Guard, Tables},
    },
};

/// What a slot's dirty bitmap looks like when logging begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLogStart {
    /// All clear; everything mapped is write-protected at once.
    #[default]
    Protected,
    /// All set; pages are write-protected as they are cleared (`KVM_DIRTY_LOG_INITIALLY_SET`).
    InitiallySet,
}

/// Choices that last as long as an MMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MmuConfig {
    /// The coarsest mapping ever made, on top of what format and slot allow. 1 GiB unless changed, as in KVM.
    pub max_level: Level,
    /// Slots that may exist; numbers are below it.
    pub max_slots: u16,
    /// How dirty logging begins.
    pub dirty_log_start: DirtyLogStart,
}

impl Default for MmuConfig {
    fn default() -> Self {
        Self {
            max_level: Level::SIZE_1G,
            max_slots: DEFAULT_MAX_SLOTS,
            dirty_log_start: DirtyLogStart::default(),
        }
    }
}

impl MmuConfig {
    /// The same with another limit on the mapping level.
    #[must_use]
    pub const fn with_max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }

    /// The same with another limit on slots.
    #[must_use]
    pub const fn with_max_slots(mut self, slots: u16) -> Self {
        self.max_slots = slots;
        self
    }

    /// The same with another start of dirty logging.
    #[must_use]
    pub const fn with_dirty_log_start(mut self, start: DirtyLogStart) -> Self {
        self.dirty_log_start = start;
        self
    }
}

/// A second-stage page table of format `F` with its tables in `H`.
///
/// Its operations are the methods of [`SecondStage`].
pub struct TdpMmu<F: Format, H: TableMemory> {
    config: MmuConfig,
    tables: Tables<F, H>,
    state: SpinMutex<State>,
    sequence: Sequence,
    generation: Generation,
    stats: Stats,
}

/// What the MMU lock protects, besides the writing of entries.
#[derive(Debug)]
struct State {
    slots: SlotSet,
    progress: InProgress,
    headers: Headers,
    /// Roots that no vCPU may load any more but that still map memory.
    invalid_roots: Vec<Detached>,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// An MMU without slots and without a root.
    pub fn new(memory: H, config: MmuConfig) -> Self {
        const {
            assert!(
                !F::BREAK_BEFORE_MAKE,
                "splitting and promoting in place need a format that allows it"
            );
            assert!(
                matches!(F::DIRTY_LOG, DirtyLogPolicy::WriteProtect),
                "nobody drains a hardware log yet"
            );
        }
        let limits = Limits {
            slots: config.max_slots,
            gfn: F::MAX_GFN,
            pfn: F::MAX_PFN,
        };
        let initially_set = config.dirty_log_start == DirtyLogStart::InitiallySet;
        Self {
            config,
            tables: Tables::new(memory),
            state: SpinMutex::new(State {
                slots: SlotSet::new(limits, initially_set),
                progress: InProgress::default(),
                headers: Headers::default(),
                invalid_roots: Vec::new(),
            }),
            sequence: Sequence::default(),
            generation: Generation::default(),
            stats: Stats::default(),
        }
    }

    /// Where the tables live.
    pub fn memory(&self) -> &H {
        self.tables.memory()
    }

    /// Runs `op` under the MMU lock and a guard, then gives back the tables that nobody sees any more.
    fn locked<R>(&self, op: impl FnOnce(&mut State, &Guard<'_, F, H>) -> R) -> R {
        let mut state = self.state.lock();
        let guard = self.tables.guard();
        let result = op(&mut state, &guard);
        // Our own guard would keep alive what was just retired.
        drop(guard);
        self.tables.reclaim();
        result
    }

    fn snapshot(&self) -> MmuStats {
        self.stats
            .snapshot(self.tables.live(), self.tables.retired())
    }

    fn do_delete_slot(&self, id: SlotId) -> Result<Flush, SlotError> {
        self.locked(|state, guard| {
            let slot = state.slots.remove(id)?;
            Ok(self.forget(state, guard, slot.spec.range()))
        })
    }

    fn do_move_slot(&self, id: SlotId, base_gfn: Gfn) -> Result<Flush, SlotError> {
        self.locked(|state, guard| {
            let old = state.slots.relocate(id, base_gfn)?;
            if old.spec.base_gfn == base_gfn {
                return Ok(Flush::None);
            }
            Ok(self.forget(state, guard, old.spec.range()))
        })
    }

    /// Unmaps what a slot covered. The flush does not depend on what was mapped: another thread may have unmapped it
    /// and not flushed yet, and the slot's memory is free once *this* operation is complete.
    fn forget(&self, state: &mut State, guard: &Guard<'_, F, H>, range: GfnRange) -> Flush {
        self.sequence.bump();
        let zapped = self.zap_leaves(state, guard, range);
        Flush::range(range.hull(zapped))
    }

    fn do_set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<Flush, SlotError> {
        self.locked(|state, guard| {
            let (old, new) = state.slots.set_flags(id, flags)?;
            let enabled = new.dirty.is_some() && old.dirty.is_none();
            if !enabled || self.config.dirty_log_start == DirtyLogStart::InitiallySet {
                return Ok(Flush::None);
            }
            self.write_protect(guard, new.spec.range());
            // Unconditional: an entry may have lost its W bit before, and its old copy be in a TLB still.
            Ok(Flush::range(new.spec.range()))
        })
    }

    fn do_slots(&self) -> Vec<SlotSpec> {
        self.state
            .lock()
            .slots
            .iter()
            .map(|slot| slot.spec)
            .collect()
    }

    /// Entries of the current root over `range`, if there is a root.
    fn iter<'g>(
        &self,
        guard: &'g Guard<'g, F, H>,
        range: GfnRange,
        min_level: Level,
    ) -> Option<TdpIter<'g, F, H>> {
        Some(TdpIter::new(guard, guard.root()?, range, min_level))
    }
}

impl<F: Format, H: TableMemory> Drop for TdpMmu<F, H> {
    fn drop(&mut self) {
        // A dead guest's TLBs are the owner's business; the tables go back with `Tables`.
        let _ = self.do_zap_all();
    }
}

impl<F: Format, H: TableMemory> fmt::Debug for TdpMmu<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdpMmu")
            .field("format", &F::NAME)
            .field("config", &self.config)
            .field("tables", &self.tables)
            .field("stats", &self.snapshot())
            .finish_non_exhaustive()
    }
}
