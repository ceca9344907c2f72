//! Operations on the dirty log, on the MMU and on the model.

use proptest::{prelude::*, test_runner::TestCaseResult};
use slat_mmu::{DirtyLogStart, Gfn, GfnRange, Level, SlotFlags};

use crate::state::{Slot, World, level_of, span};

impl World {
    pub(crate) fn log(&mut self, id: u16, as_id: u8, on: bool) -> TestCaseResult {
        let Some(old) = self.spaces[usize::from(as_id)].slots.get(&id).cloned() else {
            let result = self.mmu.space(as_id).set_slot_flags(id, SlotFlags::empty());
            prop_assert!(result.is_err());
            return Ok(());
        };
        let mut flags = old.spec.flags;
        flags.set(SlotFlags::LOG_DIRTY, on);
        let unsplit = self.mmu.space(as_id).set_slot_flags(id, flags).unwrap();
        if flags == old.spec.flags {
            return Ok(());
        }
        let initially_set = self.config.dirty_log_start == DirtyLogStart::InitiallySet;
        let (nx, by_dirty_bit) = (self.nx(), self.by_dirty_bit());
        let space = &mut self.spaces[usize::from(as_id)];
        space.changes += 1;
        let slot = space.slots.get_mut(&id).unwrap();
        slot.spec.flags = flags;
        let range = slot.spec.range();
        slot.dirty.clear();
        if !on {
            return self.recover(as_id, id);
        }
        if initially_set {
            slot.dirty = (0..old.spec.npages).collect();
            return Ok(());
        }
        if self.config.eager_split {
            space.tree.split_over(range, 1, nx);
        }
        for start in space.tree.over(range) {
            let leaf = space.tree.leaves.get_mut(&start).unwrap();
            leaf.w &= by_dirty_bit && leaf.pages == 1;
            leaf.d &= !by_dirty_bit;
        }
        self.adopt(as_id)?;
        let whole = self.coarser(as_id, range, 1);
        prop_assert_eq!(unsplit, if self.config.eager_split { whole } else { 0 });
        Ok(())
    }

    /// How many leaves over `range` have more than `pages`.
    pub(crate) fn coarser(&self, as_id: u8, range: GfnRange, pages: u64) -> u64 {
        let tree = &self.spaces[usize::from(as_id)].tree;
        let leaves = tree.over(range).into_iter();
        leaves
            .filter(|start| tree.leaves[start].pages > pages)
            .count() as u64
    }

    /// Logging has ended: tables that may be leaves become leaves.
    pub(crate) fn recover(&mut self, as_id: u8, id: u16) -> TestCaseResult {
        let nx = self.nx();
        let slot = self.spaces[usize::from(as_id)].slots[&id].clone();
        for level in (2..=self.info.root_level.get()).rev() {
            let level = Level::new(level).unwrap();
            let pages = span(level.get());
            let tables = &self.spaces[usize::from(as_id)].tree.tables;
            let places: Vec<u64> = tables
                .iter()
                .filter(|&(&(of, _), &noted)| of == level.get() && !noted)
                .map(|(&(_, start), _)| start)
                .collect();
            for start in places {
                let span = GfnRange::new(Gfn(start), pages);
                let taken = !self.pending.is_empty() && self.hull.overlaps(span);
                if taken
                    || !span.overlaps(slot.spec.range())
                    || self.allowed(&slot, start, level) < level
                {
                    continue;
                }
                let tree = &mut self.spaces[usize::from(as_id)].tree;
                let Some(found) = tree.over(span).first().map(|first| tree.leaves[first]) else {
                    continue;
                };
                tree.cut(level.get(), start);
                let leaf = crate::state::Leaf {
                    pages,
                    pfn: slot.pfn(start),
                    w: found.mmu_w,
                    x: !nx,
                    mmu_w: found.mmu_w,
                    a: true,
                    d: found.mmu_w,
                };
                tree.leaves.insert(start, leaf);
            }
        }
        Ok(())
    }

