//! Carrying out operations, on the MMU and on the model.

use std::sync::atomic::Ordering::SeqCst;

use proptest::{prelude::*, test_runner::TestCaseResult};
use slat_mmu::{
    Access, Around, DirtyLogStart, Entry, Fault, FaultOutcome, Gfn, GfnRange, Level, Pfn,
    PrefaultError, SlotFlags, SlotSpec, WalkFault,
};

use crate::{
    op::{HUGE, Op},
    state::{BIG, BIG_ID, SPACES, Slot, Tree, World, span},
};

fn access(number: u64) -> Access {
    [Access::Read, Access::Write, Access::Write, Access::Execute][(number & 3) as usize]
}

impl World {
    pub(crate) fn run(&mut self, op: Op) -> TestCaseResult {
        let [a, b, c, d] = op.args;
        let id = (a % 4) as u16;
        let as_id = (a / 4 % 2 == 1 && d % 4 == 0) as u8;
        let gfn = self.place(b);
        let range = GfnRange::new(gfn, c);
        match op.name {
            "create" => self.create(id, as_id, gfn, c, d),
            "big" => self.create_big(as_id),
            "delete" => self.delete(if d % 8 == 0 { BIG_ID } else { id }, as_id),
            "move" => self.relocate(id, as_id, gfn),
            "log" => self.log(id, as_id, d & 1 == 1),
            "touch" => self.touch((a & 1) as usize, gfn.0, access(d)),
            "fault" => self.raw_fault((a & 1) as usize, gfn, d),
            "mirror" => {
                let mut fault = Fault::new(gfn, access(d)).with_mirror();
                fault.prefetch = d / 4 % 8 == 0 && access(d) == Access::Read;
                fault.map_writable = d / 32 % 2 == 0;
                fault.again = d / 64 % 4 == 0;
                self.mirror_fault((a & 1) as usize, fault, Around::none())
            }
            "beside" => {
                let mut fault = Fault::new(gfn, access(d)).with_mirror();
                fault.map_writable = d / 32 % 2 == 0;
                let from = Gfn(gfn.0.saturating_sub(d / 256 % 64));
                let mut around = Around::new(GfnRange::new(from, c % 600));
                around.map_writable = d / 64 % 2 == 0;
                self.mirror_fault((a & 1) as usize, fault, around)
            }
            "mirror_zap" => self.mirror_zap(as_id, range),
            "mirror_protect" => self.mirror_protect(as_id, range),
            "mirror_age" => self.mirror_age(as_id, range),
            "lose" => {
                // The owner drops mappings by itself.
                let mut mirror = self.host.mirror.lock().unwrap();
                let held = mirror.pages.range_mut(range.start.0..range.end.0);
                held.for_each(|(_, page)| page.lost = true);
                Ok(())
            }
            "replace" => {
                let mut mirror = self.host.mirror.lock().unwrap();
                mirror.pages.clear();
                mirror.tables.clear();
                mirror.since = self.mmu.space(0).withdraw_mirrors();
                Ok(())
            }
            "prefault" => self.prefault((a & 1) as usize, range, d),
            "zap" => {
                let any = self.mmu.space(as_id).zap_gfn_range(range);
                let expected = self.unmap(as_id, range)?;
                prop_assert_eq!(any, expected);
                Ok(())
            }
            "zap_all" => {
                self.mmu.zap_all();
                self.withdrawn.clear();
                self.spaces
                    .iter_mut()
                    .for_each(|space| space.tree = Tree::default());
                Ok(())
            }
            "withdraw" => self.withdraw(),
            "zap_withdrawn" => {
                self.mmu.zap_invalidated_roots();
                self.withdrawn.clear();
                Ok(())
            }
            "begin" => self.begin(as_id, range, d & 1 == 1),
            "end" => {
                if !self.pending.is_empty() {
                    let token = self.pending.remove(d as usize % self.pending.len());
                    self.mmu.invalidate_end(token).unwrap();
                }
                Ok(())
            }
            "split" => {
                let target = [Level::SIZE_4K, Level::SIZE_2M][(d & 1) as usize];
                let unsplit = self.mmu.space(0).split_huge_pages(range, target);
                let nx = self.nx();
                self.spaces[0]
                    .tree
                    .split_over(range, span(target.get()), nx);
                self.adopt(0)?;
                prop_assert_eq!(unsplit, self.coarser(0, range, span(target.get())));
                Ok(())
            }
            "forbid" => self.forbid(as_id, range, d, true),
            "allow" => self.forbid(as_id, range, d, false),
            "protect" => self.protect(gfn, d),
            "age" => {
                let young = self.spaces[0].tree.over(range);
                let young = young
                    .iter()
                    .any(|start| self.spaces[0].tree.leaves[start].a);
                prop_assert_eq!(self.mmu.space(0).test_age(range), young);
                if d & 1 == 1 {
                    prop_assert_eq!(self.mmu.space(0).age(range), self.expect_age(range));
                }
                Ok(())
            }
            "get" => self.get(id),
            "harvest" => self.harvest(id, d),
            "clear" => self.clear(id, b % 24, d),
            "mark" => self.mark(range),
            "nx" => self.recover_nx(),
            "vcpu" => {
                self.vcpus[(a & 1) as usize] = self.mmu.vcpu();
                self.host
                    .tlb
                    .lock()
                    .unwrap()
                    .retain(|&(vcpu, _, _), _| vcpu != (a & 1) as usize);
                Ok(())
            }
            "space" => {
                // Now and then one that does not exist.
                let to = if d % 5 == 0 { SPACES } else { (d % 2) as u8 };
                self.vcpus[(a & 1) as usize].set_as_id(to);
                Ok(())
            }
            "settle" => self.settle(),
            other => panic!("{other} is not an operation"),
        }
    }

