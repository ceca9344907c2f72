//! Resolving a fault.
//!
//! The order (`kvm_tdp_mmu_page_fault`): the fast path if the walk found a mapping; tables into the
//! cache; a root; then, under the shared lock and inside: is the root still valid, is there a slot,
//! is its memory being taken back, at which level; then the walk down, which links missing tables,
//! splits a huge leaf above the goal, and at the goal installs the leaf.
//!
//! Each change is one compare-exchange. Who loses it looks at what the winner put there and judges
//! again; who finds an entry *frozen* gives up and lets the guest try again, because the owner of
//! the entry may wait for a flush.
//!
//! Faults in mirrors are in `mirror_fault`.
//!
//! *Locking*: the shared MMU lock, from the check for invalidations until the dirty bit is set.
//! Nothing here yields.

use alloc::vec::Vec;

use super::{
    descent::{Changed, Descent},
    level::Goal,
    mmu::TdpMmu,
    root::RootPage,
    split::Split,
    vcpu::Vcpu,
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    fault::{Access, Around, Fault, FaultOutcome},
    flush::{Flush, FlushCause},
    format::{AdPolicy, DirtyLogPolicy, Entry, Format, Leaf},
    rcu::cell::{Cell, Counter},
    slot::Memslot,
    stats::count_fault,
    table::{
        guard::Guard, header::PageRole, hint::Hint, memory::TableMemory, node::Node, ticket::Blank,
    },
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Inlined where faults come in, where much of `fault` is known; the whole path is a call away.
    #[inline(always)]
    pub(super) fn do_fault(&self, vcpu: &mut Vcpu, fault: Fault) -> FaultOutcome {
        if !fault.present
            && self.owns(vcpu)
            && let Some(outcome) = self.nearby_fault(vcpu, &fault)
        {
            return outcome;
        }
        self.whole_fault(vcpu, fault)
    }

    #[inline(never)]
    fn whole_fault(&self, vcpu: &mut Vcpu, fault: Fault) -> FaultOutcome {
        if !self.owns(vcpu) {
            // Another MMU's vCPU: its caches are that one's. A reader slot for one fault is slow
            // but right.
            let mut own = self.do_vcpu();
            own.as_id = vcpu.as_id;
            let outcome = self.whole_fault(&mut own, fault);
            vcpu.linked |= own.linked;
            return outcome;
        }
        if fault.mirror {
            return self.do_fault_range(vcpu, &fault, &Around::none()).outcome;
        }
        let outcome = self.resolve(vcpu, &fault);
        count_fault(&vcpu.reader, &outcome, fault.prefetch);
        outcome
    }

    #[inline(always)]
    fn resolve(&self, vcpu: &mut Vcpu, fault: &Fault) -> FaultOutcome {
        if fault.gfn >= F::MAX_GFN {
            return FaultOutcome::OutOfRange;
        }
        if fault.present
            && let Some(outcome) = self.fast_fault(vcpu, fault)
        {
            return outcome;
        }
        if !self.top_up(&mut vcpu.cache) {
            return FaultOutcome::OutOfMemory;
        }
        if !self.load_root(vcpu, false) {
            return if self.can_have_root(vcpu.as_id, false) {
                FaultOutcome::OutOfMemory
            } else {
                FaultOutcome::NoRoot
            };
        }
        let Vcpu {
            reader,
            as_id,
            cache,
            root: Some(root),
            slot,
            hint,
            linked,
            ..
        } = vcpu
        else {
            return FaultOutcome::Retry;
        };
        let inside = self.lock.shared(reader);
        if root.is_invalid() {
            return FaultOutcome::Retry;
        }
        let guard = Guard::new(&self.tables, inside);
        // Before the look for a slot: a hole that is found now may have got one by the time it is
        // remembered, and then it must be remembered as old.
        let generation = if self.config.mmio_caching {
            self.mmio_generation(*as_id)
        } else {
            0
        };
        let Some(kept) = self.slot_of(guard.inside(), *as_id, fault.gfn, slot) else {
            return self.no_slot(&guard, root, generation, fault, cache, reader);
        };
        let slot = &*kept.slot;
        if slot.invalid || self.invalidations.must_retry(fault.gfn, fault.seq) {
            return FaultOutcome::Retry;
        }
        if fault.access == Access::Write && slot.is_readonly() {
            return FaultOutcome::ReadOnly;
        }
        let goal = self.goal(slot, fault);
        let generation = kept.generation;
        let descent = Descent {
            fault,
            slot,
            root,
            cell: reader,
            generation,
        };
        self.map(&guard, &descent, goal, cache, hint, linked)
    }

    fn map(
        &self,
        guard: &Guard<'_, F, H>,
        descent: &Descent<'_>,
        mut goal: Goal,
        cache: &mut Vec<Blank>,
        hint: &mut Hint,
        linked: &mut bool,
    ) -> FaultOutcome {
        let fault = descent.fault;
        let mut found = Hint::begin(guard);
        let small = self
            .is_always_small(descent.slot, fault.gfn)
            .then_some(descent.generation);
        if goal.level == Level::SIZE_4K {
            // The usual case, once tables are there.
            let (node, raw) = guard.descend(&descent.root.table, fault.gfn);
            if node.level() == Level::SIZE_4K {
                found.found(node, fault.gfn, small);
                *hint = found;
                let index = F::index(fault.gfn, Level::SIZE_4K);
                if raw == F::EMPTY
                    && let Ok(outcome) = self.install(guard, node, index, raw, descent)
                {
                    return outcome;
                }
            }
        }
        let mut node = guard.root(&descent.root.table);
        loop {
            let level = node.level();
            let index = F::index(fault.gfn, level);
            let raw = node.load(index);
            if level == goal.level {
                self.lower_goal_for_nx(&mut goal, raw);
            }
            if level > goal.level
                && F::as_table(raw, level).is_some()
                && let Some(child) = guard.child(node, index)
            {
                node = child;
                continue;
            }
            if level == Level::SIZE_4K {
                found.found(node, fault.gfn, small);
                *hint = found;
            }
            match F::decode(raw, level) {
                Entry::Frozen => return FaultOutcome::Retry,
                Entry::Malformed => return FaultOutcome::BadEntry { level },
                Entry::Leaf(leaf) if allows(&leaf, fault) => {
                    if let Ok(outcome) = use_leaf(node, index, raw, &leaf, descent) {
                        return outcome;
                    }
                }
                _ if level == goal.level => {
                    if let Ok(outcome) = self.install(guard, node, index, raw, descent) {
                        return outcome;
                    }
                }
                Entry::Table { .. } => {}
                Entry::Leaf(_) => {
                    let Some(blank) = cache.pop() else {
                        return FaultOutcome::Retry;
                    };
                    // The table that replaces an executable-less huge page holds what the
                    // mitigation forbids to be huge.
                    let nx = goal.nx_disallowed();
                    match self.split(node, index, raw, blank, descent.cell, nx) {
                        Split::Done => *linked |= F::INSTALL_NEEDS_FENCE,
                        Split::Lost(blank) => cache.push(blank),
                    }
                }
                Entry::NonPresent | Entry::Mmio { .. } => {
                    let Some(blank) = cache.pop() else {
                        return FaultOutcome::Retry;
                    };
                    let nx = goal.nx_disallowed() && level <= goal.allowed;
                    match self.link_table(node, index, raw, blank, descent, nx) {
                        Ok(()) => *linked |= F::INSTALL_NEEDS_FENCE,
                        Err(blank) => cache.push(blank),
                    }
                }
            }
        }
    }

    /// The leaf that `fault` asks for, from guest frame `start` on.
    #[inline(always)]
    pub(super) fn new_leaf(&self, slot: &Memslot, start: Gfn, level: Level, fault: &Fault) -> Leaf {
        let host_writable = !slot.is_readonly();
        let write = fault.access == Access::Write;
        let by_software = F::AD_POLICY != AdPolicy::Hardware;
        // While writes are logged by protection, only a write makes a page writable; otherwise a
        // read does too and spares a fault. Logged by Dirty bits, a read may, as long as it leaves
        // D clear for hardware to set and log. A mirror is never protected, so it is writable from
        // the start, and counts as written when it is made.
        let logging = slot.dirty.is_some() && !fault.mirror;
        let by_dirty_bit = matches!(F::DIRTY_LOG, DirtyLogPolicy::DirtyBit);
        let writable = host_writable && (write || !logging || by_dirty_bit);
        Leaf {
            pfn: slot.pfn(start),
            readable: true,
            writable,
            executable: level == Level::SIZE_4K || !self.avoids_executable_huge_pages(),
            mmu_writable: host_writable,
            host_writable,
            accessed: by_software || !fault.prefetch,
            dirty: if logging && !write && by_dirty_bit {
                false
            } else {
                by_software || writable
            },
            memory: slot.spec.memory,
        }
    }

    /// Installs the leaf for the fault in place of `raw`, at the goal level.
    #[inline(always)]
    fn install(
        &self,
        guard: &Guard<'_, F, H>,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        descent: &Descent<'_>,
    ) -> Result<FaultOutcome, Changed> {
        let Descent {
            fault, slot, cell, ..
        } = *descent;
        let level = node.level();
        let start = F::align_down(fault.gfn, level);
        let leaf = self.new_leaf(slot, start, level, fault);
        let new = F::make_leaf(&leaf, level);
        if raw != F::EMPTY {
            return self.install_over(guard, node, index, raw, &leaf, descent);
        }
        node.replace(index, raw, new).map_err(|_| Changed)?;
        cell.add_pages(level.index(), 1);
        if leaf.writable && leaf.dirty {
            slot.mark_dirty(fault.gfn);
        }
        Ok(FaultOutcome::Fixed { level })
    }

    #[cold]
    #[inline(never)]
    fn install_over(
        &self,
        guard: &Guard<'_, F, H>,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        leaf: &Leaf,
        descent: &Descent<'_>,
    ) -> Result<FaultOutcome, Changed> {
        let Descent {
            fault, slot, cell, ..
        } = *descent;
        let level = node.level();
        let new = F::make_leaf(leaf, level);
        let removed = match F::decode(raw, level) {
            Entry::Leaf(old) if old.pfn != leaf.pfn => {
                // Slots are unmapped before their memory changes, so this is not our entry.
                return Ok(FaultOutcome::BadEntry { level });
            }
            Entry::Leaf(_) => {
                node.replace(index, raw, new).map_err(|_| Changed)?;
                None
            }
            Entry::Table { .. } => {
                let span = GfnRange::new(F::align_down(fault.gfn, level), F::span(level));
                let table = self.exchange(node, index, raw, new, span, descent.root.as_id)?;
                cell.add_pages(level.index(), 1);
                table.map(|table| (table, span))
            }
            _ => {
                node.replace(index, raw, new).map_err(|_| Changed)?;
                cell.add_pages(level.index(), 1);
                None
            }
        };
        if leaf.writable && leaf.dirty {
            slot.mark_dirty(fault.gfn);
        }
        if let Some((table, span)) = removed {
            self.remove_table(guard, table, cell);
            // Before we leave the read section: until then the table's memory is not used again.
            self.flush(Flush::range(span), FlushCause::HugePage, descent.root.as_id);
        }
        Ok(FaultOutcome::Fixed { level })
    }

    /// Links an empty table into the entry at hand. `Err` has the memory: someone else changed the
    /// entry.
    fn link_table(
        &self,
        node: Node<'_, F>,
        index: usize,
        raw: u64,
        blank: Blank,
        descent: &Descent<'_>,
        nx: bool,
    ) -> Result<(), Blank> {
        let Some(child) = node.level().child() else {
            return Err(blank);
        };
        let gfn = F::align_down(descent.fault.gfn, node.level());
        let table = blank.fill(&self.tables, child, |_| F::EMPTY);
        let role = PageRole::new(descent.root.as_id, child, false);
        let pfn = table.pfn();
        let header = self.tables.header(pfn);
        header.describe(role, gfn, Some((node.pfn(), index)));
        if nx {
            // Before the table is linked: whoever unlinks it must see the mark.
            self.note_nx_table(pfn);
        }
        node.link(index, raw, table).map_err(|table| {
            self.forget_nx_table(pfn);
            self.tables.blank_again(table)
        })?;
        if nx {
            descent.cell.count(Counter::NxSplits, 1);
        }
        Ok(())
    }
}

