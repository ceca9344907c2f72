//! Single operations with the flushes they ask for, on every format.
//!
//! *Rig*: one MMU with one slot of 2048 pages, aligned to huge pages on both sides, one vCPU, and a host that records flushes.

mod common;

use std::sync::Arc;

use common::Recorder;
use slat_arch::GuestStage;
use slat_mmu::{
    Access, AdPolicy, Arena, DirtyLogError, DirtyLogPolicy, DirtyLogStart, Fault, FaultOutcome,
    Flush, FlushCause, Gfn, GfnRange, Level, MmuConfig, Pfn, PrefaultError, SecondStage, SlotError,
    SlotFlags, SlotSpec, Translation, Vcpu, WalkFault,
};

const BASE: Gfn = Gfn(1024);
const PAGES: u64 = 2048;
const HOST: Pfn = Pfn(0x20_0000);

struct Rig {
    stage: GuestStage,
    arena: Arc<Arena>,
    host: Arc<Recorder>,
    mmu: Box<dyn SecondStage>,
    vcpu: Vcpu,
}

fn each_with(config: MmuConfig, test: impl Fn(&mut Rig)) {
    for stage in GuestStage::ALL {
        let arena = Arc::new(Arena::new(Pfn(0x1000), 768));
        let host = Arc::new(Recorder::default());
        let mmu = stage.build(Arc::clone(&arena), Arc::clone(&host), config);
        mmu.create_slot(SlotSpec::new(0, BASE, PAGES, HOST))
            .unwrap();
        let vcpu = mmu.vcpu();
        println!("{stage}");
        test(&mut Rig {
            stage,
            arena,
            host,
            mmu,
            vcpu,
        });
    }
}

fn each(test: impl Fn(&mut Rig)) {
    each_with(MmuConfig::default(), test);
}

impl Rig {
    fn fault(&mut self, fault: Fault) -> FaultOutcome {
        self.mmu.fault(&mut self.vcpu, fault)
    }

    fn touch(&mut self, gfn: u64, access: Access) -> FaultOutcome {
        self.fault(Fault::new(Gfn(gfn), access))
    }

    /// What a vCPU does: walks, and faults until the walk succeeds.
    fn run(&mut self, gfn: u64, access: Access) -> Translation {
        for _ in 0..4 {
            match self.mmu.access(&mut self.vcpu, Gfn(gfn), access) {
                Ok(to) => return to,
                Err(fault) => {
                    let present = matches!(fault, WalkFault::Permission | WalkFault::AccessedDirty);
                    let mut fault = Fault::new(Gfn(gfn), access);
                    fault.present = present;
                    let outcome = self.fault(fault);
                    assert!(
                        matches!(
                            outcome,
                            FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. }
                        ),
                        "{outcome:?}"
                    );
                }
            }
        }
        panic!("{:#x} cannot be used", gfn);
    }

    fn pages(&self) -> (i64, i64) {
        let stats = self.mmu.stats();
        (
            stats.pages_at(Level::SIZE_4K),
            stats.pages_at(Level::SIZE_2M),
        )
    }

    /// Whether a page that lost its bit to the log faults at the next write.
    fn protects(&self) -> bool {
        self.stage.info().dirty_log == DirtyLogPolicy::WriteProtect
    }

    fn flushed(&self) -> Vec<(Flush, FlushCause)> {
        self.host.take()
    }
}

fn range(gfn: u64, pages: u64) -> Flush {
    Flush::Range {
        gfn: Gfn(gfn),
        pages,
    }
}

const fn fixed(level: Level) -> FaultOutcome {
    FaultOutcome::Fixed { level }
}

const fn spurious(level: Level) -> FaultOutcome {
    FaultOutcome::Spurious { level }
}

const SLOT: (u64, u64) = (BASE.0, PAGES);

#[test]
fn a_huge_leaf_is_split_when_logging_begins_and_recovered_in_place_when_it_ends() {
    each(|rig| {
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        assert_eq!(rig.touch(BASE.0, Access::Write), spurious(Level::SIZE_2M));
        assert_eq!(rig.flushed(), []);
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        let logged = (range(SLOT.0, SLOT.1), FlushCause::DirtyLog);
        assert_eq!(rig.flushed(), [logged]);
        assert_eq!(rig.pages(), (512, 0));
        assert_eq!(rig.touch(BASE.0, Access::Read), spurious(Level::SIZE_4K));
        if rig.protects() {
            assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_4K));
        }
        assert!(rig.run(BASE.0, Access::Write).writable);
        assert_eq!(rig.mmu.dirty_pages(0), Ok(1));
        assert_eq!(rig.flushed(), []);
        rig.mmu.set_slot_flags(0, SlotFlags::empty()).unwrap();
        let recovered = (range(BASE.0, 512), FlushCause::HugePage);
        assert_eq!(rig.flushed(), [recovered]);
        assert_eq!(rig.pages(), (0, 1));
        assert_eq!(
            rig.touch(BASE.0 + 1, Access::Write),
            spurious(Level::SIZE_2M)
        );
        let stats = rig.mmu.stats();
        assert_eq!((stats.splits, stats.recovered), (1, 1));
    });
}