    fn create(&mut self, id: u16, as_id: u8, gfn: Gfn, pages: u64, d: u64) -> TestCaseResult {
        // Most slots are aligned alike on both sides, wherever they begin.
        let pfn = if d.is_multiple_of(4) {
            0x10_0000 + d / 4 % 0x1000
        } else {
            0x10_0000 + gfn.0 % (1 << 20)
        };
        let flags = [0, 0, 0, 1, 1, 2, 3, 0][(d / 64 % 8) as usize];
        let max = [
            Level::SIZE_256T,
            Level::SIZE_256T,
            Level::SIZE_256T,
            Level::SIZE_4K,
        ];
        let spec = SlotSpec::new(id, gfn, pages, Pfn(pfn))
            .with_as_id(as_id)
            .with_flags(SlotFlags::from_bits_retain(flags))
            .with_max_level(max[(d / 16 % 4) as usize]);
        self.create_spec(spec)
    }

    /// One leaf of a gigabyte, some of 2 MiB, and a rest.
    fn create_big(&mut self, as_id: u8) -> TestCaseResult {
        let spec = SlotSpec::new(BIG_ID, Gfn(BIG), BIG + 700, Pfn(2 * BIG)).with_as_id(as_id);
        self.create_spec(spec)
    }

    pub(crate) fn create_spec(&mut self, spec: SlotSpec) -> TestCaseResult {
        let space = &mut self.spaces[usize::from(spec.as_id)];
        let overlaps = |slot: &Slot| slot.spec.range().overlaps(spec.range());
        let legal = !space.slots.contains_key(&spec.id)
            && spec.range().end <= self.info.max_gfn
            && !space.slots.values().any(overlaps);
        prop_assert_eq!(self.mmu.create_slot(spec).is_ok(), legal);
        if legal {
            space.changes += 1;
            let mut slot = Slot {
                spec,
                dirty: Default::default(),
                forbidden: Default::default(),
            };
            if slot.logs() && self.config.dirty_log_start == DirtyLogStart::InitiallySet {
                slot.dirty = (0..spec.npages).collect();
            }
            space.slots.insert(spec.id, slot);
        }
        Ok(())
    }

