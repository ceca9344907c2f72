//! The model's state, and the elementary changes of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering::SeqCst},
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, AdPolicy, Arena, DirtyLogPolicy, DirtyLogStart, FormatInfo, Gfn, GfnRange,
    Invalidation, Level, MmuConfig, Pfn, SecondStage, SlotFlags, SlotSpec, Vcpu,
};

use crate::{
    host::{Machine, mapping_level},
    op::{HUGE, WINDOW},
};

/// First frame of the third window, where a gigabyte may be one leaf.
pub(crate) const BIG: u64 = 1 << 18;
pub(crate) const BIG_ID: u16 = 9;
pub(crate) const SPACES: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) pages: u64,
    pub(crate) pfn: u64,
    pub(crate) w: bool,
    pub(crate) x: bool,
    pub(crate) mmu_w: bool,
    pub(crate) a: bool,
    pub(crate) d: bool,
}

/// What hangs under one root.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    pub(crate) leaves: BTreeMap<u64, Leaf>,
    /// Entries that point to a table, by level and first frame; whether the NX mitigation keeps it.
    pub(crate) tables: BTreeMap<(u8, u64), bool>,
    /// Frames remembered as holes, and when.
    pub(crate) holes: BTreeMap<u64, u64>,
}

pub(crate) fn span(level: u8) -> u64 {
    1 << (9 * (level - 1))
}

pub(crate) fn level_of(pages: u64) -> Level {
    Level::new((pages.trailing_zeros() / 9) as u8 + 1).unwrap()
}

impl Tree {
    pub(crate) fn at(&self, gfn: u64) -> Option<(u64, Leaf)> {
        let (&start, &leaf) = self.leaves.range(..=gfn).next_back()?;
        (gfn < start + leaf.pages).then_some((start, leaf))
    }

    pub(crate) fn at_mut(&mut self, gfn: u64) -> Option<&mut Leaf> {
        let (start, leaf) = self.leaves.range_mut(..=gfn).next_back()?;
        (gfn < start + leaf.pages).then_some(leaf)
    }

    /// First frames of the leaves that share a frame with `range`.
    pub(crate) fn over(&self, range: GfnRange) -> Vec<u64> {
        if range.is_empty() {
            return vec![];
        }
        let from = self
            .at(range.start.0)
            .map_or(range.start.0, |(start, _)| start);
        self.leaves
            .range(from..range.end.0)
            .map(|(&start, _)| start)
            .collect()
    }

    /// Unmaps; whether there was anything.
    pub(crate) fn zap(&mut self, range: GfnRange) -> bool {
        let leaves = self.over(range);
        for start in &leaves {
            self.leaves.remove(start);
        }
        self.holes.retain(|&gfn, _| !range.contains(Gfn(gfn)));
        !leaves.is_empty()
    }

    /// Removes the table under entry (level, start), with all below.
    pub(crate) fn cut(&mut self, level: u8, start: u64) {
        let range = GfnRange::new(Gfn(start), span(level));
        self.zap(range);
        self.tables
            .retain(|&(l, s), _| l > level || !range.contains(Gfn(s)));
    }

    /// Splits the leaf at `start` one level.
    pub(crate) fn split(&mut self, start: u64, nx: bool, noted: bool) {
        let leaf = self.leaves.remove(&start).unwrap();
        let pages = leaf.pages / HUGE;
        self.tables
            .insert((level_of(leaf.pages).get(), start), noted);
        for index in 0..HUGE {
            let part = Leaf {
                pages,
                pfn: leaf.pfn + index * pages,
                x: leaf.x || nx && pages == 1,
                ..leaf
            };
            self.leaves.insert(start + index * pages, part);
        }
    }

    /// Splits what is over `range` and coarser than `target` pages.
    pub(crate) fn split_over(&mut self, range: GfnRange, target: u64, nx: bool) {
        while let Some(start) = self
            .over(range)
            .into_iter()
            .find(|start| self.leaves[start].pages > target)
        {
            self.split(start, nx, false);
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) spec: SlotSpec,
    pub(crate) dirty: BTreeSet<u64>,
    /// Reasons against huge pages.
    pub(crate) forbidden: BTreeMap<(u8, u64), u32>,
}

impl Slot {
    pub(crate) fn logs(&self) -> bool {
        self.spec.flags.contains(SlotFlags::LOG_DIRTY)
    }

    pub(crate) fn readonly(&self) -> bool {
        self.spec.flags.contains(SlotFlags::READONLY)
    }

    pub(crate) fn mark(&mut self, gfn: u64) {
        if self.logs() {
            self.dirty.insert(gfn - self.spec.base_gfn.0);
        }
    }

    pub(crate) fn pfn(&self, gfn: u64) -> u64 {
        self.spec.host_base_pfn.0 + gfn - self.spec.base_gfn.0
    }
}

#[derive(Debug, Default)]
pub(crate) struct Space {
    pub(crate) slots: BTreeMap<u16, Slot>,
    pub(crate) tree: Tree,
    /// Counts changes of slots: a hole found before the last one is forgotten.
    pub(crate) changes: u64,
}

impl Space {
    pub(crate) fn slot_at(&self, gfn: u64) -> Option<&Slot> {
        let over = |slot: &&Slot| slot.spec.range().contains(Gfn(gfn));
        self.slots.values().find(over)
    }

