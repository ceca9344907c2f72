//! Statistics, device memory, bounds, slots and attributes: pitfalls 55 to 60.

use slat_mmu::{
    Access, Fault, FaultOutcome, Flush, FlushCause, Gfn, Level, MmuConfig, Pfn, SlotError,
    SlotFlags, SlotSpec, WalkFault,
};

use crate::rig::{GIGA, HUGE, each, each_with, range};

#[test]
fn page_counts_follow_splits_recoveries_and_zaps() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let counts = || rig.mmu.stats().pages;
        rig.map(&mut vcpu, 0, Access::Write, Level::SIZE_1G);
        assert_eq!(counts(), [0, 0, 1, 0, 0], "{}", rig.stage);
        assert_eq!(
            rig.mmu
                .space(0)
                .split_huge_pages(range(0, GIGA), Level::SIZE_2M),
            0
        );
        assert_eq!(counts(), [0, 512, 0, 0, 0], "{}", rig.stage);
        assert_eq!(
            rig.mmu
                .space(0)
                .split_huge_pages(range(3 * HUGE, 1), Level::SIZE_4K),
            0
        );
        assert_eq!(counts(), [512, 511, 0, 0, 0], "{}", rig.stage);
        rig.mmu.space(0).zap_gfn_range(range(3 * HUGE + 1, 10));
        assert_eq!(counts(), [502, 511, 0, 0, 0], "{}", rig.stage);
        // A table with leaves below becomes a leaf.
        rig.map(&mut vcpu, 3 * HUGE + 1, Access::Write, Level::SIZE_2M);
        assert_eq!(counts(), [0, 512, 0, 0, 0], "{}", rig.stage);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(counts(), [512 * 512, 0, 0, 0, 0], "{}", rig.stage);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
        assert_eq!(counts(), [0, 0, 1, 0, 0], "{}", rig.stage);
        drop(vcpu);
        rig.settled();
    });
}

/// Entries keep a part of the slots' generation. When that part comes round, what is older must be
/// gone.
#[test]
fn an_entry_for_a_hole_never_outlives_a_round_of_generations() {
    each_with(MmuConfig::default().with_mmio_caching(true), |rig| {
        let bits = rig.mmu.format().mmio_generation_bits;
        if bits == 0 {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        let hole = 2 * GIGA + 5;
        assert_eq!(
            rig.fault(&mut vcpu, hole, Access::Read),
            FaultOutcome::NoSlot
        );
        assert_eq!(
            rig.mmu.access(&mut vcpu, Gfn(hole), Access::Read),
            Err(WalkFault::Mmio),
            "{}",
            rig.stage
        );
        // A slot comes and goes elsewhere: three generations.
        for _ in 0..((1u64 << bits) - 6) / 3 {
            rig.slot(1, 4 * GIGA, 1);
            rig.mmu.space(0).delete_slot(1).unwrap();
        }
        // One by one over the place where the round ends.
        rig.slot(1, 4 * GIGA, 1);
        for step in 0..12 {
            let flags = if step % 2 == 0 {
                SlotFlags::LOG_DIRTY
            } else {
                SlotFlags::empty()
            };
            rig.mmu.space(0).set_slot_flags(1, flags).unwrap();
            let found = rig.mmu.access(&mut vcpu, Gfn(hole), Access::Read);
            assert_eq!(found, Err(WalkFault::NotPresent), "{}: {step}", rig.stage);
        }
    });
}

#[test]
fn frames_beyond_the_format_are_refused_everywhere() {
    each_with(MmuConfig::default().with_mmio_caching(true), |rig| {
        let top = rig.mmu.format().max_gfn.0;
        let mut vcpu = rig.mmu.vcpu();
        rig.touch_small(&mut vcpu, 5);
        let tables = rig.mmu.stats().tables;
        for gfn in [top, top + 5, u64::MAX] {
            assert_eq!(
                rig.fault(&mut vcpu, gfn, Access::Write),
                FaultOutcome::OutOfRange,
                "{}",
                rig.stage
            );
            assert_eq!(
                rig.mmu.access(&mut vcpu, Gfn(gfn), Access::Read),
                Err(WalkFault::NotPresent)
            );
            assert_eq!(
                rig.mmu.space(0).translate(Gfn(gfn)),
                None,
                "{}: an alias",
                rig.stage
            );
            assert!(rig.mmu.space(0).walk(Gfn(gfn)).last().is_none());
            assert!(!rig.mmu.space(0).write_protect_gfn(Gfn(gfn), Level::SIZE_4K));
        }
        let spec = SlotSpec::new(1, Gfn(top - 1), 2, Pfn(0));
        assert!(matches!(
            rig.mmu.create_slot(spec),
            Err(SlotError::BeyondFormat { .. })
        ));
        // Frame 5 is at `top + 5`, if the walk looks at the low bits alone.
        assert!(!rig.mmu.space(0).zap_gfn_range(range(top, top)));
        assert!(
            !rig.mmu.space(0).test_age(range(top, 64)) && !rig.mmu.space(0).age(range(top + 5, 1))
        );
        assert!(
            rig.mmu.space(0).translate(Gfn(5)).is_some(),
            "{}",
            rig.stage
        );
        assert_eq!(rig.mmu.stats().tables, tables, "{}", rig.stage);
    });
}

#[test]
fn nx_recovery_leaves_logged_slots_alone() {
    each_with(MmuConfig::default().with_nx_huge_pages(true), |rig| {
        if !rig.mmu.format().nx_huge_pages {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        rig.touch(&mut vcpu, 7, Access::Execute);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(
            rig.mmu.recover_nx_huge_pages(usize::MAX),
            0,
            "{}",
            rig.stage
        );
        assert!(
            rig.mmu.space(0).translate(Gfn(7)).is_some(),
            "{}",
            rig.stage
        );
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
        assert!(
            rig.mmu.recover_nx_huge_pages(usize::MAX) > 0,
            "{}",
            rig.stage
        );
    });
}

#[test]
fn nx_recovery_is_not_held_up_by_logged_slots() {
    each_with(MmuConfig::default().with_nx_huge_pages(true), |rig| {
        if !rig.mmu.format().nx_huge_pages {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        rig.slot(1, 2 * GIGA, GIGA);
        let at_most_2m = |gfn| Fault::new(Gfn(gfn), Access::Execute).with_max_level(Level::SIZE_2M);
        // Noted one by one, the logged slot's before and after the other's.
        for gfn in [0, 2 * GIGA, HUGE] {
            let outcome = rig.mmu.fault(&mut vcpu, at_most_2m(gfn));
            assert_eq!(
                outcome,
                FaultOutcome::Fixed {
                    level: Level::SIZE_4K
                }
            );
        }
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(rig.mmu.recover_nx_huge_pages(1), 1, "{}", rig.stage);
        assert!(
            rig.mmu.space(0).translate(Gfn(2 * GIGA)).is_none(),
            "{}",
            rig.stage
        );
        assert_eq!(rig.mmu.recover_nx_huge_pages(1), 0, "{}", rig.stage);
    });
}

/// Attributes that differ within a huge page forbid it, also where the range that differs is a part
/// of it.
#[test]
fn a_range_that_differs_forbids_the_huge_pages_around_it() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, HUGE, Access::Write, Level::SIZE_2M);
        rig.map(&mut vcpu, 3 * HUGE, Access::Write, Level::SIZE_2M);
        // From the middle of one huge page into the next; for 1 GiB as well.
        let differs = range(HUGE + 100, HUGE);
        for level in [Level::SIZE_2M, Level::SIZE_1G] {
            rig.mmu.space(0).forbid_huge_pages(differs, level).unwrap();
        }
        assert_eq!(
            rig.mmu.space(0).translate(Gfn(HUGE)).unwrap().level,
            Level::SIZE_4K,
            "{}: it was huge",
            rig.stage
        );
        for (gfn, level) in [
            (HUGE + 1, 1),
            (2 * HUGE + 400, 1),
            (3 * HUGE, 2),
            (4 * HUGE, 2),
        ] {
            rig.touch(&mut vcpu, gfn, Access::Write);
            assert_eq!(
                rig.mmu.space(0).translate(Gfn(gfn)).unwrap().level.get(),
                level,
                "{}: {gfn:#x}",
                rig.stage
            );
        }
        rig.mmu.zap_all();
        assert_eq!(
            rig.fault(&mut vcpu, 2 * HUGE + 1, Access::Write),
            FaultOutcome::Fixed {
                level: Level::SIZE_4K
            }
        );
        for level in [Level::SIZE_2M, Level::SIZE_1G] {
            rig.mmu.space(0).allow_huge_pages(differs, level).unwrap();
        }
        rig.mmu.zap_all();
        assert_eq!(
            rig.fault(&mut vcpu, HUGE + 1, Access::Write),
            FaultOutcome::Fixed {
                level: Level::SIZE_1G
            }
        );
    });
}

