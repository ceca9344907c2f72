//! Slots: what they map, what they forbid, what is left when they go.

use super::*;

#[test]
fn deleting_a_slot_unmaps_it_and_flushes_what_was_mapped() {
    each(|rig| {
        rig.run(BASE.0 + 600, Access::Write);
        rig.mmu.space(0).delete_slot(0).unwrap();
        assert_eq!(
            rig.flushed(),
            [(range(BASE.0 + 512, 512), FlushCause::Slot)]
        );
        assert_eq!((rig.pages(), rig.mmu.slots()), ((0, 0), vec![]));
        assert_eq!(
            rig.mmu.space(0).delete_slot(0),
            Err(SlotError::UnknownId { id: 0 })
        );
        assert_eq!(rig.touch(BASE.0, Access::Read), FaultOutcome::NoSlot);
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn deleting_a_slot_that_was_never_touched_flushes_nothing() {
    each(|rig| {
        rig.mmu.space(0).delete_slot(0).unwrap();
        assert_eq!(rig.flushed(), []);
    });
}

#[test]
fn a_moved_slot_takes_its_log_along_and_leaves_nothing_behind() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.run(BASE.0 + 5, Access::Write);
        rig.flushed();
        let seq = rig.mmu.invalidate_seq();
        rig.mmu.space(0).move_slot(0, Gfn(0x8000)).unwrap();
        assert_eq!(rig.flushed(), [(range(BASE.0 + 5, 1), FlushCause::Slot)]);
        assert_eq!(rig.touch(BASE.0 + 5, Access::Read), FaultOutcome::NoSlot);
        let stale = Fault::new(Gfn(0x8005), Access::Read).with_seq(seq);
        assert_eq!(rig.fault(stale), FaultOutcome::Retry);
        assert_eq!(rig.run(0x8005, Access::Read).pfn, Pfn(HOST.0 + 5));
        let mut bitmap = [0; 32];
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(1));
        assert_eq!(bitmap[0], 1 << 5);
        assert!(matches!(
            rig.mmu.space(0).move_slot(0, rig.stage.info().max_gfn),
            Err(SlotError::BeyondFormat { .. } | SlotError::Wraps { .. })
        ));
        assert_eq!(rig.mmu.space(0).move_slot(0, Gfn(0x8000)), Ok(()));
    });
}

#[test]
fn zapping_part_of_a_huge_leaf_flushes_all_of_it() {
    each(|rig| {
        assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_2M));
        assert!(
            rig.mmu
                .space(0)
                .zap_gfn_range(GfnRange::new(Gfn(BASE.0 + 7), 1))
        );
        assert_eq!(rig.flushed(), [(range(BASE.0, 512), FlushCause::Unmap)]);
        assert!(rig.mmu.space(0).translate(Gfn(BASE.0 + 300)).is_none());
        assert!(
            !rig.mmu
                .space(0)
                .zap_gfn_range(GfnRange::new(Gfn(0), u64::MAX))
        );
        assert_eq!(rig.flushed(), []);
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
            rig.mmu.space(0).set_slot_flags(1, SlotFlags::empty()),
            Err(SlotError::ReadOnlyIsFixed { id: 1 })
        );
        // Logged as well, its pages stay as they are and the log stays empty.
        let both = SlotFlags::READONLY | SlotFlags::LOG_DIRTY;
        rig.mmu.space(0).set_slot_flags(1, both).unwrap();
        assert_eq!(rig.touch(2, Access::Write), FaultOutcome::ReadOnly);
        assert_eq!(rig.mmu.space(0).dirty_pages(1), Ok(0));
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::READONLY)
            .unwrap();
        assert_eq!(access(rig), Err(WalkFault::Permission));
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
        assert_eq!(rig.mmu.space(0).walk(max).last(), None);
        assert_eq!(rig.mmu.space(0).translate(max), None);
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(max.0 - 1), 1, HOST))
            .unwrap();
        assert_eq!(rig.touch(max.0 - 1, Access::Write), fixed(Level::SIZE_4K));
        let spec = SlotSpec::new(2, Gfn(max.0 - 1), 2, HOST);
        assert!(matches!(
            rig.mmu.create_slot(spec),
            Err(SlotError::BeyondFormat { .. })
        ));
        assert!(
            rig.mmu
                .space(0)
                .age(GfnRange::new(Gfn(max.0 - 1), u64::MAX))
        );
        assert!(
            rig.mmu
                .space(0)
                .zap_gfn_range(GfnRange::new(Gfn(max.0 - 1), u64::MAX))
        );
    });
}

#[test]
fn huge_pages_come_back_only_where_no_reason_forbids_them() {
    each(|rig| {
        let frame = GfnRange::new(Gfn(BASE.0 + 3), 1);
        rig.run(BASE.0, Access::Write);
        rig.mmu
            .space(0)
            .forbid_huge_pages(frame, Level::SIZE_2M)
            .unwrap();
        rig.mmu
            .space(0)
            .forbid_huge_pages(frame, Level::SIZE_2M)
            .unwrap();
        assert_eq!(rig.pages(), (512, 0));
        assert_eq!(
            rig.touch(BASE.0 + 9, Access::Write),
            spurious(Level::SIZE_4K)
        );
        rig.mmu
            .space(0)
            .allow_huge_pages(frame, Level::SIZE_2M)
            .unwrap();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
        assert_eq!(rig.pages(), (512, 0), "one reason is left");
        rig.mmu
            .space(0)
            .allow_huge_pages(frame, Level::SIZE_2M)
            .unwrap();
        rig.flushed();
        assert_eq!(rig.touch(BASE.0 + 9, Access::Write), fixed(Level::SIZE_2M));
        assert_eq!(rig.flushed(), [(range(BASE.0, 512), FlushCause::HugePage)]);
        assert_eq!(
            rig.mmu.space(7).forbid_huge_pages(frame, Level::SIZE_2M),
            Err(SlotError::UnknownAddressSpace { as_id: 7 })
        );
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
        let hit = rig.mmu.space(1).translate(BASE).unwrap();
        assert_eq!(hit.pfn, Pfn(0x40_0000));
        assert_eq!(rig.mmu.space(0).translate(BASE).unwrap().pfn, HOST);
        assert!(rig.mmu.space(1).zap_gfn_range(GfnRange::new(BASE, 8)));
        assert_eq!(rig.mmu.space(1).translate(BASE), None);
        assert!(rig.mmu.space(0).translate(BASE).is_some());
        other.set_as_id(2);
        assert_eq!(rig.mmu.fault(&mut other, fault), FaultOutcome::NoRoot);
        assert_eq!(rig.mmu.space(2).root(), None);
        assert_eq!(
            rig.mmu.space(2).delete_slot(0),
            Err(SlotError::UnknownAddressSpace { as_id: 2 })
        );
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
        assert_eq!(rig.mmu.space(0).translate(Gfn(hole)), None);
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(0), 8, Pfn(64)))
            .unwrap();
        assert_eq!(
            walk(rig),
            Err(WalkFault::NotPresent),
            "its generation is over"
        );
        assert_eq!(rig.run(hole, Access::Write).pfn, Pfn(71));
        rig.mmu.space(0).delete_slot(1).unwrap();
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