#[test]
fn without_eager_splitting_the_first_write_splits() {
    each_with(MmuConfig::default().with_eager_split(false), |rig| {
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(rig.pages(), (0, 1));
        assert!(!rig.mmu.translate(BASE).unwrap().writable);
        assert_eq!(rig.touch(BASE.0, Access::Read), spurious(Level::SIZE_2M));
        assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_4K));
        assert_eq!(rig.pages(), (512, 0));
        assert!(!rig.mmu.translate(Gfn(BASE.0 + 1)).unwrap().writable);
        assert_eq!(rig.mmu.dirty_pages(0), Ok(1));
    });
}

#[test]
fn a_huge_leaf_that_is_logged_is_not_made_writable_by_the_fast_path() {
    each_with(MmuConfig::default().with_eager_split(false), |rig| {
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        let fault = Fault::new(Gfn(BASE.0 + 9), Access::Write).with_present();
        assert_eq!(rig.fault(fault), fixed(Level::SIZE_4K));
        assert_eq!(rig.mmu.stats().faults_fast, 0);
        assert!(!rig.mmu.translate(BASE).unwrap().writable);
    });
}

#[test]
fn logging_that_starts_with_all_bits_set_splits_and_protects_as_they_are_cleared() {
    let config = MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet);
    each_with(config, |rig| {
        rig.run(BASE.0, Access::Write);
        rig.run(BASE.0 + 512, Access::Write);
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!((rig.pages(), rig.flushed()), ((0, 2), vec![]));
        assert_eq!(rig.mmu.dirty_pages(0), Ok(PAGES));
        assert!(rig.mmu.translate(BASE).unwrap().writable);
        // One word: one huge page is split, the other stays.
        assert_eq!(rig.mmu.clear_dirty_log(0, 0, 64, &[0b11]), Ok(2));
        assert_eq!(rig.flushed(), [(range(BASE.0, 2), FlushCause::DirtyLog)]);
        assert_eq!(rig.pages(), (512, 1));
        let after = rig.mmu.translate(BASE).unwrap();
        assert!(if rig.protects() {
            !after.writable
        } else {
            !after.dirty
        });
        let beside = rig.mmu.translate(Gfn(BASE.0 + 2)).unwrap();
        assert!(beside.writable && beside.dirty, "its bit is still set");
        rig.run(BASE.0, Access::Write);
        assert_eq!(rig.mmu.dirty_pages(0), Ok(PAGES - 1));
    });
}

#[test]
fn a_word_that_crosses_huge_pages_splits_both() {
    let config = MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet);
    each_with(config, |rig| {
        // A slot whose words are not aligned to huge pages: word 7 covers frames 480..544 of the two.
        let spec = SlotSpec::new(1, Gfn(0x1_0000 - 32), 1088, Pfn(0x30_0000 - 32));
        rig.mmu.create_slot(spec).unwrap();
        for gfn in [0x1_0000, 0x1_0200] {
            assert_eq!(rig.touch(gfn, Access::Write), fixed(Level::SIZE_2M));
        }
        rig.mmu.set_slot_flags(1, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(rig.pages(), (0, 2));
        assert_eq!(rig.mmu.clear_dirty_log(1, 512, 64, &[u64::MAX]), Ok(64));
        assert_eq!(rig.pages(), (1024, 0));
    });
}

