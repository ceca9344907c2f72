//! Listing what is mapped, on every format, against a walker written from the manual.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use common::{Found, hardware_reach};
use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, Entry, Fault, FaultOutcome, Gfn, GfnRange, Level, MappedLeaf, MmuConfig, NoTlb,
    Pfn, SecondStage, SlotSpec, Vcpu,
};

const HOST: u64 = 0x20_0000;
/// A slot over so many pages from frame 0 on, and one at the top of the address space.
const PAGES: u64 = 4096;
const TOP_PAGES: u64 = 512;
const EVERYTHING: GfnRange = GfnRange {
    start: Gfn(0),
    end: Gfn(u64::MAX),
};

struct Rig {
    stage: GuestStage,
    arena: Arc<Arena>,
    // First, so that it goes before the MMU.
    vcpu: Vcpu,
    mmu: Box<dyn SecondStage>,
}

impl Rig {
    fn new(stage: GuestStage) -> Self {
        let arena = Arc::new(Arena::new(Pfn(0x1000), 256));
        let mmu = stage.build(Arc::clone(&arena), NoTlb, MmuConfig::default());
        let top = stage.info().max_gfn.0 - TOP_PAGES;
        for spec in [
            SlotSpec::new(0, Gfn(0), PAGES, Pfn(HOST)),
            SlotSpec::new(1, Gfn(top), TOP_PAGES, Pfn(2 * HOST)),
        ] {
            mmu.create_slot(spec).unwrap();
        }
        Self {
            stage,
            arena,
            vcpu: mmu.vcpu(),
            mmu,
        }
    }

    fn map(&mut self, gfn: u64, access: Access, level: Level) {
        let fault = Fault::new(Gfn(gfn), access).with_max_level(level);
        let outcome = self.mmu.fault(&mut self.vcpu, fault);
        assert!(matches!(outcome, FaultOutcome::Fixed { .. }), "{outcome:?}");
    }

    fn list(&self, range: GfnRange) -> Vec<MappedLeaf> {
        self.mmu.space(0).leaves(range).collect()
    }

    fn word(&self, address: u64) -> Option<u64> {
        // SAFETY: nobody makes a table meanwhile.
        unsafe { self.arena.read(address) }
    }
}

fn each(test: impl Fn(&mut Rig)) {
    for stage in GuestStage::ALL {
        println!("{stage}");
        test(&mut Rig::new(stage));
    }
}

fn found(leaf: &MappedLeaf) -> Found {
    Found {
        gfn: leaf.gfn.0,
        pages: 1 << (9 * u32::from(leaf.level.get() - 1)),
        pfn: leaf.leaf.pfn.0,
        readable: leaf.leaf.readable,
        writable: leaf.leaf.writable,
        executable: leaf.leaf.executable,
    }
}

#[test]
fn the_list_is_what_hardware_reaches() {
    each(|rig| {
        assert_eq!(rig.list(EVERYTHING), [], "nothing is mapped");
        let top = rig.stage.info().max_gfn.0 - 1;
        rig.map(5, Access::Write, Level::SIZE_4K);
        rig.map(600, Access::Write, Level::SIZE_2M);
        rig.map(1024, Access::Read, Level::SIZE_4K);
        rig.map(1535, Access::Execute, Level::SIZE_4K);
        rig.map(top, Access::Write, Level::SIZE_2M);
        let listed = rig.list(EVERYTHING);
        let root = rig.mmu.space(0).root().unwrap();
        let reach = hardware_reach(rig.stage, &rig.arena, root.pfn);
        assert_eq!(listed.iter().map(found).collect::<Vec<_>>(), reach.leaves);
        assert_eq!(listed.len(), 5);
        for leaf in &listed {
            assert_eq!(rig.word(leaf.address), Some(leaf.raw), "{leaf:?}");
            let last = rig.mmu.space(0).walk(leaf.gfn).last().copied().unwrap();
            assert_eq!((last.address, last.raw), (leaf.address, leaf.raw));
            assert_eq!(last.entry, Entry::Leaf(leaf.leaf));
        }
    });
}

#[test]
fn each_step_of_a_walk_says_where_its_entry_is() {
    each(|rig| {
        rig.map(5, Access::Write, Level::SIZE_4K);
        let walk = rig.mmu.space(0).walk(Gfn(5));
        let levels = usize::from(rig.stage.info().root_level.get());
        assert_eq!(walk.steps().count(), levels);
        let mut table = rig.mmu.space(0).root().unwrap().pfn;
        for step in walk.steps() {
            let bytes = rig.stage.info().root_size as u64;
            assert!((table.hpa()..table.hpa() + bytes).contains(&step.address));
            assert_eq!(rig.word(step.address), Some(step.raw), "{step:?}");
            if let Entry::Table { pfn } = step.entry {
                table = pfn;
            }
        }
    });
}

