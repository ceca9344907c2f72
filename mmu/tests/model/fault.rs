//! What a fault, a walk and a prefault do to the model.

use slat_mmu::{
    Access, AdPolicy, Fault, FaultOutcome, Gfn, GfnRange, Level, PrefaultError, WalkFault,
};

use crate::state::{Leaf, Slot, World, level_of, span};

impl World {
    /// The walk of a vCPU in `as_id`: hardware's Accessed and Dirty included.
    pub(crate) fn expect_access(
        &mut self,
        as_id: u8,
        gfn: u64,
        access: Access,
    ) -> Result<u64, WalkFault> {
        let (hardware, by_dirty_bit) = (self.hardware_ad(), self.by_dirty_bit());
        let space = self
            .spaces
            .get_mut(usize::from(as_id))
            .ok_or(WalkFault::NotPresent)?;
        let Some(leaf) = space.tree.at(gfn).map(|(_, leaf)| leaf) else {
            let hole = space.tree.holes.get(&gfn) == Some(&space.changes);
            return Err(if hole {
                WalkFault::Mmio
            } else {
                WalkFault::NotPresent
            });
        };
        if !self.is_hit(&leaf, access) {
            return Err(WalkFault::Permission);
        }
        let write = access == Access::Write;
        let space = &mut self.spaces[usize::from(as_id)];
        if !leaf.a || write && !leaf.d {
            if !hardware {
                return Err(WalkFault::AccessedDirty);
            }
            let entry = space.tree.at_mut(gfn).unwrap();
            entry.a = true;
            entry.d |= write;
            if write && !leaf.d && by_dirty_bit {
                space.mark(gfn);
            }
        }
        let (start, leaf) = space.tree.at(gfn).unwrap();
        Ok(leaf.pfn + gfn - start)
    }

    /// The fast path; `None` if it is not its case.
    fn expect_fast(&mut self, as_id: u8, fault: &Fault) -> Option<FaultOutcome> {
        let (write, used) = (fault.access == Access::Write, !self.hardware_ad());
        if !fault.present || fault.mirror || fault.prefetch || !(write || used) {
            return None;
        }
        let gfn = fault.gfn.0;
        let space = self.spaces.get_mut(usize::from(as_id))?;
        let logs = space.slot_at(gfn)?.logs();
        let (_, old) = space.tree.at(gfn)?;
        let mut new = old;
        new.a |= used;
        let gives_write = write && !old.w;
        if gives_write {
            if !old.mmu_w || old.pages > 1 && logs {
                return None;
            }
            new.w = true;
        }
        new.d |= write && used;
        if fault.access == Access::Execute && !old.x {
            return None;
        }
        let level = level_of(old.pages);
        if new == old {
            return Some(FaultOutcome::Spurious { level });
        }
        *space.tree.at_mut(gfn)? = new;
        if write && (gives_write || !old.d) {
            space.mark(gfn);
        }
        Some(FaultOutcome::Fixed { level })
    }

    pub(crate) fn new_leaf(&self, slot: &Slot, start: u64, level: Level, fault: &Fault) -> Leaf {
        let write = fault.access == Access::Write;
        let host_w = !slot.readonly();
        let w = host_w && (write || !slot.logs() || self.by_dirty_bit());
        let by_software = !self.hardware_ad();
        Leaf {
            pages: span(level.get()),
            pfn: slot.pfn(start),
            w,
            x: level == Level::SIZE_4K || !self.nx(),
            mmu_w: host_w,
            a: by_software || !fault.prefetch,
            d: by_software || w && (write || !slot.logs() || !self.by_dirty_bit()),
        }
    }

    /// A fault of the guest's own, if there is memory for tables.
    pub(crate) fn expect_fault(&mut self, as_id: u8, fault: &Fault) -> FaultOutcome {
        if fault.gfn >= self.info.max_gfn {
            return FaultOutcome::OutOfRange;
        }
        if let Some(outcome) = self.expect_fast(as_id, fault) {
            return outcome;
        }
        if usize::from(as_id) >= self.spaces.len() {
            return FaultOutcome::NoRoot;
        }
        let gfn = fault.gfn.0;
        let Some(slot) = self.spaces[usize::from(as_id)].slot_at(gfn).cloned() else {
            self.remember_hole(as_id, fault);
            return FaultOutcome::NoSlot;
        };
        let stale = fault
            .seq
            .is_some_and(|seq| seq != self.mmu.invalidate_seq());
        if stale || !self.pending.is_empty() && self.hull.contains(fault.gfn) {
            return FaultOutcome::Retry;
        }
        if fault.access == Access::Write && slot.readonly() {
            return FaultOutcome::ReadOnly;
        }
        self.map(as_id, fault, &slot)
    }

