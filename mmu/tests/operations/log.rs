//! The dirty log, write protection and ageing.

use super::*;

#[test]
fn a_huge_leaf_is_split_when_logging_begins_and_recovered_in_place_when_it_ends() {
    each(|rig| {
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        assert_eq!(rig.touch(BASE.0, Access::Write), spurious(Level::SIZE_2M));
        assert_eq!(rig.flushed(), []);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let logged = (range(SLOT.0, SLOT.1), FlushCause::DirtyLog);
        assert_eq!(rig.flushed(), [logged]);
        assert_eq!(rig.pages(), (512, 0));
        assert_eq!(rig.touch(BASE.0, Access::Read), spurious(Level::SIZE_4K));
        if rig.protects() {
            assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_4K));
        }
        assert!(rig.run(BASE.0, Access::Write).writable);
        assert_eq!(rig.mmu.space(0).dirty_pages(0), Ok(1));
        assert_eq!(rig.flushed(), []);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
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
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(rig.pages(), (0, 1));
        assert!(!rig.mmu.space(0).translate(BASE).unwrap().writable);
        assert_eq!(rig.touch(BASE.0, Access::Read), spurious(Level::SIZE_2M));
        assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_4K));
        assert_eq!(rig.pages(), (512, 0));
        assert!(
            !rig.mmu
                .space(0)
                .translate(Gfn(BASE.0 + 1))
                .unwrap()
                .writable
        );
        assert_eq!(rig.mmu.space(0).dirty_pages(0), Ok(1));
    });
}

#[test]
fn a_huge_leaf_that_is_logged_is_not_made_writable_by_the_fast_path() {
    each_with(MmuConfig::default().with_eager_split(false), |rig| {
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let fault = Fault::new(Gfn(BASE.0 + 9), Access::Write).with_present();
        assert_eq!(rig.fault(fault), fixed(Level::SIZE_4K));
        assert_eq!(rig.mmu.stats().faults_fast, 0);
        assert!(!rig.mmu.space(0).translate(BASE).unwrap().writable);
    });
}

#[test]
fn logging_that_starts_with_all_bits_set_splits_and_protects_as_they_are_cleared() {
    let config = MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet);
    each_with(config, |rig| {
        rig.run(BASE.0, Access::Write);
        rig.run(BASE.0 + 512, Access::Write);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!((rig.pages(), rig.flushed()), ((0, 2), vec![]));
        assert_eq!(rig.mmu.space(0).dirty_pages(0), Ok(PAGES));
        assert!(rig.mmu.space(0).translate(BASE).unwrap().writable);
        // One word: one huge page is split, the other stays.
        assert_eq!(rig.mmu.space(0).clear_dirty_log(0, 0, 64, &[0b11]), Ok(2));
        assert_eq!(rig.flushed(), [(range(BASE.0, 2), FlushCause::DirtyLog)]);
        assert_eq!(rig.pages(), (512, 1));
        let after = rig.mmu.space(0).translate(BASE).unwrap();
        assert!(if rig.protects() {
            !after.writable
        } else {
            !after.dirty
        });
        let beside = rig.mmu.space(0).translate(Gfn(BASE.0 + 2)).unwrap();
        assert!(beside.writable && beside.dirty, "its bit is still set");
        rig.run(BASE.0, Access::Write);
        assert_eq!(rig.mmu.space(0).dirty_pages(0), Ok(PAGES - 1));
    });
}

#[test]
fn a_word_that_crosses_huge_pages_splits_both() {
    let config = MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet);
    each_with(config, |rig| {
        // A slot whose words are not aligned to huge pages: word 7 covers frames 480..544 of the
        // two.
        let spec = SlotSpec::new(1, Gfn(0x1_0000 - 32), 1088, Pfn(0x30_0000 - 32));
        rig.mmu.create_slot(spec).unwrap();
        for gfn in [0x1_0000, 0x1_0200] {
            assert_eq!(rig.touch(gfn, Access::Write), fixed(Level::SIZE_2M));
        }
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(rig.pages(), (0, 2));
        assert_eq!(
            rig.mmu.space(0).clear_dirty_log(1, 512, 64, &[u64::MAX]),
            Ok(64)
        );
        assert_eq!(rig.pages(), (1024, 0));
    });
}