#[test]
fn enabling_the_log_flushes_even_if_nothing_is_mapped() {
    each(|rig| {
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(
            rig.flushed(),
            [(range(SLOT.0, SLOT.1), FlushCause::DirtyLog)]
        );
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn deleting_a_slot_unmaps_it_and_flushes_what_was_mapped() {
    each(|rig| {
        rig.run(BASE.0 + 600, Access::Write);
        rig.mmu.delete_slot(0).unwrap();
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0 + 512, 512), FlushCause::Slot)]
        );
        assert_eq!((rig.pages(), rig.mmu.slots()), ((0, 0), vec![]));
        assert_eq!(rig.mmu.delete_slot(0), Err(SlotError::UnknownId { id: 0 }));
        assert_eq!(rig.touch(BASE.0, Access::Read), FaultOutcome::NoSlot);
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn deleting_a_slot_that_was_never_touched_flushes_nothing() {
    each(|rig| {
        rig.mmu.delete_slot(0).unwrap();
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn a_moved_slot_takes_its_log_along_and_leaves_nothing_behind() {
    each(|rig| {
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        rig.run(BASE.0 + 5, Access::Write);
        rig.flushed();
        let seq = rig.mmu.invalidate_seq();
        rig.mmu.move_slot(0, Gfn(0x8000)).unwrap();
        assert_eq!(rig.flushed(), [(range(BASE.0 + 5, 1), FlushCause::Slot)]);
        assert_eq!(rig.touch(BASE.0 + 5, Access::Read), FaultOutcome::NoSlot);
        let stale = Fault::new(Gfn(0x8005), Access::Read).with_seq(seq);
        assert_eq!(rig.fault(stale), FaultOutcome::Retry);
        assert_eq!(rig.run(0x8005, Access::Read).pfn, Pfn(HOST.0 + 5));
        let mut bitmap = [0; 32];
        assert_eq!(rig.mmu.harvest_dirty_log(0, &mut bitmap), Ok(1));
        assert_eq!(bitmap[0], 1 << 5);
        assert!(matches!(
            rig.mmu.move_slot(0, rig.stage.info().max_gfn),
            Err(SlotError::BeyondFormat { .. } | SlotError::Wraps { .. })
        ));
        assert_eq!(rig.mmu.move_slot(0, Gfn(0x8000)), Ok(()));
    });
}

#[test]
fn zapping_part_of_a_huge_leaf_flushes_all_of_it() {
    each(|rig| {
        assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_2M));
        assert!(rig.mmu.zap_gfn_range(GfnRange::new(Gfn(BASE.0 + 7), 1)));
        assert_eq!(rig.flushed(), [(range(BASE.0, 512), FlushCause::Unmap)]);
        assert!(rig.mmu.translate(Gfn(BASE.0 + 300)).is_none());
        assert!(!rig.mmu.zap_gfn_range(GfnRange::new(Gfn(0), u64::MAX)));
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn clearing_the_log_checks_its_arguments_and_clears_only_what_was_asked() {
    each(|rig| {
        let not = Err(DirtyLogError::NotLogging { id: 0 });
        assert_eq!(rig.mmu.clear_dirty_log(0, 0, 64, &[1]), not);
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        let clear = |first, pages, bits: &[u64]| rig.mmu.clear_dirty_log(0, first, pages, bits);
        let unaligned = |result| matches!(result, Err(DirtyLogError::Unaligned { .. }));
        let outside = |result| matches!(result, Err(DirtyLogError::OutOfSlot { .. }));
        assert!(unaligned(clear(1, 64, &[1])));
        assert!(unaligned(clear(0, 63, &[1])));
        assert!(outside(clear(0, PAGES + 64, &[1; 64])));
        assert!(outside(clear(64, u64::MAX - 63, &[1])));
        assert_eq!(
            clear(0, 128, &[1]),
            Err(DirtyLogError::BitmapTooShort { needed: 2, got: 1 })
        );
        assert_eq!(
            rig.mmu.get_dirty_log(9, &mut []),
            Err(DirtyLogError::UnknownSlot { id: 9 })
        );
        rig.flushed();
        for page in [64, 65] {
            rig.run(BASE.0 + page, Access::Write);
        }
        // Page 70 is clean: asking for it neither protects nor flushes it.
        let clear = |first, pages, bits: &[u64]| rig.mmu.clear_dirty_log(0, first, pages, bits);
        assert_eq!(clear(64, 64, &[1 << 1 | 1 << 6]), Ok(1));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0 + 65, 1), FlushCause::DirtyLog)]
        );
        let hit = |page| rig.mmu.translate(Gfn(BASE.0 + page)).unwrap();
        assert!(hit(64).writable && hit(64).dirty);
        assert!(if rig.protects() {
            !hit(65).writable
        } else {
            !hit(65).dirty
        });
        let mut bitmap = [0; 32];
        rig.mmu.get_dirty_log(0, &mut bitmap).unwrap();
        assert_eq!(bitmap[1], 1);
        assert_eq!(clear(64, 64, &[1 << 1]), Ok(0));
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn a_harvest_adds_to_the_bitmap_and_flushes_what_it_took() {
    each(|rig| {
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        for page in [3, 1000] {
            rig.run(BASE.0 + page, Access::Write);
        }
        rig.flushed();
        let mut bitmap = [1 << 60; 32];
        assert_eq!(rig.mmu.harvest_dirty_log(0, &mut bitmap), Ok(2));
        assert_eq!((bitmap[0], bitmap[1]), (1 << 60 | 1 << 3, 1 << 60));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0 + 3, 998), FlushCause::DirtyLog)]
        );
        assert_eq!(rig.mmu.harvest_dirty_log(0, &mut bitmap), Ok(0));
        assert_eq!(rig.flushed(), [], "nothing was taken");
        assert_eq!(
            rig.mmu.harvest_dirty_log(0, &mut [0; 31]),
            Err(DirtyLogError::BitmapTooShort {
                needed: 32,
                got: 31
            })
        );
        assert_eq!(rig.mmu.mark_dirty(GfnRange::new(Gfn(BASE.0 - 5), 9)), 4);
        assert_eq!(rig.mmu.harvest_dirty_log(0, &mut bitmap), Ok(4));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0, 4), FlushCause::DirtyLog)],
            "owed for every bit taken, whatever the entry says"
        );
    });
}