    /// The goal, and what it would be without the NX mitigation.
    fn goal(&self, slot: &Slot, fault: &Fault) -> (Level, Level) {
        if slot.logs() {
            return (Level::SIZE_4K, Level::SIZE_4K);
        }
        let gfn = fault.gfn.0;
        let mut allowed = self.allowed(slot, gfn, fault.max_level);
        let over = |level: Level| {
            let pages = span(level.get());
            GfnRange::new(Gfn(gfn & !(pages - 1)), pages).overlaps(self.hull)
        };
        while !self.pending.is_empty() && allowed > Level::SIZE_4K && over(allowed) {
            allowed = allowed.child().unwrap();
        }
        let nx = self.nx() && fault.access == Access::Execute;
        (if nx { Level::SIZE_4K } else { allowed }, allowed)
    }

    fn map(&mut self, as_id: u8, fault: &Fault, slot: &Slot) -> FaultOutcome {
        let (mut goal, allowed) = self.goal(slot, fault);
        let (gfn, nx, hardware) = (fault.gfn.0, self.nx(), self.hardware_ad());
        let write = fault.access == Access::Write;
        let mut level = self.info.root_level;
        loop {
            let pages = span(level.get());
            let start = gfn & !(pages - 1);
            let key = (level.get(), start);
            let tree = &mut self.spaces[usize::from(as_id)].tree;
            let noted = tree.tables.get(&key).copied();
            if level == goal && nx && noted == Some(true) {
                goal = goal.child().unwrap();
            }
            if level > goal && noted.is_some() {
                level = level.child().unwrap();
                continue;
            }
            let leaf = tree
                .leaves
                .get(&start)
                .copied()
                .filter(|leaf| leaf.pages == pages);
            if let Some(old) = leaf {
                let hit = fault.prefetch || self.is_hit(&old, fault.access);
                let space = &mut self.spaces[usize::from(as_id)];
                if hit {
                    let lacks_dirty = write && !old.d;
                    if fault.prefetch || hardware || old.a && !lacks_dirty {
                        return FaultOutcome::Spurious { level };
                    }
                    let entry = space.tree.leaves.get_mut(&start).unwrap();
                    entry.a = true;
                    entry.d |= write;
                    if lacks_dirty {
                        space.mark(gfn);
                    }
                    return FaultOutcome::Fixed { level };
                }
                if level > goal {
                    space.tree.split(start, nx, goal < allowed);
                    continue;
                }
            }
            if level == goal {
                let new = self.new_leaf(slot, start, level, fault);
                let space = &mut self.spaces[usize::from(as_id)];
                if level > Level::SIZE_4K {
                    space.tree.cut(level.get(), start);
                }
                space.tree.holes.remove(&start);
                space.tree.leaves.insert(start, new);
                if new.w && new.d {
                    space.mark(gfn);
                }
                return FaultOutcome::Fixed { level };
            }
            let keeps = goal < allowed && level <= allowed;
            self.spaces[usize::from(as_id)]
                .tree
                .tables
                .insert(key, keeps);
        }
    }

    fn remember_hole(&mut self, as_id: u8, fault: &Fault) {
        if !self.config.mmio_caching || fault.prefetch || self.info.mmio_generation_bits == 0 {
            return;
        }
        let space = &mut self.spaces[usize::from(as_id)];
        for level in 2..=self.info.root_level.get() {
            let start = fault.gfn.0 & !(span(level) - 1);
            space.tree.tables.entry((level, start)).or_insert(false);
        }
        space.tree.holes.insert(fault.gfn.0, space.changes);
    }

    pub(crate) fn expect_prefault(
        &mut self,
        as_id: u8,
        range: GfnRange,
        max_level: Level,
    ) -> Result<u64, PrefaultError> {
        let mut gfn = range.start;
        while gfn < range.end {
            let done = gfn.0 - range.start.0;
            let fault = Fault::prefetch(gfn).with_max_level(max_level);
            match self.expect_fault(as_id, &fault) {
                FaultOutcome::Fixed { level } | FaultOutcome::Spurious { level } => {
                    let pages = span(level.get());
                    gfn = Gfn((gfn.0 & !(pages - 1)) + pages);
                }
                FaultOutcome::Retry => return Err(PrefaultError::Again { gfn, done }),
                FaultOutcome::NoSlot => return Err(PrefaultError::NoSlot { gfn, done }),
                outcome => return Err(PrefaultError::Failed { gfn, done, outcome }),
            }
        }
        Ok(range.pages())
    }

    /// Ageing, in address space 0.
    pub(crate) fn expect_age(&mut self, range: GfnRange) -> bool {
        let tracked = self.info.ad_policy == AdPolicy::AccessTracking;
        let tree = &mut self.spaces[0].tree;
        let mut young = false;
        for start in tree.over(range) {
            let leaf = tree.leaves.get_mut(&start).unwrap();
            if leaf.a {
                young = true;
                leaf.a = false;
                leaf.w &= !tracked;
            }
        }
        young
    }
}
