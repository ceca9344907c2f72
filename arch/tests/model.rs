//! The MMU against a flat model: for each guest frame its host frame, whether it may be written, and the leaf it is
//! part of; for each slot the set of dirty pages.
//!
//! After every operation, for every frame in the window, the model, the MMU's own walk and a walker written from the
//! manual must agree. A TLB that is filled at random and obeys only the flushes it is given must never hold more than
//! the table allows. At the end every table must have been given back.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proptest::{prelude::*, test_runner::TestCaseResult};
use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, DirtyLogStart, Fault, FaultOutcome, Flush, Gfn, GfnRange, Level, MmuConfig, Pfn,
    SecondStage, SlotFlags, SlotSpec,
};

const CASES: u32 = 150;
/// Frames at the bottom of the address space, and as many at the top, that the test uses.
const WINDOW: u64 = 2048;
const HUGE: u64 = 512;

#[derive(Clone, Debug)]
enum Op {
    Create {
        id: u16,
        gfn: u64,
        npages: u64,
        pfn: u64,
        flags: u32,
    },
    Delete {
        id: u16,
    },
    Move {
        id: u16,
        gfn: u64,
    },
    Log {
        id: u16,
        on: bool,
    },
    Fault {
        gfn: u64,
        access: Access,
        small: bool,
    },
    Zap {
        gfn: u64,
        pages: u64,
    },
    ZapAll,
    Invalidate {
        gfn: u64,
        pages: u64,
    },
    Split {
        gfn: u64,
        pages: u64,
    },
    Get {
        id: u16,
    },
    Harvest {
        id: u16,
    },
    Clear {
        id: u16,
        word: u64,
        mask: u64,
    },
    Mark {
        gfn: u64,
        pages: u64,
    },
}

/// Frames in the lower half of `0..2 * WINDOW` are at the bottom of the address space, the others at its top.
fn place(stage: GuestStage, gfn: u64) -> Gfn {
    if gfn < WINDOW {
        Gfn(gfn)
    } else {
        Gfn(stage.info().max_gfn.0 - 2 * WINDOW + gfn)
    }
}