#[test]
fn a_read_only_slot_is_never_writable() {
    each(|rig| {
        let spec = SlotSpec::new(1, Gfn(0), 512, Pfn(0)).with_flags(SlotFlags::READONLY);
        rig.mmu.create_slot(spec).unwrap();
        assert_eq!(rig.touch(1, Access::Write), FaultOutcome::ReadOnly);
        assert_eq!(rig.touch(1, Access::Read), fixed(Level::SIZE_2M));
        let access = |rig: &mut Rig| rig.mmu.access(&mut rig.vcpu, Gfn(1), Access::Write);
        assert_eq!(access(rig), Err(WalkFault::Permission));
        let fast = Fault::new(Gfn(1), Access::Write).with_present();
        assert_eq!(rig.fault(fast), FaultOutcome::ReadOnly);
        assert_eq!(
            rig.mmu.set_slot_flags(1, SlotFlags::empty()),
            Err(SlotError::ReadOnlyIsFixed { id: 1 })
        );
        // Logged as well, its pages stay as they are and the log stays empty.
        let both = SlotFlags::READONLY | SlotFlags::LOG_DIRTY;
        rig.mmu.set_slot_flags(1, both).unwrap();
        assert_eq!(rig.touch(2, Access::Write), FaultOutcome::ReadOnly);
        assert_eq!(rig.mmu.dirty_pages(1), Ok(0));
        rig.mmu.set_slot_flags(1, SlotFlags::READONLY).unwrap();
        assert_eq!(access(rig), Err(WalkFault::Permission));
    });
}

#[test]
fn ageing_ends_with_a_fault_where_hardware_does_not_set_accessed() {
    each(|rig| {
        let pages = GfnRange::new(BASE, 512);
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        assert!(rig.mmu.test_age(pages));
        assert!(rig.mmu.age(pages));
        assert!(!rig.mmu.age(pages) && !rig.mmu.test_age(pages));
        match rig.stage.info().ad_policy {
            AdPolicy::Hardware => {
                assert!(rig.mmu.access(&mut rig.vcpu, BASE, Access::Read).is_ok());
            }
            AdPolicy::SetAtInstall | AdPolicy::AccessTracking => {
                let root = rig.mmu.root().unwrap().pfn;
                let seen = common::hardware_walk(rig.stage, &rig.arena, root, BASE.0);
                assert!(
                    seen.is_none_or(|leaf| !leaf.readable),
                    "the next use faults"
                );
                assert_eq!(
                    rig.mmu.access(&mut rig.vcpu, BASE, Access::Read),
                    Err(WalkFault::AccessedDirty)
                );
                let fast = Fault::new(BASE, Access::Read).with_present();
                assert_eq!(rig.fault(fast), fixed(Level::SIZE_2M));
                assert_eq!(rig.mmu.stats().faults_fast, 1);
                assert!(rig.mmu.access(&mut rig.vcpu, BASE, Access::Read).is_ok());
            }
        }
        assert!(rig.mmu.test_age(pages));
        assert_eq!(rig.flushed(), [], "idle is a hint");
        assert_eq!(rig.run(BASE.0, Access::Write).pfn, HOST);
    });
}