    fn delete(&mut self, id: u16, as_id: u8) -> TestCaseResult {
        let deleted = self.mmu.space(as_id).delete_slot(id);
        let space = &mut self.spaces[usize::from(as_id)];
        let slot = space.slots.remove(&id);
        prop_assert_eq!(deleted.is_ok(), slot.is_some());
        if let Some(slot) = slot {
            space.changes += 1;
            self.unmap(as_id, slot.spec.range())?;
        }
        Ok(())
    }

    fn relocate(&mut self, id: u16, as_id: u8, gfn: Gfn) -> TestCaseResult {
        let moved = self.mmu.space(as_id).move_slot(id, gfn);
        let space = &mut self.spaces[usize::from(as_id)];
        let Some(old) = space.slots.get(&id).map(|slot| slot.spec) else {
            prop_assert!(moved.is_err());
            return Ok(());
        };
        let mut new = old;
        new.base_gfn = gfn;
        let overlaps = |slot: &Slot| slot.spec.id != id && slot.spec.range().overlaps(new.range());
        let legal = new.range().end <= self.info.max_gfn && !space.slots.values().any(overlaps);
        prop_assert_eq!(moved.is_ok(), legal);
        if legal && new != old {
            space.changes += 1;
            let slot = space.slots.get_mut(&id).unwrap();
            slot.spec = new;
            slot.forbidden.clear();
            self.unmap(as_id, old.range())?;
        }
        Ok(())
    }

    /// Removes what is mapped over `range`, under every root; whether a flush was owed.
    fn unmap(&mut self, as_id: u8, range: GfnRange) -> Result<bool, TestCaseError> {
        let mut owed = self.spaces[usize::from(as_id)].tree.zap(range);
        for (of, _, tree) in &mut self.withdrawn {
            if *of == as_id {
                tree.zap(range);
            }
        }
        // Mirrors are address space 0's alone here.
        owed |= self.mirror_unmapped(as_id, range)?.pages > 0;
        Ok(owed)
    }