    pub(crate) fn mark(&mut self, gfn: u64) {
        let over = |slot: &&mut Slot| slot.spec.range().contains(Gfn(gfn));
        if let Some(slot) = self.slots.values_mut().find(over) {
            slot.mark(gfn);
        }
    }
}

pub(crate) struct World {
    pub(crate) stage: GuestStage,
    pub(crate) info: FormatInfo,
    pub(crate) config: MmuConfig,
    pub(crate) host: Arc<Machine>,
    pub(crate) arena: Arc<Arena>,
    /// Table memory may run out.
    pub(crate) tight: bool,
    pub(crate) spaces: Vec<Space>,
    /// Withdrawn and not yet zapped: address space, root, what hangs there.
    pub(crate) withdrawn: Vec<(u8, Pfn, Tree)>,
    pub(crate) pending: Vec<Invalidation>,
    pub(crate) hull: GfnRange,
    /// `None` where the address space does not exist.
    pub(crate) vcpus: Vec<Vcpu>,
    // Last, so that vCPUs go first.
    pub(crate) mmu: Box<dyn SecondStage>,
    pub(crate) steps: u64,
}

impl World {
    pub(crate) fn new(stage: GuestStage, choices: u64) -> Self {
        let bit = |n: u32| choices >> n & 1 == 1;
        let start = if bit(0) {
            DirtyLogStart::InitiallySet
        } else {
            DirtyLogStart::Protected
        };
        let max_level = [
            Level::SIZE_2M,
            Level::SIZE_1G,
            Level::SIZE_1G,
            Level::SIZE_4K,
        ];
        let config = MmuConfig::default()
            .with_dirty_log_start(start)
            .with_eager_split(bit(1))
            .with_mmio_caching(bit(2))
            .with_nx_huge_pages(bit(3))
            .with_address_spaces(SPACES)
            .with_max_level(max_level[(choices >> 4 & 3) as usize]);
        let tight = choices >> 8 & 0xff < 85;
        let frames = if tight {
            24 + (choices >> 16 & 63) as usize
        } else {
            512
        };
        let host = Arc::new(Machine::default());
        host.mixed.store(bit(6), SeqCst);
        host.mirrors.store(bit(7), SeqCst);
        host.refuse
            .store([0, 0, 3, 5][(choices >> 22 & 3) as usize], SeqCst);
        let arena = Arc::new(Arena::new(Pfn(0x8_0000), frames));
        let mmu = stage.build(Arc::clone(&arena), Arc::clone(&host), config);
        let mut world = Self {
            stage,
            info: stage.info(),
            config,
            host,
            arena,
            tight,
            spaces: (0..SPACES).map(|_| Space::default()).collect(),
            withdrawn: vec![],
            pending: vec![],
            hull: GfnRange::default(),
            vcpus: vec![mmu.vcpu(), mmu.vcpu()],
            mmu,
            steps: 0,
        };
        // Most cases begin with memory, and every second one with a vCPU in either address space.
        if choices >> 24 & 3 != 0 {
            for as_id in 0..SPACES {
                let spec = SlotSpec::new(0, Gfn(0), 1100, Pfn(0x40_0000)).with_as_id(as_id);
                world.create_spec(spec).expect("the first slot is legal");
            }
        }
        if bit(26) {
            world.vcpus[1].set_as_id(1);
        }
        world
    }

    /// The three windows: at the bottom of the address space, at its top, at the second gigabyte.
    pub(crate) fn place(&self, gfn: u64) -> Gfn {
        match gfn / WINDOW {
            0 => Gfn(gfn),
            1 => Gfn(self.info.max_gfn.0 - 2 * WINDOW + gfn),
            _ => Gfn(BIG + gfn % WINDOW),
        }
    }

    pub(crate) fn by_dirty_bit(&self) -> bool {
        self.info.dirty_log == DirtyLogPolicy::DirtyBit
    }

    pub(crate) fn hardware_ad(&self) -> bool {
        self.info.ad_policy == AdPolicy::Hardware
    }

    pub(crate) fn nx(&self) -> bool {
        self.info.nx_huge_pages && self.config.nx_huge_pages
    }

    pub(crate) fn is_hit(&self, leaf: &Leaf, access: Access) -> bool {
        match access {
            Access::Read => true,
            Access::Write => leaf.w,
            Access::Execute => leaf.x,
        }
    }

    /// The coarsest level at which slot and host allow a mapping.
    pub(crate) fn allowed(&self, slot: &Slot, gfn: u64, limit: Level) -> Level {
        let top = self.info.max_leaf_level.min(self.config.max_level);
        let fits = |level: Level| {
            let (pages, spec) = (span(level.get()), &slot.spec);
            let start = gfn & !(pages - 1);
            let range = spec.range();
            level == Level::SIZE_4K
                || start >= range.start.0
                    && start + pages <= range.end.0
                    && (spec.base_gfn.0 ^ spec.host_base_pfn.0) & (pages - 1) == 0
                    && !slot.forbidden.contains_key(&(level.get(), start))
        };
        let lower = |mut level: Level| {
            while !fits(level) {
                level = level.child().unwrap();
            }
            level
        };
        let level = lower(top.min(slot.spec.max_level).min(limit));
        if level == Level::SIZE_4K {
            return level;
        }
        lower(level.min(mapping_level(self.host.mixed.load(SeqCst), slot.pfn(gfn))))
    }
}