#[test]
fn ageing_sees_the_last_page_of_the_range_and_none_beside_it() {
    each_with(MmuConfig::default().with_max_level(Level::SIZE_4K), |rig| {
        for page in [0, 511, 512] {
            rig.run(BASE.0 + page, Access::Read);
        }
        assert!(rig.mmu.age(GfnRange::new(BASE, 512)));
        assert!(!rig.mmu.test_age(GfnRange::new(BASE, 512)));
        assert!(rig.mmu.test_age(GfnRange::new(Gfn(BASE.0 + 500), 13)));
        assert!(!rig.mmu.age(GfnRange::new(BASE, 0)));
        assert!(rig.mmu.age(GfnRange::new(Gfn(0), u64::MAX)));
    });
}

#[test]
fn a_prefetch_maps_but_is_no_use_and_no_fault() {
    each(|rig| {
        assert_eq!(rig.fault(Fault::prefetch(BASE)), fixed(Level::SIZE_2M));
        assert_eq!(rig.fault(Fault::prefetch(BASE)), spurious(Level::SIZE_2M));
        let stats = rig.mmu.stats();
        assert_eq!((stats.faults_taken, stats.faults_fixed), (0, 0));
        assert_eq!(stats.prefetched, 1);
        assert_eq!(
            rig.mmu.test_age(GfnRange::new(BASE, 1)),
            rig.stage.info().ad_policy != AdPolicy::Hardware
        );
    });
}

#[test]
fn a_prefetch_leaves_a_better_mapping_alone() {
    each(|rig| {
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        let before = rig.run(BASE.0, Access::Write);
        assert_eq!(rig.fault(Fault::prefetch(BASE)), spurious(Level::SIZE_4K));
        assert_eq!(
            rig.mmu
                .prefault(&mut rig.vcpu, GfnRange::new(BASE, 8), Level::SIZE_4K),
            Ok(8)
        );
        assert_eq!(rig.mmu.translate(BASE), Some(before));
        assert_eq!(rig.mmu.dirty_pages(0), Ok(1), "nothing else was written");
    });
}

#[test]
fn prefault_stops_where_the_memory_stops_and_says_how_far_it_got() {
    each(|rig| {
        let over = GfnRange::new(Gfn(BASE.0 + PAGES - 3), 5);
        let end = Gfn(BASE.0 + PAGES);
        assert_eq!(
            rig.mmu.prefault(&mut rig.vcpu, over, Level::SIZE_4K),
            Err(PrefaultError::NoSlot { gfn: end, done: 3 })
        );
        assert_eq!(rig.pages().0, 3);
        let token = rig.mmu.invalidate_begin(GfnRange::new(Gfn(BASE.0 + 2), 1));
        let result = rig
            .mmu
            .prefault(&mut rig.vcpu, GfnRange::new(BASE, 4), Level::SIZE_4K);
        assert_eq!(
            result,
            Err(PrefaultError::Again {
                gfn: Gfn(BASE.0 + 2),
                done: 2
            })
        );
        assert_eq!(result.unwrap_err().done(), 2);
        rig.mmu.invalidate_end(token);
        // Huge where it may be.
        let all = GfnRange::new(BASE, PAGES);
        assert_eq!(
            rig.mmu.prefault(&mut rig.vcpu, all, Level::SIZE_256T),
            Ok(PAGES)
        );
        assert_eq!(rig.pages(), (0, 4));
        assert_eq!(
            rig.mmu
                .prefault(&mut rig.vcpu, GfnRange::new(Gfn(0), 0), Level::SIZE_4K),
            Ok(0)
        );
    });
}

#[test]
fn the_format_bounds_guest_frames() {
    each(|rig| {
        let max = rig.stage.info().max_gfn;
        let access = |rig: &mut Rig| rig.mmu.access(&mut rig.vcpu, max, Access::Read);
        assert_eq!(rig.touch(max.0, Access::Read), FaultOutcome::OutOfRange);
        assert_eq!(rig.touch(u64::MAX, Access::Read), FaultOutcome::OutOfRange);
        assert_eq!(access(rig), Err(WalkFault::NotPresent));
        assert_eq!(rig.mmu.walk(max).last(), None);
        assert_eq!(rig.mmu.translate(max), None);
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(max.0 - 1), 1, HOST))
            .unwrap();
        assert_eq!(rig.touch(max.0 - 1, Access::Write), fixed(Level::SIZE_4K));
        let spec = SlotSpec::new(2, Gfn(max.0 - 1), 2, HOST);
        assert!(matches!(
            rig.mmu.create_slot(spec),
            Err(SlotError::BeyondFormat { .. })
        ));
        assert!(rig.mmu.age(GfnRange::new(Gfn(max.0 - 1), u64::MAX)));
        assert!(
            rig.mmu
                .zap_gfn_range(GfnRange::new(Gfn(max.0 - 1), u64::MAX))
        );
    });
}

