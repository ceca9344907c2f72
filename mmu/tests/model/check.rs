//! What must hold after every operation.

use std::collections::BTreeMap;

use proptest::{prelude::*, test_runner::TestCaseResult};
use slat_mmu::{Entry, Gfn, GfnRange, Pfn};

use crate::{
    common::{self, Found},
    host::Mirror,
    state::{Leaf, SPACES, Tree, World, level_of},
};

/// Leaves whose entries are compared bit by bit after each operation; all of them are compared with
/// the hardware's view.
const SAMPLE: usize = 24;

impl World {
    /// What hardware sees of the model's leaves: where it faults for want of A, nothing.
    fn visible(&self, tree: &Tree) -> Vec<Found> {
        let seen = |leaf: &Leaf| leaf.a || self.hardware_ad();
        tree.leaves
            .iter()
            .filter(|(_, leaf)| seen(leaf))
            .map(|(&gfn, leaf)| Found {
                gfn,
                pages: leaf.pages,
                pfn: leaf.pfn,
                readable: true,
                writable: leaf.w,
                executable: leaf.x,
            })
            .collect()
    }

    pub(crate) fn check(&mut self) -> TestCaseResult {
        self.steps += 1;
        for as_id in 0..SPACES {
            self.check_space(as_id)?;
        }
        for (_, root, tree) in &self.withdrawn {
            let reach = common::hardware_reach(self.stage, &self.arena, *root);
            prop_assert_eq!(reach.leaves, self.visible(tree), "under a withdrawn root");
        }
        self.check_tlb()?;
        self.check_mirror()?;
        self.check_pages()
    }

    fn check_space(&self, as_id: u8) -> TestCaseResult {
        let space = &self.spaces[usize::from(as_id)];
        let tree = &space.tree;
        if tree.leaves.is_empty() && tree.tables.is_empty() && !self.steps.is_multiple_of(4) {
            // Not to make each root by looking for it.
            prop_assert!(self.mmu.space(as_id).translate(self.place(3)).is_none());
            return Ok(());
        }
        let Some(root) = self.mmu.space(as_id).root() else {
            prop_assert!(self.tight && tree.leaves.is_empty(), "no root");
            return Ok(());
        };
        let reach = common::hardware_reach(self.stage, &self.arena, root.pfn);
        prop_assert_eq!(&reach.leaves, &self.visible(tree), "hardware's view");
        prop_assert_eq!(reach.tables, tree.tables.len() as u64 + 1, "tables");
        if self.steps.is_multiple_of(8) {
            let all = GfnRange::new(Gfn(0), u64::MAX);
            let listed = self.mmu.space(as_id).leaves(all);
            let listed: Vec<_> = listed.map(|l| (l.gfn.0, l.leaf.pfn.0, l.level)).collect();
            let modelled = tree.leaves.iter();
            let modelled: Vec<_> = modelled
                .map(|(&gfn, leaf)| (gfn, leaf.pfn, level_of(leaf.pages)))
                .collect();
            prop_assert_eq!(listed, modelled, "the list of leaves");
        }
        let stride = (tree.leaves.len() / SAMPLE).max(1);
        let skip = self.steps as usize % stride;
        for (&gfn, leaf) in tree.leaves.iter().skip(skip).step_by(stride) {
            let at = gfn + self.steps % leaf.pages;
            let step = self.mmu.space(as_id).walk(Gfn(at)).last().copied();
            let Some(Entry::Leaf(found)) = step.map(|step| step.entry) else {
                return Err(TestCaseError::fail(format!(
                    "{at:#x}: {step:?} for {leaf:?}"
                )));
            };
            let seen = Leaf {
                pages: leaf.pages,
                pfn: found.pfn.0,
                w: found.writable,
                x: found.executable,
                mmu_w: found.mmu_writable,
                a: found.accessed,
                d: found.dirty,
            };
            prop_assert_eq!(seen, *leaf, "the entry for {:#x}", at);
            prop_assert_eq!(step.map(|step| step.level), Some(level_of(leaf.pages)));
            let hit = self.mmu.space(as_id).translate(Gfn(at)).map(|to| to.pfn);
            prop_assert_eq!(hit, Some(Pfn(leaf.pfn + at - gfn)));
            let walked = common::hardware_walk(self.stage, &self.arena, root.pfn, at);
            prop_assert_eq!(walked.is_some(), leaf.a || self.hardware_ad());
        }
        for gfn in [0, 1, 511, 2047, 2048, 4095, 4096, 5000] {
            let gfn = self.place(gfn);
            let expected = tree
                .at(gfn.0)
                .map(|(start, leaf)| Pfn(leaf.pfn + gfn.0 - start));
            let found = self.mmu.space(as_id).translate(gfn).map(|to| to.pfn);
            prop_assert_eq!(found, expected, "{}", gfn);
        }
        Ok(())
    }

