//! What faults and pre-faults map, and at which level.

use super::*;

#[test]
fn a_prefetch_maps_but_is_no_use_and_no_fault() {
    each(|rig| {
        assert_eq!(rig.fault(Fault::prefetch(BASE)), fixed(Level::SIZE_2M));
        assert_eq!(rig.fault(Fault::prefetch(BASE)), spurious(Level::SIZE_2M));
        let stats = rig.mmu.stats();
        assert_eq!((stats.faults_taken, stats.faults_fixed), (0, 0));
        assert_eq!(stats.prefetched, 1);
        assert_eq!(
            rig.mmu.space(0).test_age(GfnRange::new(BASE, 1)),
            rig.stage.info().ad_policy != AdPolicy::Hardware
        );
    });
}

#[test]
fn a_prefetch_leaves_a_better_mapping_alone() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let before = rig.run(BASE.0, Access::Write);
        assert_eq!(rig.fault(Fault::prefetch(BASE)), spurious(Level::SIZE_4K));
        assert_eq!(
            rig.mmu
                .prefault(&mut rig.vcpu, GfnRange::new(BASE, 8), Level::SIZE_4K),
            Ok(8)
        );
        assert_eq!(rig.mmu.space(0).translate(BASE), Some(before));
        assert_eq!(
            rig.mmu.space(0).dirty_pages(0),
            Ok(1),
            "nothing else was written"
        );
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
        let token = rig
            .mmu
            .space(0)
            .invalidate_begin(GfnRange::new(Gfn(BASE.0 + 2), 1), true);
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
        rig.mmu.invalidate_end(token).unwrap();
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
fn a_gigabyte_is_mapped_at_once_if_everything_is_aligned() {
    each(|rig| {
        let huge = 1 << 18;
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(huge), 2 * huge, Pfn(4 * huge)))
            .unwrap();
        assert_eq!(rig.touch(huge + 5, Access::Write), fixed(Level::SIZE_1G));
        let last = |rig: &Rig| rig.mmu.space(0).translate(Gfn(2 * huge - 1)).unwrap().pfn;
        assert_eq!(last(rig), Pfn(5 * huge - 1));
        let first = GfnRange::new(Gfn(huge), 1);
        assert_eq!(rig.mmu.space(0).split_huge_pages(first, Level::SIZE_2M), 0);
        assert_eq!(rig.mmu.stats().pages[1..3], [512, 0]);
        assert_eq!(rig.mmu.space(0).split_huge_pages(first, Level::SIZE_4K), 0);
        assert_eq!(rig.mmu.stats().pages[..3], [512, 511, 0]);
        assert_eq!(last(rig), Pfn(5 * huge - 1));
        assert_eq!(
            rig.flushed(),
            [],
            "the same memory with the same permissions"
        );
        // On, off: a gigabyte again, in place.
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(rig.mmu.stats().pages[..3], [1 << 18, 0, 0]);
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::empty())
            .unwrap();
        assert_eq!(rig.mmu.stats().pages[..3], [0, 0, 1]);
        assert_eq!(last(rig), Pfn(5 * huge - 1));
    });
}

#[test]
fn a_fault_may_not_map_what_an_invalidation_takes() {
    each(|rig| {
        let seq = rig.mmu.invalidate_seq();
        rig.run(BASE.0, Access::Write);
        rig.flushed();
        let token = rig
            .mmu
            .space(0)
            .invalidate_begin(GfnRange::new(Gfn(BASE.0 + 8), 8), true);
        assert_eq!(rig.flushed(), [(range(BASE.0, 512), FlushCause::Unmap)]);
        assert_eq!(token.range(), GfnRange::new(Gfn(BASE.0 + 8), 8));
        assert_eq!(rig.touch(BASE.0 + 15, Access::Write), FaultOutcome::Retry);
        // A neighbour may go on, but no leaf may reach into the range.
        rig.run(BASE.0 + 16, Access::Write);
        assert_eq!(rig.mmu.space(0).translate(Gfn(BASE.0 + 15)), None);
        assert_eq!(rig.mmu.space(0).translate(Gfn(BASE.0 + 8)), None);
        rig.mmu.invalidate_end(token).unwrap();
        let stale = Fault::new(Gfn(BASE.0 + 8), Access::Read).with_seq(seq);
        assert_eq!(rig.fault(stale), FaultOutcome::Retry);
        let fresh = Fault::new(Gfn(BASE.0 + 8), Access::Read).with_seq(rig.mmu.invalidate_seq());
        assert_eq!(rig.fault(fresh), fixed(Level::SIZE_2M));
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
        assert!(!rig.mmu.space(0).translate(BASE).unwrap().executable);
        assert!(rig.run(BASE.0 + 4, Access::Execute).executable);
        assert_eq!((rig.pages(), rig.mmu.stats().nx_splits), ((512, 0), 1));
        // Data accesses do not make it huge again; the worker does.
        assert_eq!(
            rig.touch(BASE.0 + 5, Access::Write),
            spurious(Level::SIZE_4K)
        );
        rig.flushed();
        assert_eq!(rig.mmu.recover_nx_huge_pages(0), 0);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(
            rig.mmu.recover_nx_huge_pages(8),
            0,
            "it would only be split again"
        );
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
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