#[test]
fn a_gigabyte_is_mapped_at_once_if_everything_is_aligned() {
    each(|rig| {
        let huge = 1 << 18;
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(huge), 2 * huge, Pfn(4 * huge)))
            .unwrap();
        assert_eq!(rig.touch(huge + 5, Access::Write), fixed(Level::SIZE_1G));
        let last = |rig: &Rig| rig.mmu.translate(Gfn(2 * huge - 1)).unwrap().pfn;
        assert_eq!(last(rig), Pfn(5 * huge - 1));
        let first = GfnRange::new(Gfn(huge), 1);
        assert!(rig.mmu.split_huge_pages(first, Level::SIZE_2M));
        assert_eq!(rig.mmu.stats().pages[1..3], [512, 0]);
        assert!(rig.mmu.split_huge_pages(first, Level::SIZE_4K));
        assert_eq!(rig.mmu.stats().pages[..3], [512, 511, 0]);
        assert_eq!(last(rig), Pfn(5 * huge - 1));
        assert_eq!(
            rig.flushed(),
            [],
            "the same memory with the same permissions"
        );
        // On, off: a gigabyte again, in place.
        rig.mmu.set_slot_flags(1, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(rig.mmu.stats().pages[..3], [1 << 18, 0, 0]);
        rig.mmu.set_slot_flags(1, SlotFlags::empty()).unwrap();
        assert_eq!(rig.mmu.stats().pages[..3], [0, 0, 1]);
        assert_eq!(last(rig), Pfn(5 * huge - 1));
    });
}

#[test]
fn write_protecting_a_frame_flushes_even_if_it_had_lost_w() {
    each(|rig| {
        assert!(!rig.mmu.write_protect_gfn(BASE, Level::SIZE_4K));
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        rig.run(BASE.0, Access::Write);
        let mut bitmap = [0; 32];
        rig.mmu.harvest_dirty_log(0, &mut bitmap).unwrap();
        rig.flushed();
        assert!(!rig.mmu.write_protect_gfn(BASE, Level::SIZE_2M), "too fine");
        assert!(rig.mmu.write_protect_gfn(BASE, Level::SIZE_4K));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0, 1), FlushCause::WriteProtect)]
        );
        assert!(!rig.mmu.write_protect_gfn(BASE, Level::SIZE_4K));
        assert_eq!(rig.flushed(), []);
        let fast = Fault::new(BASE, Access::Write).with_present();
        assert_eq!(rig.fault(fast), fixed(Level::SIZE_4K));
        assert_eq!(
            rig.mmu.stats().faults_fast,
            0,
            "not the fast path's to give"
        );
    });
}

#[test]
fn a_fault_may_not_map_what_an_invalidation_takes() {
    each(|rig| {
        let seq = rig.mmu.invalidate_seq();
        rig.run(BASE.0, Access::Write);
        rig.flushed();
        let token = rig.mmu.invalidate_begin(GfnRange::new(Gfn(BASE.0 + 8), 8));
        assert_eq!(rig.flushed(), [(range(BASE.0, 512), FlushCause::Unmap)]);
        assert_eq!(token.range(), GfnRange::new(Gfn(BASE.0 + 8), 8));
        assert_eq!(rig.touch(BASE.0 + 15, Access::Write), FaultOutcome::Retry);
        // A neighbour may go on, but no leaf may reach into the range.
        rig.run(BASE.0 + 16, Access::Write);
        assert_eq!(rig.mmu.translate(Gfn(BASE.0 + 15)), None);
        assert_eq!(rig.mmu.translate(Gfn(BASE.0 + 8)), None);
        rig.mmu.invalidate_end(token);
        let stale = Fault::new(Gfn(BASE.0 + 8), Access::Read).with_seq(seq);
        assert_eq!(rig.fault(stale), FaultOutcome::Retry);
        let fresh = Fault::new(Gfn(BASE.0 + 8), Access::Read).with_seq(rig.mmu.invalidate_seq());
        assert_eq!(rig.fault(fresh), fixed(Level::SIZE_2M));
    });
}