#[test]
fn enabling_the_log_flushes_even_if_nothing_is_mapped() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(
            rig.flushed(),
            [(range(SLOT.0, SLOT.1), FlushCause::DirtyLog)]
        );
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn clearing_the_log_checks_its_arguments_and_clears_only_what_was_asked() {
    each(|rig| {
        let not = Err(DirtyLogError::NotLogging { id: 0 });
        assert_eq!(rig.mmu.space(0).clear_dirty_log(0, 0, 64, &[1]), not);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let clear =
            |first, pages, bits: &[u64]| rig.mmu.space(0).clear_dirty_log(0, first, pages, bits);
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
            rig.mmu.space(0).get_dirty_log(9, &mut []),
            Err(DirtyLogError::UnknownSlot { id: 9 })
        );
        rig.flushed();
        for page in [64, 65] {
            rig.run(BASE.0 + page, Access::Write);
        }
        // Page 70 is clean: asking for it neither protects nor flushes it.
        let clear =
            |first, pages, bits: &[u64]| rig.mmu.space(0).clear_dirty_log(0, first, pages, bits);
        assert_eq!(clear(64, 64, &[1 << 1 | 1 << 6]), Ok(1));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0 + 65, 1), FlushCause::DirtyLog)]
        );
        let hit = |page| rig.mmu.space(0).translate(Gfn(BASE.0 + page)).unwrap();
        assert!(hit(64).writable && hit(64).dirty);
        assert!(if rig.protects() {
            !hit(65).writable
        } else {
            !hit(65).dirty
        });
        let mut bitmap = [0; 32];
        rig.mmu.space(0).get_dirty_log(0, &mut bitmap).unwrap();
        assert_eq!(bitmap[1], 1);
        assert_eq!(clear(64, 64, &[1 << 1]), Ok(0));
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn a_harvest_adds_to_the_bitmap_and_flushes_what_it_took() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        for page in [3, 1000] {
            rig.run(BASE.0 + page, Access::Write);
        }
        rig.flushed();
        let mut bitmap = [1 << 60; 32];
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(2));
        assert_eq!((bitmap[0], bitmap[1]), (1 << 60 | 1 << 3, 1 << 60));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0 + 3, 998), FlushCause::DirtyLog)]
        );
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(0));
        assert_eq!(rig.flushed(), [], "nothing was taken");
        assert_eq!(
            rig.mmu.space(0).harvest_dirty_log(0, &mut [0; 31]),
            Err(DirtyLogError::BitmapTooShort {
                needed: 32,
                got: 31
            })
        );
        assert_eq!(
            rig.mmu
                .space(0)
                .mark_dirty(GfnRange::new(Gfn(BASE.0 - 5), 9)),
            4
        );
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(4));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0, 4), FlushCause::DirtyLog)],
            "owed for every bit taken, whatever the entry says"
        );
    });
}

#[test]
fn ageing_ends_with_a_fault_where_hardware_does_not_set_accessed() {
    each(|rig| {
        let pages = GfnRange::new(BASE, 512);
        assert_eq!(rig.touch(BASE.0, Access::Read), fixed(Level::SIZE_2M));
        assert!(rig.mmu.space(0).test_age(pages));
        assert!(rig.mmu.space(0).age(pages));
        assert!(!rig.mmu.space(0).age(pages) && !rig.mmu.space(0).test_age(pages));
        match rig.stage.info().ad_policy {
            AdPolicy::Hardware => {
                assert!(rig.mmu.access(&mut rig.vcpu, BASE, Access::Read).is_ok());
            }
            AdPolicy::SetAtInstall | AdPolicy::AccessTracking => {
                let root = rig.mmu.space(0).root().unwrap().pfn;
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
        assert!(rig.mmu.space(0).test_age(pages));
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
        assert!(rig.mmu.space(0).age(GfnRange::new(BASE, 512)));
        assert!(!rig.mmu.space(0).test_age(GfnRange::new(BASE, 512)));
        assert!(
            rig.mmu
                .space(0)
                .test_age(GfnRange::new(Gfn(BASE.0 + 500), 13))
        );
        assert!(!rig.mmu.space(0).age(GfnRange::new(BASE, 0)));
        assert!(rig.mmu.space(0).age(GfnRange::new(Gfn(0), u64::MAX)));
    });
}

#[test]
fn write_protecting_a_frame_flushes_even_if_it_had_lost_w() {
    each(|rig| {
        assert!(!rig.mmu.space(0).write_protect_gfn(BASE, Level::SIZE_4K));
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.run(BASE.0, Access::Write);
        let mut bitmap = [0; 32];
        rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap).unwrap();
        rig.flushed();
        assert!(
            !rig.mmu.space(0).write_protect_gfn(BASE, Level::SIZE_2M),
            "too fine"
        );
        assert!(rig.mmu.space(0).write_protect_gfn(BASE, Level::SIZE_4K));
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0, 1), FlushCause::WriteProtect)]
        );
        assert!(!rig.mmu.space(0).write_protect_gfn(BASE, Level::SIZE_4K));
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