    /// What a vCPU does with an access: walks, faults, walks again.
    fn touch(&mut self, vcpu: usize, gfn: u64, access: Access) -> TestCaseResult {
        let as_id = self.vcpus[vcpu].as_id();
        for _ in 0..2 {
            let walked = self.mmu.access(&mut self.vcpus[vcpu], Gfn(gfn), access);
            let expected = self.expect_access(as_id, gfn, access);
            prop_assert_eq!(walked.map(|to| to.pfn.0), expected);
            match walked {
                Ok(hit) => {
                    self.host
                        .tlb
                        .lock()
                        .unwrap()
                        .insert((vcpu, as_id, gfn), hit);
                    return Ok(());
                }
                Err(walk) => {
                    let mut fault = Fault::new(Gfn(gfn), access);
                    fault.present =
                        matches!(walk, WalkFault::Permission | WalkFault::AccessedDirty);
                    let outcome = self.fault(vcpu, fault)?;
                    if !matches!(
                        outcome,
                        FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. }
                    ) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn fault(&mut self, vcpu: usize, fault: Fault) -> Result<FaultOutcome, TestCaseError> {
        let as_id = self.vcpus[vcpu].as_id();
        let outcome = self.mmu.fault(&mut self.vcpus[vcpu], fault);
        if outcome == FaultOutcome::OutOfMemory {
            prop_assert!(self.tight, "there is memory");
            return Ok(outcome);
        }
        let expected = self.expect_fault(as_id, &fault);
        prop_assert_eq!(outcome, expected);
        self.host
            .tlb
            .lock()
            .unwrap()
            .remove(&(vcpu, as_id, fault.gfn.0));
        Ok(outcome)
    }

    fn raw_fault(&mut self, vcpu: usize, gfn: Gfn, d: u64) -> TestCaseResult {
        let limits = [
            Level::SIZE_256T,
            Level::SIZE_4K,
            Level::SIZE_2M,
            Level::SIZE_256T,
        ];
        let mut fault = match d / 4 % 8 {
            0 => Fault::prefetch(gfn),
            _ => Fault::new(gfn, access(d)),
        };
        fault = fault.with_max_level(limits[(d / 32 % 4) as usize]);
        match d / 128 % 8 {
            0 => fault = fault.with_seq(self.mmu.invalidate_seq()),
            1 => fault = fault.with_seq(self.mmu.invalidate_seq().wrapping_sub(1)),
            2 => fault = Fault::new(Gfn(self.info.max_gfn.0 + d / 1024), access(d)),
            _ => {}
        }
        self.fault(vcpu, fault).map(|_| ())
    }

    fn prefault(&mut self, vcpu: usize, range: GfnRange, d: u64) -> TestCaseResult {
        let as_id = self.vcpus[vcpu].as_id();
        let limit = [Level::SIZE_4K, Level::SIZE_2M, Level::SIZE_256T][(d % 3) as usize];
        let mut range = range;
        range.end = range.end.min(self.info.max_gfn);
        let result = self.mmu.prefault(&mut self.vcpus[vcpu], range, limit);
        if let Err(PrefaultError::OutOfMemory { gfn, done }) = result {
            prop_assert!(self.tight);
            prop_assert_eq!(gfn.0, range.start.0 + done);
            let _before = self.expect_prefault(as_id, GfnRange::new(range.start, done), limit);
            return Ok(());
        }
        prop_assert_eq!(result, self.expect_prefault(as_id, range, limit));
        Ok(())
    }

    fn withdraw(&mut self) -> TestCaseResult {
        for as_id in 0..SPACES {
            let space = &mut self.spaces[usize::from(as_id)];
            if space.tree.leaves.is_empty() {
                space.tree = Tree::default();
                continue;
            }
            let root = self.mmu.space(as_id).root().unwrap();
            let tree = std::mem::take(&mut space.tree);
            self.withdrawn.push((as_id, root.pfn, tree));
        }
        self.mmu.invalidate_roots();
        prop_assert!(self.host.tlb.lock().unwrap().is_empty());
        Ok(())
    }

    fn begin(&mut self, as_id: u8, range: GfnRange, may_yield: bool) -> TestCaseResult {
        if self.pending.len() >= 3 {
            return Ok(());
        }
        let token = self.mmu.space(as_id).invalidate_begin(range, may_yield);
        self.hull = if self.pending.is_empty() {
            range
        } else {
            self.hull.hull(range)
        };
        self.pending.push(token);
        self.unmap(as_id, range).map(|_| ())
    }

    fn forbid(&mut self, as_id: u8, range: GfnRange, d: u64, forbid: bool) -> TestCaseResult {
        let level = [Level::SIZE_2M, Level::SIZE_1G][(d & 1) as usize];
        if forbid {
            self.mmu
                .space(as_id)
                .forbid_huge_pages(range, level)
                .unwrap();
        } else {
            self.mmu
                .space(as_id)
                .allow_huge_pages(range, level)
                .unwrap();
        }
        let (nx, pages) = (self.nx(), span(level.get()));
        let space = &mut self.spaces[usize::from(as_id)];
        let mut place = range.start.0 & !(pages - 1);
        while place < range.end.0.min(self.info.max_gfn.0) {
            let covered = GfnRange::new(Gfn(place), pages);
            for slot in space.slots.values_mut() {
                if !slot.spec.range().overlaps(covered) {
                    continue;
                }
                let count = slot.forbidden.entry((level.get(), place)).or_default();
                *count = if forbid {
                    *count + 1
                } else {
                    count.saturating_sub(1)
                };
                if *count == 0 {
                    slot.forbidden.remove(&(level.get(), place));
                }
            }
            place += pages;
        }
        if forbid {
            let hull = space.tree.over(range).into_iter().map(|start| {
                let pages = space.tree.leaves[&start].pages;
                GfnRange::new(Gfn(start), pages)
            });
            let hull = hull.fold(GfnRange::default(), GfnRange::hull);
            space.tree.split_over(range, pages / HUGE, nx);
            let leaves = space.tree.over(range);
            let real = self.mmu.space(as_id);
            let mapped = |gfn| real.translate(Gfn(gfn)).is_some();
            if self.tight && !leaves.is_empty() && !leaves.into_iter().any(mapped) {
                // Too little memory to split them all, so the range was unmapped instead. Of what
                // sticks out of it, that stays which had been split before.
                let is_table = |level: u8, gfn| {
                    let walk = real.walk(Gfn(gfn));
                    let step = walk.steps().find(|step| step.level.get() == level);
                    step.is_some_and(|step| matches!(step.entry, Entry::Table { .. }))
                };
                let tree = &mut space.tree;
                tree.leaves
                    .retain(|&gfn, _| !hull.contains(Gfn(gfn)) || mapped(gfn));
                tree.tables
                    .retain(|&(level, gfn), _| !hull.contains(Gfn(gfn)) || is_table(level, gfn));
                self.unmap(as_id, range)?;
            }
            self.adopt(as_id)?;
        }
        Ok(())
    }

    fn recover_nx(&mut self) -> TestCaseResult {
        let zapped = self.mmu.recover_nx_huge_pages(usize::MAX);
        let mut expected = 0;
        for space in &mut self.spaces {
            let noted: Vec<(u8, u64)> = space
                .tree
                .tables
                .iter()
                .filter(|&(&(_, start), &noted)| {
                    noted && space.slot_at(start).is_some_and(|slot| !slot.logs())
                })
                .map(|(&key, _)| key)
                .collect();
            for (level, start) in noted {
                if space.tree.tables.remove(&(level, start)).is_some() {
                    expected += 1;
                    space.tree.cut(level, start);
                }
            }
        }
        prop_assert!(
            (zapped > 0) == (expected > 0),
            "{} zapped, not {}",
            zapped,
            expected
        );
        Ok(())
    }

    /// Without vCPUs every table is accounted for.
    fn settle(&mut self) -> TestCaseResult {
        self.vcpus.clear();
        self.host.tlb.lock().unwrap().clear();
        self.mmu.reclaim();
        let stats = self.mmu.stats();
        let used = self.arena.used_frames();
        let root_frames = self.info.root_size.div_ceil(4096) as u64;
        prop_assert_eq!(stats.tables_retired, 0);
        prop_assert_eq!(
            used as u64,
            stats.tables - stats.roots + stats.roots * root_frames
        );
        let mut tables = stats.roots + self.host.mirror.lock().unwrap().tables.len() as u64;
        let trees = self.spaces.iter().map(|space| &space.tree);
        for tree in trees.chain(self.withdrawn.iter().map(|(_, _, tree)| tree)) {
            tables += tree.tables.len() as u64;
        }
        // Withdrawn trees without leaves are not in the model.
        prop_assert!(stats.tables >= tables);
        if self.withdrawn.is_empty() {
            self.mmu.zap_invalidated_roots();
            let stats = self.mmu.stats();
            let roots = stats.roots;
            prop_assert!(roots <= 2 * u64::from(SPACES));
        }
        self.vcpus = vec![self.mmu.vcpu(), self.mmu.vcpu()];
        Ok(())
    }

    /// Gives everything back.
    pub(crate) fn end(mut self) -> TestCaseResult {
        while let Some(token) = self.pending.pop() {
            self.mmu.invalidate_end(token).unwrap();
        }
        self.host.refuse.store(0, SeqCst);
        for as_id in 0..SPACES {
            self.mmu
                .space(as_id)
                .zap_gfn_range(GfnRange::new(Gfn(0), u64::MAX));
        }
        let stats = self.mmu.stats();
        prop_assert_eq!(stats.pages, [0; 5]);
        self.vcpus.clear();
        self.mmu.zap_all();
        let mirror = self.host.mirror.lock().unwrap();
        prop_assert!(mirror.pages.is_empty());
        let tables = mirror.tables.len() as u64;
        drop(mirror);
        let stats = self.mmu.stats();
        prop_assert_eq!((stats.pages, stats.tables_retired), ([0; 5], 0));
        prop_assert_eq!(stats.tables, tables + stats.roots);
        prop_assert!(stats.roots <= 1, "the mirror's");
        let (host, arena) = (self.host.clone(), self.arena.clone());
        drop(self);
        prop_assert!(host.mirror.lock().unwrap().tables.is_empty());
        prop_assert_eq!(arena.used_frames(), 0);
        Ok(())
    }
}