#[test]
fn a_range_gives_what_reaches_into_it_and_nothing_else() {
    each(|rig| {
        for gfn in [0, 3, 4, 511] {
            rig.map(gfn, Access::Write, Level::SIZE_4K);
        }
        rig.map(600, Access::Write, Level::SIZE_2M);
        let gfns = |start, pages| -> Vec<u64> {
            let listed = rig.list(GfnRange::new(Gfn(start), pages));
            listed.iter().map(|leaf| leaf.gfn.0).collect()
        };
        assert_eq!(gfns(0, 4), [0, 3]);
        assert_eq!(gfns(4, 508), [4, 511]);
        assert_eq!(gfns(5, 506), []);
        assert_eq!(gfns(700, 1), [512], "a huge leaf whole");
        assert_eq!(gfns(0, 0), []);
        assert_eq!(gfns(u64::MAX - 1, 10), [], "beyond the format");
        let nowhere = rig.mmu.space(9).leaves(EVERYTHING);
        assert_eq!(nowhere.count(), 0, "no such address space");
    });
}

/// Whoever lists a large guest holds up no grace period: what is done inside is bounded.
#[test]
fn a_batch_is_bounded_and_batches_are_the_whole() {
    each(|rig| {
        let range = GfnRange::new(Gfn(0), PAGES);
        rig.mmu
            .prefault(&mut rig.vcpu, range, Level::SIZE_4K)
            .unwrap();
        // So that batches do not end with tables.
        const HOLE: u64 = 7;
        let hole = GfnRange::new(Gfn(100), HOLE);
        assert!(rig.mmu.space(0).zap_gfn_range(hole));
        let (mut rest, mut all, mut batches) = (EVERYTHING, vec![], 0);
        while !rest.is_empty() {
            let batch = rig.mmu.space(0).leaf_batch(rest);
            assert!(batch.leaves.len() <= 512);
            assert!(batch.rest.pages() < rest.pages(), "it goes on");
            all.extend(batch.leaves);
            (rest, batches) = (batch.rest, batches + 1);
        }
        assert!((8..16).contains(&batches), "{batches}");
        assert_eq!(all.len() as u64, PAGES - HOLE);
        assert_eq!(all, rig.list(EVERYTHING));
    });
}

#[test]
fn between_batches_the_mmu_may_be_called() {
    each(|rig| {
        let range = GfnRange::new(Gfn(0), PAGES);
        rig.mmu
            .prefault(&mut rig.vcpu, range, Level::SIZE_4K)
            .unwrap();
        let mut listed = 0;
        for leaf in rig.mmu.space(0).leaves(EVERYTHING) {
            listed += 1;
            // What is ahead beyond the batch goes, with its tables.
            let ahead = GfnRange::new(Gfn(leaf.gfn.0 + 1024), 512);
            rig.mmu.space(0).zap_gfn_range(ahead);
        }
        assert!((512..PAGES).contains(&listed), "{listed}");
        assert_eq!(rig.mmu.stats().tables_retired, 0);
    });
}

#[test]
fn a_list_beside_changes_holds_only_what_was_mapped() {
    for stage in GuestStage::ALL {
        let rig = Rig::new(stage);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut vcpu = rig.mmu.vcpu();
                for round in 0..30 {
                    let level = if round % 2 == 0 {
                        Level::SIZE_2M
                    } else {
                        Level::SIZE_4K
                    };
                    for gfn in (0..PAGES).step_by(256) {
                        let fault = Fault::new(Gfn(gfn), Access::Write).with_max_level(level);
                        let _outcome = rig.mmu.fault(&mut vcpu, fault);
                    }
                    match round % 3 {
                        0 => rig.mmu.zap_all(),
                        _ => {
                            rig.mmu
                                .space(0)
                                .zap_gfn_range(GfnRange::new(Gfn(512), 1024));
                        }
                    }
                }
                done.store(true, Relaxed);
            });
            while !done.load(Relaxed) {
                let mut end = 0;
                for leaf in rig.mmu.space(0).leaves(GfnRange::new(Gfn(0), PAGES)) {
                    assert_eq!(leaf.leaf.pfn.0, HOST + leaf.gfn.0, "{leaf:?}");
                    let found = found(&leaf);
                    assert!(found.gfn + found.pages > end, "never backwards");
                    end = found.gfn + found.pages;
                }
            }
        });
    }
}
