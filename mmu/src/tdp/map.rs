//! Mapping on fault.
//!
//! The level is chosen first (*goal*): the coarsest that slot, alignment, configuration and fault allow, 4 KiB while the
//! slot logs writes. Then the path is walked: missing tables are linked, a huge leaf above the goal is split, and at the
//! goal the leaf is installed by compare-exchange. A leaf that already allows the access ends the walk at any level.
//!
//! *Locking*: the MMU lock, held from the check for invalidations until the dirty bit is set.

use alloc::sync::Arc;

use super::{State, TdpMmu, iter::TdpIter, split::SplitError};
use crate::{
    addr::{Gfn, GfnRange, Level},
    fault::{Access, Fault, FaultOutcome},
    flush::Flush,
    format::{AdPolicy, Entry, Format, Leaf, MemoryType},
    slot::Slot,
    table::{memory::TableMemory, node::Guard},
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_fault(&self, fault: Fault) -> FaultOutcome {
        let outcome = self.locked(|state, guard| self.resolve(state, guard, &fault));
        self.stats.fault(&outcome, fault.prefetch);
        if let FaultOutcome::Fixed { flush, .. } = outcome {
            let _counted = self.stats.flush(flush);
        }
        outcome
    }

    fn resolve(&self, state: &mut State, guard: &Guard<'_, F, H>, fault: &Fault) -> FaultOutcome {
        if fault.gfn >= F::MAX_GFN {
            return FaultOutcome::OutOfRange;
        }
        let Some(slot) = state.slots.find(fault.gfn).map(Arc::clone) else {
            return FaultOutcome::NoSlot;
        };
        if fault.access == Access::Write && slot.is_readonly() {
            return FaultOutcome::ReadOnly;
        }
        if state
            .progress
            .must_retry(fault.gfn, fault.seq, &self.sequence)
        {
            return FaultOutcome::Retry;
        }
        if !self.ensure_root(state) {
            return FaultOutcome::OutOfMemory;
        }
        self.map(state, guard, &slot, fault)
    }

    fn goal_level(&self, slot: &Slot, fault: &Fault) -> Level {
        let mut level = F::MAX_LEAF_LEVEL
            .min(self.config.max_level)
            .min(slot.spec.max_level)
            .min(fault.max_level);
        if slot.dirty.is_some() {
            // A page is the unit of the log: a huge mapping would hide all writes but the first.
            level = Level::SIZE_4K;
        }
        while let Some(finer) = level.child() {
            if slot.allows_span(fault.gfn, F::span(level)) {
                break;
            }
            level = finer;
        }
        level
    }

    fn map(
        &self,
        state: &mut State,
        guard: &Guard<'_, F, H>,
        slot: &Slot,
        fault: &Fault,
    ) -> FaultOutcome {
        let goal = self.goal_level(slot, fault);
        let Some(mut iter) = self.iter(guard, GfnRange::new(fault.gfn, 1), goal) else {
            return FaultOutcome::Retry;
        };
        while iter.advance() {
            loop {
                let level = iter.level();
                match F::decode(iter.old(), level) {
                    Entry::Frozen => return FaultOutcome::Retry,
                    Entry::Malformed => return FaultOutcome::BadEntry { level },
                    Entry::Leaf(leaf) if allows(&leaf, fault) => {
                        match self.use_leaf(&mut iter, &leaf, fault) {
                            Some(outcome) => return outcome,
                            None => continue,
                        }
                    }
                    _ if level == goal => {
                        match self.install(state, guard, &mut iter, slot, fault) {
                            Some(outcome) => return outcome,
                            None => continue,
                        }
                    }
                    Entry::Table { .. } => break,
                    Entry::Leaf(_) => match self.split(state, &mut iter) {
                        Ok(()) => break,
                        Err(SplitError::Stale) => continue,
                        Err(SplitError::NoMemory) => return FaultOutcome::OutOfMemory,
                    },
                    Entry::NonPresent | Entry::Mmio { .. } => {
                        match self.link_table(state, &mut iter) {
                            Some(()) => break,
                            None => return FaultOutcome::OutOfMemory,
                        }
                    }
                }
            }
        }
        FaultOutcome::Retry
    }

    /// The access is allowed as far as permissions go. Where hardware faults for want of A or D, they are set.
    fn use_leaf(
        &self,
        iter: &mut TdpIter<'_, F, H>,
        leaf: &Leaf,
        fault: &Fault,
    ) -> Option<FaultOutcome> {
        let level = iter.level();
        let lacks_dirty = fault.access == Access::Write && !leaf.dirty;
        if fault.prefetch || F::AD_POLICY == AdPolicy::Hardware || (leaf.accessed && !lacks_dirty) {
            return Some(FaultOutcome::Spurious { level });
        }
        let mut new = F::with_accessed(iter.old(), true);
        if lacks_dirty {
            new = F::with_dirty(new, true);
        }
        iter.replace(new).ok()?;
        Some(FaultOutcome::Fixed {
            level,
            flush: Flush::None,
        })
    }

    /// Installs the leaf for `fault` at the goal level; `None` if the entry changed under us.
    fn install(
        &self,
        state: &mut State,
        guard: &Guard<'_, F, H>,
        iter: &mut TdpIter<'_, F, H>,
        slot: &Slot,
        fault: &Fault,
    ) -> Option<FaultOutcome> {
        let (level, start) = (iter.level(), iter.gfn());
        let old = F::decode(iter.old(), level);
        let leaf = new_leaf::<F>(slot, start, fault);
        if matches!(old, Entry::Leaf(old) if old.pfn != leaf.pfn) {
            // Slots are unmapped before their memory changes, so this is not our entry.
            return Some(FaultOutcome::BadEntry { level });
        }
        let removed = iter.replace(F::make_leaf(&leaf, level)).ok()?;
        if !matches!(old, Entry::Leaf(_)) {
            self.stats.add_leaves(level, 1);
        }
        if leaf.writable
            && let Some(dirty) = &slot.dirty
        {
            dirty.set(fault.gfn.0 - slot.spec.base_gfn.0);
        }
        let mut flush = Flush::None;
        if let Some(table) = removed {
            self.remove_table(state, guard, table);
            flush = Flush::range(iter.span());
        }
        Some(FaultOutcome::Fixed { level, flush })
    }

    /// Links an empty table into the entry at hand, unless someone else filled it; `None` without memory.
    fn link_table(&self, state: &mut State, iter: &mut TdpIter<'_, F, H>) -> Option<()> {
        let child = iter.level().child()?;
        let table = self.tables.allocate(child)?;
        let pfn = table.pfn();
        let parent = (iter.node().pfn(), iter.index());
        match iter.node().link(iter.index(), iter.old(), table) {
            Ok(()) => {
                state
                    .headers
                    .insert(pfn, F::node_size(child), child, iter.gfn(), Some(parent))
            }
            Err(table) => self.tables.free_unlinked(table),
        }
        iter.reread();
        Some(())
    }
}

fn allows(leaf: &Leaf, fault: &Fault) -> bool {
    fault.prefetch
        || match fault.access {
            Access::Read => true,
            Access::Write => leaf.writable,
            Access::Execute => leaf.executable,
        }
}

/// The leaf that `fault` asks for, from guest frame `start` on.
fn new_leaf<F: Format>(slot: &Slot, start: Gfn, fault: &Fault) -> Leaf {
    let host_writable = !slot.is_readonly();
    // While writes are logged, only a write makes a page writable; otherwise a read does too and spares a fault.
    let writable = host_writable && (fault.access == Access::Write || slot.dirty.is_none());
    let by_software = F::AD_POLICY == AdPolicy::SetAtInstall;
    Leaf {
        pfn: slot.pfn(start),
        readable: true,
        writable,
        executable: true,
        mmu_writable: host_writable,
        host_writable,
        accessed: by_software || !fault.prefetch,
        dirty: by_software || writable,
        memory: MemoryType::Normal,
    }
}