    pub(crate) fn protect(&mut self, gfn: Gfn, d: u64) -> TestCaseResult {
        let min = [Level::SIZE_4K, Level::SIZE_2M][(d & 1) as usize];
        let changed = self.mmu.space(0).write_protect_gfn(gfn, min);
        let leaf = self.spaces[0].tree.at_mut(gfn.0);
        let mut expected = false;
        if let Some(leaf) = leaf.filter(|leaf| level_of(leaf.pages) >= min) {
            expected = leaf.mmu_w;
            leaf.w = false;
            leaf.mmu_w = false;
        }
        prop_assert_eq!(changed, expected);
        Ok(())
    }

    pub(crate) fn words(slot: &Slot) -> Vec<u64> {
        let mut words = vec![0; slot.spec.npages.div_ceil(64) as usize];
        for page in &slot.dirty {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
        words
    }

    pub(crate) fn get(&mut self, id: u16) -> TestCaseResult {
        let mut bitmap = vec![7; 64];
        let result = self.mmu.space(0).get_dirty_log(id, &mut bitmap);
        let slot = self.spaces[0].slots.get(&id).filter(|slot| slot.logs());
        prop_assert_eq!(result.is_ok(), slot.is_some());
        if let Some(slot) = slot {
            let expected = Self::words(slot);
            prop_assert_eq!(&bitmap[..expected.len()], &expected);
            prop_assert_eq!(
                self.mmu.space(0).dirty_pages(id),
                Ok(slot.dirty.len() as u64)
            );
        }
        Ok(())
    }

    pub(crate) fn harvest(&mut self, id: u16, junk: u64) -> TestCaseResult {
        let mut bitmap = vec![junk; 64];
        let result = self.mmu.space(0).harvest_dirty_log(id, &mut bitmap);
        let Some(slot) = self.spaces[0].slots.get_mut(&id).filter(|slot| slot.logs()) else {
            prop_assert!(result.is_err());
            return Ok(());
        };
        let expected = Self::words(slot);
        for (index, word) in bitmap.iter().enumerate() {
            prop_assert_eq!(*word, junk | expected.get(index).unwrap_or(&0));
        }
        prop_assert_eq!(result, Ok(slot.dirty.len() as u64));
        let base = slot.spec.base_gfn.0;
        let taken: Vec<u64> = std::mem::take(&mut slot.dirty).into_iter().collect();
        self.take(taken.into_iter().map(|page| base + page))
    }

    pub(crate) fn clear(&mut self, id: u16, word: u64, mask: u64) -> TestCaseResult {
        let Some(slot) = self.spaces[0].slots.get_mut(&id) else {
            return Ok(());
        };
        let (base, npages) = (slot.spec.base_gfn.0, slot.spec.npages);
        let num_pages = npages.saturating_sub(word * 64).min(64);
        let valid = slot.logs() && word * 64 <= npages;
        let result = self
            .mmu
            .space(0)
            .clear_dirty_log(id, word * 64, num_pages, &[mask]);
        prop_assert_eq!(result.is_ok(), valid);
        let Ok(count) = result else { return Ok(()) };
        let taken: Vec<u64> = (0..64)
            .filter(|bit| mask >> bit & 1 == 1)
            .map(|bit| word * 64 + bit)
            .filter(|page| slot.dirty.remove(page))
            .collect();
        prop_assert_eq!(count, taken.len() as u64);
        self.take(taken.into_iter().map(|page| base + page))
    }

    /// Protects pages whose bits were taken.
    pub(crate) fn take(&mut self, pages: impl Iterator<Item = u64>) -> TestCaseResult {
        let (nx, by_dirty_bit) = (self.nx(), self.by_dirty_bit());
        for gfn in pages {
            let tree = &mut self.spaces[0].tree;
            tree.split_over(GfnRange::new(Gfn(gfn), 1), 1, nx);
            if let Some(leaf) = tree.at_mut(gfn) {
                leaf.w &= by_dirty_bit;
                leaf.d &= !by_dirty_bit;
            }
        }
        self.adopt(0)
    }

    pub(crate) fn mark(&mut self, range: GfnRange) -> TestCaseResult {
        let mut marked = 0;
        for slot in self.spaces[0].slots.values_mut().filter(|slot| slot.logs()) {
            for page in 0..slot.spec.npages {
                if range.contains(Gfn(slot.spec.base_gfn.0 + page)) {
                    slot.dirty.insert(page);
                    marked += 1;
                }
            }
        }
        prop_assert_eq!(self.mmu.space(0).mark_dirty(range), marked);
        Ok(())
    }
}