/// Whether a leaf allows the access as far as its permissions go.
#[inline(always)]
fn allows(leaf: &Leaf, fault: &Fault) -> bool {
    fault.prefetch
        || match fault.access {
            Access::Read => leaf.readable,
            Access::Write => leaf.writable,
            Access::Execute => leaf.executable,
        }
}

/// The access is allowed as far as permissions go. Where hardware faults for want of A or D, they
/// are set.
fn use_leaf<F: Format>(
    node: Node<'_, F>,
    index: usize,
    raw: u64,
    leaf: &Leaf,
    descent: &Descent<'_>,
) -> Result<FaultOutcome, Changed> {
    let (fault, level) = (descent.fault, node.level());
    let lacks_dirty = fault.access == Access::Write && !leaf.dirty;
    if fault.prefetch || F::AD_POLICY == AdPolicy::Hardware || (leaf.accessed && !lacks_dirty) {
        return Ok(FaultOutcome::Spurious { level });
    }
    let mut new = F::with_accessed(raw, true);
    if lacks_dirty {
        new = F::with_dirty(new, true);
    }
    node.replace(index, raw, new).map_err(|_| Changed)?;
    if lacks_dirty {
        descent.slot.mark_dirty(fault.gfn);
    }
    Ok(FaultOutcome::Fixed { level })
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// No slot covers the frame. Where entries can remember that, one does.
    #[cold]
    fn no_slot(
        &self,
        guard: &Guard<'_, F, H>,
        root: &RootPage,
        generation: u32,
        fault: &Fault,
        cache: &mut Vec<Blank>,
        cell: &Cell,
    ) -> FaultOutcome {
        if !self.config.mmio_caching || fault.prefetch {
            return FaultOutcome::NoSlot;
        }
        let Some(new) = F::make_mmio(fault.gfn, generation) else {
            return FaultOutcome::NoSlot;
        };
        let mut node = guard.root(&root.table);
        loop {
            let (level, index) = (node.level(), F::index(fault.gfn, node.level()));
            let raw = node.load(index);
            match F::decode(raw, level) {
                Entry::Table { .. } => match guard.child(node, index) {
                    Some(child) => node = child,
                    None => continue,
                },
                Entry::NonPresent | Entry::Mmio { .. } if level == Level::SIZE_4K => {
                    if node.replace(index, raw, new).is_ok() {
                        cell.count(Counter::Mmio, 1);
                        return FaultOutcome::NoSlot;
                    }
                }
                Entry::NonPresent => {
                    let (Some(child), Some(blank)) = (level.child(), cache.pop()) else {
                        return FaultOutcome::NoSlot;
                    };
                    let table = blank.fill(&self.tables, child, |_| F::EMPTY);
                    let role = PageRole::new(root.as_id, child, false);
                    let gfn = F::align_down(fault.gfn, level);
                    let header = self.tables.header(table.pfn());
                    header.describe(role, gfn, Some((node.pfn(), index)));
                    if let Err(table) = node.link(index, raw, table) {
                        cache.push(self.tables.blank_again(table));
                    }
                }
                // A leaf of a slot that is going, or an entry that another thread owns: nothing to
                // remember.
                _ => return FaultOutcome::NoSlot,
            }
        }
    }

    /// The generation of slots, in as many bits as entries keep.
    pub(super) fn mmio_generation(&self, as_id: u8) -> u32 {
        let bits = F::MMIO_GENERATION_BITS;
        let mask = if bits == 0 {
            0
        } else {
            u64::MAX >> (64 - bits)
        };
        (self.spaces[usize::from(as_id)].generation() & mask) as u32
    }
}