#[test]
fn huge_pages_come_back_only_where_no_reason_forbids_them() {
    each(|rig| {
        let frame = GfnRange::new(Gfn(BASE.0 + 3), 1);
        rig.run(BASE.0, Access::Write);
        rig.mmu.forbid_huge_pages(0, frame, Level::SIZE_2M).unwrap();
        rig.mmu.forbid_huge_pages(0, frame, Level::SIZE_2M).unwrap();
        assert_eq!(rig.pages(), (512, 0));
        assert_eq!(
            rig.touch(BASE.0 + 9, Access::Write),
            spurious(Level::SIZE_4K)
        );
        rig.mmu.allow_huge_pages(0, frame, Level::SIZE_2M).unwrap();
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        rig.mmu.set_slot_flags(0, SlotFlags::empty()).unwrap();
        assert_eq!(rig.pages(), (512, 0), "one reason is left");
        rig.mmu.allow_huge_pages(0, frame, Level::SIZE_2M).unwrap();
        rig.flushed();
        assert_eq!(rig.touch(BASE.0 + 9, Access::Write), fixed(Level::SIZE_2M));
        assert_eq!(rig.flushed(), [(range(BASE.0, 512), FlushCause::HugePage)]);
        assert_eq!(
            rig.mmu.forbid_huge_pages(7, frame, Level::SIZE_2M),
            Err(SlotError::UnknownAddressSpace { as_id: 7 })
        );
    });
}

#[test]
fn withdrawn_roots_are_flushed_once_and_replaced() {
    each(|rig| {
        rig.run(BASE.0, Access::Write);
        let first = rig.mmu.load_root(&mut rig.vcpu).unwrap();
        rig.mmu.invalidate_roots();
        assert_eq!(rig.flushed(), [(Flush::All, FlushCause::Roots)]);
        rig.mmu.invalidate_roots();
        assert_eq!(rig.flushed(), [], "there is nothing to withdraw");
        let second = rig.mmu.load_root(&mut rig.vcpu).unwrap();
        assert!(second.pfn != first.pfn && second.generation > first.generation);
        assert_eq!(rig.pages(), (0, 1), "counted until it is zapped");
        rig.mmu.zap_invalidated_roots();
        assert_eq!((rig.pages(), rig.flushed()), ((0, 0), vec![]));
    });
}

#[test]
fn two_address_spaces_share_nothing() {
    each_with(MmuConfig::default().with_address_spaces(2), |rig| {
        let spec = SlotSpec::new(0, BASE, 8, Pfn(0x40_0000)).with_as_id(1);
        rig.mmu.create_slot(spec).unwrap();
        let mut other = rig.mmu.vcpu();
        other.set_as_id(1);
        rig.run(BASE.0, Access::Write);
        assert!(matches!(
            rig.mmu.access(&mut other, BASE, Access::Read),
            Err(WalkFault::NotPresent)
        ));
        let fault = Fault::new(BASE, Access::Read);
        assert_eq!(rig.mmu.fault(&mut other, fault), fixed(Level::SIZE_4K));
        let hit = rig.mmu.translate_in(1, BASE).unwrap();
        assert_eq!(hit.pfn, Pfn(0x40_0000));
        assert_eq!(rig.mmu.translate(BASE).unwrap().pfn, HOST);
        assert!(rig.mmu.zap_gfn_range_in(1, GfnRange::new(BASE, 8)));
        assert_eq!(rig.mmu.translate_in(1, BASE), None);
        assert!(rig.mmu.translate(BASE).is_some());
        other.set_as_id(2);
        assert_eq!(rig.mmu.fault(&mut other, fault), FaultOutcome::NoRoot);
        assert_eq!(rig.mmu.root_in(2), None);
        assert_eq!(
            rig.mmu.delete_slot_in(2, 0),
            Err(SlotError::UnknownAddressSpace { as_id: 2 })
        );
    });
}

#[test]
fn a_vcpu_of_another_mmu_is_served_all_the_same() {
    each(|rig| {
        let other = rig.stage.build(
            Arena::new(Pfn(0x9000), 64),
            slat_mmu::NoTlb,
            MmuConfig::default(),
        );
        other
            .create_slot(SlotSpec::new(0, BASE, 8, Pfn(64)))
            .unwrap();
        rig.run(BASE.0, Access::Read);
        let fault = Fault::new(BASE, Access::Read);
        assert_eq!(other.fault(&mut rig.vcpu, fault), fixed(Level::SIZE_4K));
        assert_eq!(
            other.access(&mut rig.vcpu, BASE, Access::Read),
            Err(WalkFault::NotPresent),
            "it runs on no root of this MMU"
        );
        assert_eq!(other.load_root(&mut rig.vcpu), None);
        assert_eq!(other.translate(BASE).unwrap().pfn, Pfn(64));
        other.zap_all();
        assert_eq!(other.stats().tables, 0);
    });
}