/// There may be no memory to split with; what is forbidden goes all the same.
#[test]
fn huge_pages_are_forbidden_without_memory_for_tables() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        for huge in 0..4 {
            rig.map(&mut vcpu, huge * HUGE, Access::Write, Level::SIZE_2M);
        }
        rig.mmu.reclaim();
        // From the middle of one huge page into the next but one, with memory for one table.
        let differs = range(HUGE / 2, 2 * HUGE);
        let level = Level::SIZE_2M;
        rig.mmu
            .space(0)
            .forbid_huge_pages(differs, Level::SIZE_1G)
            .unwrap();
        rig.flushes();
        rig.allocations_left(1);
        rig.mmu.space(0).forbid_huge_pages(differs, level).unwrap();
        for huge in 0..3 {
            let found = rig.mmu.space(0).translate(Gfn(huge * HUGE));
            assert!(
                found.is_none_or(|found| found.level < level),
                "{}: {found:?}",
                rig.stage
            );
        }
        let beside = rig
            .mmu
            .space(0)
            .translate(Gfn(3 * HUGE))
            .map(|found| found.level);
        assert_eq!(beside, Some(level), "{}", rig.stage);
        // At least the last two were mapped whole, and are flushed whole.
        let flushes = rig.flushes();
        for gfn in [HUGE, 3 * HUGE - 1] {
            let flushed = |&(flush, cause): &(Flush, FlushCause)| {
                cause == FlushCause::Unmap && flush.covers(Gfn(gfn))
            };
            assert!(flushes.iter().any(flushed), "{}: {flushes:?}", rig.stage);
        }
        rig.allocations_left(usize::MAX / 2);
        for huge in 0..3 {
            rig.touch(&mut vcpu, huge * HUGE, Access::Write);
            let found = rig.mmu.space(0).translate(Gfn(huge * HUGE)).unwrap();
            assert_eq!(found.level, Level::SIZE_4K, "{}", rig.stage);
        }
        drop(vcpu);
        rig.settled();
    });
}