    fn check_tlb(&self) -> TestCaseResult {
        for (&(vcpu, as_id, gfn), held) in &*self.host.tlb.lock().unwrap() {
            let space = &self.spaces[usize::from(as_id)];
            let Some((start, leaf)) = space.tree.at(gfn) else {
                return Err(TestCaseError::fail(format!(
                    "vCPU {vcpu} holds {gfn:#x} of {as_id}, which is not mapped: {held:?}"
                )));
            };
            let fresh = held.pfn.0 == leaf.pfn + gfn - start
                && (leaf.mmu_w || !held.writable)
                && (leaf.x || !held.executable);
            prop_assert!(
                fresh,
                "vCPU {vcpu} holds {gfn:#x} {held:?}, the table has {leaf:?}"
            );
            let unseen = held.writable && (held.dirty || !self.by_dirty_bit());
            let Some(slot) = space.slot_at(gfn).filter(|slot| slot.logs() && unseen) else {
                continue;
            };
            prop_assert!(
                slot.dirty.contains(&(gfn - slot.spec.base_gfn.0)),
                "vCPU {vcpu} can write {gfn:#x} and the log would not know: {held:?}"
            );
        }
        Ok(())
    }

    /// The root of the mirror that has `table`.
    fn mirror_root(&self, table: u64) -> Pfn {
        let mut pfn = Pfn(table);
        while let Some((parent, _)) = self.mmu.page_header(pfn).and_then(|page| page.parent) {
            pfn = parent;
        }
        pfn
    }

    fn check_mirror(&self) -> TestCaseResult {
        let Mirror { pages, tables, .. } = &*self.host.mirror.lock().unwrap();
        let Some(&table) = tables.first() else {
            prop_assert!(pages.is_empty());
            return Ok(());
        };
        let root = self.mirror_root(table);
        let reach = common::hardware_reach(self.stage, &self.arena, root);
        let found: BTreeMap<u64, (u64, bool)> = reach
            .leaves
            .iter()
            .map(|leaf| (leaf.gfn, (leaf.pfn, leaf.writable)))
            .collect();
        let held = pages.iter().map(|(&gfn, page)| (gfn, (page.pfn, page.w)));
        let held: BTreeMap<u64, (u64, bool)> = held.collect();
        prop_assert_eq!(&found, &held, "the mirror and what it stands for");
        if self.steps.is_multiple_of(8) {
            let all = GfnRange::new(Gfn(0), u64::MAX);
            let listed = self.mmu.space(0).mirror_leaves(all);
            let listed = listed.map(|of| (of.gfn.0, (of.leaf.pfn.0, of.leaf.writable)));
            prop_assert_eq!(listed.collect::<BTreeMap<_, _>>(), held, "the list");
        }
        prop_assert!(reach.leaves.iter().all(|leaf| leaf.pages == 1));
        prop_assert_eq!(reach.tables, tables.len() as u64 + 1);
        Ok(())
    }

    fn check_pages(&self) -> TestCaseResult {
        let mut pages = [0; 5];
        let trees = self.spaces.iter().map(|space| &space.tree);
        for tree in trees.chain(self.withdrawn.iter().map(|(_, _, tree)| tree)) {
            for leaf in tree.leaves.values() {
                pages[level_of(leaf.pages).index()] += 1;
            }
        }
        pages[0] += self.host.mirror.lock().unwrap().pages.len() as i64;
        prop_assert_eq!(self.mmu.stats().pages, pages);
        Ok(())
    }

    /// Where memory may have run out in the middle: the tables may be coarser or less writable than
    /// the model, nothing else; the model takes them over.
    pub(crate) fn adopt(&mut self, as_id: u8) -> TestCaseResult {
        if !self.tight {
            return Ok(());
        }
        let model = std::mem::take(&mut self.spaces[usize::from(as_id)].tree);
        let mut tree = Tree {
            holes: model.holes.clone(),
            ..Tree::default()
        };
        for &gfn in model.leaves.keys() {
            if tree.at(gfn).is_some() {
                continue;
            }
            let walk = self.mmu.space(as_id).walk(Gfn(gfn));
            let Some(step) = walk.last() else { continue };
            let Entry::Leaf(found) = step.entry else {
                return Err(TestCaseError::fail(format!("{gfn:#x} is {step:?}")));
            };
            let pages = 1u64 << (9 * (step.level.get() - 1));
            let real = Leaf {
                pages,
                pfn: found.pfn.0,
                w: found.writable,
                x: found.executable,
                mmu_w: found.mmu_writable,
                a: found.accessed,
                d: found.dirty,
            };
            let start = gfn & !(pages - 1);
            for part in model.over(GfnRange::new(Gfn(start), pages)) {
                let leaf = model.leaves[&part];
                prop_assert_eq!(leaf.pfn, real.pfn + part - start);
                prop_assert!(
                    leaf.pages <= pages && (leaf.w || !real.w),
                    "{:?} for {:?}",
                    real,
                    leaf
                );
                prop_assert_eq!((leaf.mmu_w, leaf.a), (real.mmu_w, real.a));
            }
            tree.leaves.insert(start, real);
        }
        // Tables above what is finer; those that hold nothing are where the model has them.
        tree.tables = model.tables;
        let coarse: Vec<(u64, u64)> = tree.leaves.iter().map(|(&s, l)| (s, l.pages)).collect();
        for (start, pages) in coarse {
            let level = level_of(pages).get();
            let range = GfnRange::new(Gfn(start), pages);
            tree.tables
                .retain(|&(l, s), _| l > level || !range.contains(Gfn(s)));
        }
        self.spaces[usize::from(as_id)].tree = tree;
        Ok(())
    }
}