fn op() -> impl Strategy<Value = Op> {
    let id = 0..3u16;
    // Aligned places are likely: that is where huge leaves come from.
    let gfn = || {
        prop_oneof![
            0..2 * WINDOW,
            (0..8u64).prop_map(|n| n * HUGE),
            (0..6u64).prop_map(|n| n * 300)
        ]
    };
    let pages = || prop_oneof![1..1400u64, Just(1), Just(HUGE), Just(2 * HUGE)];
    let pfn = prop_oneof![
        (0..64u64).prop_map(|n| 0x10_0000 + n * HUGE),
        0x10_0000..0x20_0000u64
    ];
    let access = prop_oneof![
        Just(Access::Read),
        Just(Access::Write),
        Just(Access::Write),
        Just(Access::Execute)
    ];
    prop_oneof![
        6 => (id.clone(), gfn(), pages(), pfn, prop_oneof![4 => Just(0), 2 => Just(1), 1 => Just(2)]).prop_map(
            |(id, gfn, npages, pfn, flags)| {
                // Half of the slots are aligned alike on both sides, wherever they begin.
                let pfn = if pfn % 2 == 0 { 0x10_0000 + gfn } else { pfn };
                Op::Create { id, gfn, npages, pfn, flags }
            }
        ),
        1 => id.clone().prop_map(|id| Op::Delete { id }),
        1 => (id.clone(), gfn()).prop_map(|(id, gfn)| Op::Move { id, gfn }),
        3 => (id.clone(), any::<bool>()).prop_map(|(id, on)| Op::Log { id, on }),
        24 => (gfn(), access, any::<bool>()).prop_map(|(gfn, access, small)| Op::Fault { gfn, access, small }),
        2 => (gfn(), pages()).prop_map(|(gfn, pages)| Op::Zap { gfn, pages }),
        1 => Just(Op::ZapAll),
        1 => (gfn(), pages()).prop_map(|(gfn, pages)| Op::Invalidate { gfn, pages }),
        1 => (gfn(), pages()).prop_map(|(gfn, pages)| Op::Split { gfn, pages }),
        1 => id.clone().prop_map(|id| Op::Get { id }),
        3 => id.clone().prop_map(|id| Op::Harvest { id }),
        4 => (id, 0..24u64, any::<u64>()).prop_map(|(id, word, mask)| Op::Clear { id, word, mask }),
        1 => (gfn(), 1..200u64).prop_map(|(gfn, pages)| Op::Mark { gfn, pages }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Page {
    pfn: u64,
    writable: bool,
    /// First frame and length of the leaf.
    leaf: (u64, u64),
}

struct Slot {
    spec: SlotSpec,
    dirty: BTreeSet<u64>,
}

impl Slot {
    fn logs(&self) -> bool {
        self.spec.flags.contains(SlotFlags::LOG_DIRTY)
    }

    fn all_dirty(&self) -> BTreeSet<u64> {
        (0..self.spec.npages).collect()
    }
}

struct World {
    stage: GuestStage,
    arena: Arc<Arena>,
    mmu: Box<dyn SecondStage>,
    initially_set: bool,
    slots: BTreeMap<u16, Slot>,
    pages: BTreeMap<u64, Page>,
    tlb: BTreeMap<u64, (u64, bool)>,
}

impl World {
    fn new(stage: GuestStage, initially_set: bool) -> Self {
        let start = if initially_set {
            DirtyLogStart::InitiallySet
        } else {
            DirtyLogStart::Protected
        };
        let arena = Arc::new(Arena::new(Pfn(0x8_0000), 256));
        let mmu = stage.build(
            arena.clone(),
            MmuConfig::default().with_dirty_log_start(start),
        );
        let (slots, pages, tlb) = Default::default();
        Self {
            stage,
            arena,
            mmu,
            initially_set,
            slots,
            pages,
            tlb,
        }
    }

    fn obey(&mut self, flush: Flush) {
        self.tlb.retain(|&gfn, _| !flush.covers(Gfn(gfn)));
    }

    fn split_leaf(&mut self, gfn: u64) {
        if let Some(&Page {
            leaf: (start, span),
            ..
        }) = self.pages.get(&gfn)
        {
            for (&gfn, page) in self.pages.range_mut(start..start + span) {
                page.leaf = (gfn, 1);
            }
        }
    }

    fn zap(&mut self, range: GfnRange) {
        self.pages
            .retain(|_, page| !GfnRange::new(Gfn(page.leaf.0), page.leaf.1).overlaps(range));
    }

    fn slot_at(&self, gfn: u64) -> Option<&Slot> {
        self.slots
            .values()
            .find(|slot| slot.spec.range().contains(Gfn(gfn)))
    }

    /// Takes the W bit of one page whose dirty bit was taken.
    fn protect(&mut self, gfn: u64) {
        if self.pages.get(&gfn).is_some_and(|page| page.writable) {
            self.split_leaf(gfn);
            self.pages.get_mut(&gfn).unwrap().writable = false;
        }
    }

    fn expect_fault(&mut self, gfn: u64, access: Access, small: bool) -> FaultOutcome {
        let write = access == Access::Write;
        let Some(slot) = self.slot_at(gfn) else {
            return FaultOutcome::NoSlot;
        };
        let readonly = slot.spec.flags.contains(SlotFlags::READONLY);
        if write && readonly {
            return FaultOutcome::ReadOnly;
        }
        let (spec, logs) = (slot.spec, slot.logs());
        let (base, end) = (spec.base_gfn.0, spec.base_gfn.0 + spec.npages);
        let start = gfn & !(HUGE - 1);
        let fits =
            start >= base && start + HUGE <= end && (base ^ spec.host_base_pfn.0) & (HUGE - 1) == 0;
        let goal = if fits && !logs && !small { HUGE } else { 1 };
        let level_of = |span| {
            if span == 1 {
                Level::SIZE_4K
            } else {
                Level::SIZE_2M
            }
        };
        if let Some(page) = self.pages.get(&gfn)
            && page.leaf.1 >= goal
        {
            if !write || page.writable {
                return FaultOutcome::Spurious {
                    level: level_of(page.leaf.1),
                };
            }
            if page.leaf.1 > goal {
                self.split_leaf(gfn);
            }
        }
        let start = gfn & !(goal - 1);
        for gfn in start..start + goal {
            let pfn = spec.host_base_pfn.0 + (gfn - base);
            let writable = !readonly && (write || !logs);
            self.pages.insert(
                gfn,
                Page {
                    pfn,
                    writable,
                    leaf: (start, goal),
                },
            );
        }
        if logs && write {
            self.slots
                .get_mut(&spec.id)
                .unwrap()
                .dirty
                .insert(gfn - base);
        }
        FaultOutcome::Fixed {
            level: level_of(goal),
            flush: Flush::None,
        }
    }

    fn fault(&mut self, gfn: u64, access: Access, small: bool) -> TestCaseResult {
        let max_level = if small {
            Level::SIZE_4K
        } else {
            Level::SIZE_256T
        };
        let outcome = self
            .mmu
            .fault(Fault::new(Gfn(gfn), access).with_max_level(max_level));
        let expected = self.expect_fault(gfn, access, small);
        match (outcome, expected) {
            // Whether an empty table stood in the way is not in the model; a flush too many is allowed there.
            (
                FaultOutcome::Fixed { level, flush },
                FaultOutcome::Fixed {
                    level: expected, ..
                },
            ) => {
                prop_assert_eq!(level, expected);
                self.obey(flush);
                // A vCPU drops what its own TLB holds for the frame it faulted on.
                self.tlb.remove(&gfn);
            }
            (outcome, expected) => prop_assert_eq!(outcome, expected),
        }
        if let Some(hit) = self.mmu.translate(Gfn(gfn)) {
            self.tlb.insert(gfn, (hit.pfn.0, hit.writable));
        }
        Ok(())
    }

    fn dirty_words(slot: &Slot) -> Vec<u64> {
        let mut words = vec![0; slot.spec.npages.div_ceil(64) as usize];
        for page in &slot.dirty {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
        words
    }

    fn apply(&mut self, op: Op) -> TestCaseResult {
        let stage = self.stage;
        let range = |gfn, pages| GfnRange::new(place(stage, gfn), pages);
        match op {
            Op::Create {
                id,
                gfn,
                npages,
                pfn,
                flags,
            } => {
                let spec = SlotSpec::new(id, place(stage, gfn), npages, Pfn(pfn))
                    .with_flags(SlotFlags::from_bits_retain(flags));
                let free = !self.slots.contains_key(&id)
                    && spec.range().end <= stage.info().max_gfn
                    && !self
                        .slots
                        .values()
                        .any(|slot| slot.spec.range().overlaps(spec.range()));
                prop_assert_eq!(self.mmu.create_slot(spec).is_ok(), free);
                if free {
                    let mut slot = Slot {
                        spec,
                        dirty: BTreeSet::new(),
                    };
                    if slot.logs() && self.initially_set {
                        slot.dirty = slot.all_dirty();
                    }
                    self.slots.insert(id, slot);
                }
            }
            Op::Delete { id } => {
                let result = self.mmu.delete_slot(id);
                prop_assert_eq!(result.is_ok(), self.slots.contains_key(&id));
                if let (Ok(flush), Some(slot)) = (result, self.slots.remove(&id)) {
                    self.zap(slot.spec.range());
                    self.obey(flush);
                }
            }
            Op::Move { id, gfn } => {
                let result = self.mmu.move_slot(id, place(stage, gfn));
                let Some(old) = self.slots.get(&id).map(|slot| slot.spec) else {
                    prop_assert!(result.is_err());
                    return Ok(());
                };
                let mut new = old;
                new.base_gfn = place(stage, gfn);
                let free = new.range().end <= stage.info().max_gfn
                    && !self
                        .slots
                        .values()
                        .any(|s| s.spec.id != id && s.spec.range().overlaps(new.range()));
                prop_assert_eq!(result.is_ok(), free);
                if let Ok(flush) = result {
                    if new.base_gfn != old.base_gfn {
                        self.zap(old.range());
                    }
                    self.slots.get_mut(&id).unwrap().spec = new;
                    self.obey(flush);
                }
            }
            Op::Log { id, on } => {
                let Some(spec) = self.slots.get(&id).map(|slot| slot.spec) else {
                    return Ok(());
                };
                let mut flags = spec.flags;
                flags.set(SlotFlags::LOG_DIRTY, on);
                let flush = self.mmu.set_slot_flags(id, flags).unwrap();
                let slot = self.slots.get_mut(&id).unwrap();
                let enabled = on && !slot.logs();
                slot.spec.flags = flags;
                if !on {
                    slot.dirty.clear();
                } else if enabled && self.initially_set {
                    slot.dirty = slot.all_dirty();
                } else if enabled {
                    for (_, page) in self
                        .pages
                        .range_mut(spec.range().start.0..spec.range().end.0)
                    {
                        page.writable = false;
                    }
                }
                self.obey(flush);
            }
            Op::Fault { gfn, access, small } => self.fault(place(stage, gfn).0, access, small)?,
            Op::Zap { gfn, pages } => {
                let flush = self.mmu.zap_gfn_range(range(gfn, pages));
                self.zap(range(gfn, pages));
                self.obey(flush);
            }
            Op::ZapAll => {
                let flush = self.mmu.zap_all();
                self.pages.clear();
                self.obey(flush);
                prop_assert_eq!(self.mmu.stats().tables, 0);
            }
            Op::Invalidate { gfn, pages } => {
                let range = range(gfn, pages);
                let seq = self.mmu.invalidate_seq();
                let (token, flush) = self.mmu.invalidate_begin(range);
                self.zap(range);
                self.obey(flush);
                let blocked = self.mmu.fault(Fault::new(range.start, Access::Read));
                let expected = if self.slot_at(range.start.0).is_some() {
                    FaultOutcome::Retry
                } else {
                    FaultOutcome::NoSlot
                };
                prop_assert_eq!(blocked, expected);
                self.mmu.invalidate_end(token);
                prop_assert_eq!(
                    self.mmu
                        .fault(Fault::new(range.start, Access::Read).with_seq(seq)),
                    expected
                );
            }
            Op::Split { gfn, pages } => {
                prop_assert!(self.mmu.split_huge_pages(range(gfn, pages), Level::SIZE_4K));
                let range = range(gfn, pages);
                let hit =
                    |page: &Page| GfnRange::new(Gfn(page.leaf.0), page.leaf.1).overlaps(range);
                let leaves: Vec<u64> = self
                    .pages
                    .iter()
                    .filter(|(_, page)| hit(page))
                    .map(|(&gfn, _)| gfn)
                    .collect();
                for gfn in leaves {
                    self.split_leaf(gfn);
                }
            }
            Op::Get { id } => {
                let mut bitmap = vec![0; 64];
                let result = self.mmu.get_dirty_log(id, &mut bitmap);
                let slot = self.slots.get(&id).filter(|slot| slot.logs());
                prop_assert_eq!(result.is_ok(), slot.is_some());
                if let Some(slot) = slot {
                    let expected = Self::dirty_words(slot);
                    prop_assert_eq!(&bitmap[..expected.len()], &expected);
                    prop_assert_eq!(self.mmu.dirty_pages(id).unwrap(), slot.dirty.len() as u64);
                }
            }
            Op::Harvest { id } => {
                let mut bitmap = vec![0; 64];
                let result = self.mmu.harvest_dirty_log(id, &mut bitmap);
                let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.logs()) else {
                    prop_assert!(result.is_err());
                    return Ok(());
                };
                let expected = Self::dirty_words(slot);
                prop_assert_eq!(&bitmap[..expected.len()], &expected);
                let base = slot.spec.base_gfn.0;
                for page in std::mem::take(&mut slot.dirty) {
                    self.protect(base + page);
                }
                self.obey(result.unwrap());
            }
            Op::Clear { id, word, mask } => {
                let Some(slot) = self.slots.get_mut(&id) else {
                    return Ok(());
                };
                let (base, npages) = (slot.spec.base_gfn.0, slot.spec.npages);
                let num_pages = npages.saturating_sub(word * 64).min(64);
                let valid = slot.logs() && word * 64 <= npages;
                let result = self.mmu.clear_dirty_log(id, word * 64, num_pages, &[mask]);
                prop_assert_eq!(result.is_ok(), valid);
                let Ok(flush) = result else { return Ok(()) };
                let taken: Vec<u64> = (0..64)
                    .filter(|bit| mask & 1 << bit != 0)
                    .map(|bit| word * 64 + bit)
                    .filter(|page| slot.dirty.remove(page))
                    .collect();
                for page in taken {
                    self.protect(base + page);
                }
                self.obey(flush);
            }
            Op::Mark { gfn, pages } => {
                let range = range(gfn, pages);
                let mut marked = 0;
                for slot in self.slots.values_mut().filter(|slot| slot.logs()) {
                    for page in 0..slot.spec.npages {
                        if range.contains(Gfn(slot.spec.base_gfn.0 + page)) {
                            slot.dirty.insert(page);
                            marked += 1;
                        }
                    }
                }
                prop_assert_eq!(self.mmu.mark_dirty(range), marked);
            }
        }
        Ok(())
    }

    fn compare(&self) -> TestCaseResult {
        let root = self.mmu.root().expect("the arena is large enough").pfn;
        for gfn in (0..2 * WINDOW).map(|gfn| place(self.stage, gfn).0) {
            let expected = self.pages.get(&gfn).map(|page| (page.pfn, page.writable));
            let own = self.mmu.translate(Gfn(gfn));
            prop_assert_eq!(
                own.map(|hit| (hit.pfn.0, hit.writable)),
                expected,
                "gfn {:#x}",
                gfn
            );
            let hardware = common::hardware_walk(self.stage, &self.arena, root, gfn);
            prop_assert_eq!(hardware, expected, "hardware at gfn {:#x}", gfn);
        }
        for (&gfn, &(pfn, writable)) in &self.tlb {
            let page = self.pages.get(&gfn);
            let fresh = page.is_some_and(|page| page.pfn == pfn && (page.writable || !writable));
            prop_assert!(
                fresh,
                "stale translation of gfn {:#x}: {:?}, table has {:?}",
                gfn,
                (pfn, writable),
                page
            );
        }
        for slot in self.slots.values().filter(|slot| slot.logs()) {
            for (gfn, page) in self
                .pages
                .range(slot.spec.range().start.0..slot.spec.range().end.0)
            {
                let dirty = slot.dirty.contains(&(gfn - slot.spec.base_gfn.0));
                prop_assert!(
                    dirty || !page.writable,
                    "gfn {:#x} is writable but clean",
                    gfn
                );
            }
        }
        let leaves = |span| {
            self.pages
                .iter()
                .filter(|&(&gfn, page)| page.leaf == (gfn, span))
                .count() as i64
        };
        let stats = self.mmu.stats();
        prop_assert_eq!(stats.pages_at(Level::SIZE_4K), leaves(1));
        prop_assert_eq!(stats.pages_at(Level::SIZE_2M), leaves(HUGE));
        Ok(())
    }
}

fn agrees_with_the_model(stage: GuestStage) {
    let strategy = (any::<bool>(), prop::collection::vec(op(), 1..60));
    common::check(CASES, &strategy, |(initially_set, ops)| {
        let mut world = World::new(stage, initially_set);
        for op in ops {
            let shown = format!("{op:?}");
            world
                .apply(op)
                .and_then(|()| world.compare())
                .map_err(|error| TestCaseError::fail(format!("after {shown}: {error}")))?;
        }
        let _flush = world.mmu.zap_all();
        let stats = world.mmu.stats();
        prop_assert_eq!((stats.tables, stats.pages), (0, [0; 5]));
        prop_assert_eq!(world.arena.used_frames(), 0);
        Ok(())
    });
}

#[test]
fn ept4() {
    agrees_with_the_model(GuestStage::Ept4);
}

#[test]
fn sv39x4() {
    agrees_with_the_model(GuestStage::Sv39x4);
}

#[test]
fn sv48x4() {
    agrees_with_the_model(GuestStage::Sv48x4);
}

#[test]
fn sv57x4() {
    agrees_with_the_model(GuestStage::Sv57x4);
}

#[test]
fn ept5() {
    agrees_with_the_model(GuestStage::Ept5);
}

#[test]
fn npt4() {
    agrees_with_the_model(GuestStage::Npt4);
}

#[test]
fn npt5() {
    agrees_with_the_model(GuestStage::Npt5);
}

#[test]
fn ept4_noad() {
    agrees_with_the_model(GuestStage::Ept4NoAd);
}

#[test]
fn ept5_noad() {
    agrees_with_the_model(GuestStage::Ept5NoAd);
}

#[test]
fn arm64_ipa40() {
    agrees_with_the_model(GuestStage::Arm64Ipa40);
}

#[test]
fn arm64_ipa48() {
    agrees_with_the_model(GuestStage::Arm64Ipa48);
}