#[test]
fn flush_requests_are_counted_by_cause() {
    each(|rig| {
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        rig.run(BASE.0, Access::Write);
        rig.mmu.zap_all();
        let stats = rig.mmu.stats();
        assert_eq!((stats.flush_ranges(), stats.flush_alls()), (1, 1));
        let of = |cause: FlushCause| stats.flushes[cause as usize];
        let log = of(FlushCause::DirtyLog);
        assert_eq!(
            (log.cause, log.ranges, log.pages, log.alls),
            (FlushCause::DirtyLog, 1, PAGES, 0)
        );
        let roots = of(FlushCause::Roots);
        assert_eq!((roots.ranges, roots.pages, roots.alls), (0, 0, 1));
    });
}

#[test]
fn known_holes_are_remembered_until_slots_change() {
    each_with(MmuConfig::default().with_mmio_caching(true), |rig| {
        let hole = 7;
        assert_eq!(rig.touch(hole, Access::Read), FaultOutcome::NoSlot);
        let walk = |rig: &mut Rig| rig.mmu.access(&mut rig.vcpu, Gfn(hole), Access::Read);
        let caches = rig.stage.info().mmio_generation_bits > 0;
        let known = if caches {
            WalkFault::Mmio
        } else {
            WalkFault::NotPresent
        };
        assert_eq!(walk(rig), Err(known));
        assert_eq!(rig.mmu.stats().mmio_entries_created, u64::from(caches));
        assert_eq!(rig.mmu.translate(Gfn(hole)), None);
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(0), 8, Pfn(64)))
            .unwrap();
        assert_eq!(
            walk(rig),
            Err(WalkFault::NotPresent),
            "its generation is over"
        );
        assert_eq!(rig.run(hole, Access::Write).pfn, Pfn(71));
        rig.mmu.delete_slot(1).unwrap();
        assert_eq!(walk(rig), Err(WalkFault::NotPresent));
        assert_eq!(rig.touch(hole, Access::Write), FaultOutcome::NoSlot);
        assert_eq!(walk(rig), Err(known));
        // A hole under what becomes a huge page goes with its table.
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(0), 512, Pfn(512)))
            .unwrap();
        assert_eq!(rig.touch(3, Access::Read), fixed(Level::SIZE_2M));
        assert_eq!(rig.run(hole, Access::Read).pfn, Pfn(519));
    });
}

#[test]
fn no_huge_page_is_executable_where_the_mitigation_is_on() {
    each_with(MmuConfig::default().with_nx_huge_pages(true), |rig| {
        if !rig.stage.info().nx_huge_pages {
            assert!(rig.run(BASE.0, Access::Execute).executable);
            assert_eq!(rig.pages(), (0, 1), "{} does not need it", rig.stage);
            return;
        }
        assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_2M));
        assert!(!rig.mmu.translate(BASE).unwrap().executable);
        assert!(rig.run(BASE.0 + 4, Access::Execute).executable);
        assert_eq!((rig.pages(), rig.mmu.stats().nx_splits), ((512, 0), 1));
        // Data accesses do not make it huge again; the worker does.
        assert_eq!(
            rig.touch(BASE.0 + 5, Access::Write),
            spurious(Level::SIZE_4K)
        );
        rig.flushed();
        assert_eq!(rig.mmu.recover_nx_huge_pages(0), 0);
        rig.mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(
            rig.mmu.recover_nx_huge_pages(8),
            0,
            "it would only be split again"
        );
        rig.mmu.set_slot_flags(0, SlotFlags::empty()).unwrap();
        assert_eq!(rig.pages(), (512, 0), "its worker brings it back, not this");
        rig.flushed();
        assert_eq!(rig.mmu.recover_nx_huge_pages(8), 1);
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0, 512), FlushCause::NxRecovery)]
        );
        assert_eq!(rig.touch(BASE.0 + 5, Access::Write), fixed(Level::SIZE_2M));
        assert_eq!(rig.mmu.recover_nx_huge_pages(8), 0);
    });
}

#[test]
fn what_a_vcpu_leaves_behind_comes_back() {
    each(|rig| {
        rig.run(BASE.0, Access::Write);
        let mut other = rig.mmu.vcpu();
        let fault = Fault::new(BASE, Access::Write);
        assert_eq!(rig.mmu.fault(&mut other, fault), spurious(Level::SIZE_2M));
        drop(other);
        drop(std::mem::replace(&mut rig.vcpu, rig.mmu.vcpu()));
        rig.mmu.zap_all();
        let stats = rig.mmu.stats();
        assert_eq!((stats.tables, stats.roots, stats.pages), (0, 0, [0; 5]));
        assert_eq!(rig.arena.used_frames(), 0);
    });
}
