//! The fault's several paths: frozen and unknown entries, the hint, the fast path, the level, MMIO.

use super::*;
use crate::{WalkFault, table::node::Absent};

#[test]
fn a_frozen_entry_is_left_to_its_owner() {
    let mut rig = small();
    rig.touch(0, Level::SIZE_4K);
    let tables = rig.mmu.stats().tables;
    rig.at_root(|root| {
        root.take(1, Absent::Frozen);
    });
    for access in [Access::Read, Access::Write] {
        let fault = Fault::new(Gfn(512), access);
        assert_eq!(rig.fault(fault), FaultOutcome::Retry);
        assert_eq!(
            rig.fault(fault.with_max_level(Level::SIZE_4K)),
            FaultOutcome::Retry
        );
        assert_eq!(rig.fault(fault.with_present()), FaultOutcome::Retry);
    }
    assert_eq!(rig.mmu.stats().tables, tables, "nothing was made for it");
    assert!(rig.mmu.space(0).translate(Gfn(512)).is_none());
    assert!(rig.mmu.space(0).zap_gfn_range(range(0, 1 << 20)));
    assert_eq!(
        rig.fault(Fault::new(Gfn(512), Access::Read)),
        FaultOutcome::Retry,
        "a zap leaves it too"
    );
    rig.at_root(|root| root.replace(1, Flat::FROZEN, Flat::EMPTY).unwrap());
    rig.touch(512, Level::SIZE_2M);
}

#[test]
fn a_frozen_page_is_left_to_its_owner() {
    let mut rig = small();
    rig.touch(0, Level::SIZE_4K);
    rig.at_root(|root| {
        let reader = rig.mmu.participants.reader_slot();
        let guard = Guard::new(&rig.mmu.tables, rig.mmu.participants.pin(&reader));
        guard.child(root, 0).unwrap().take(1, Absent::Frozen);
    });
    let fault = Fault::new(Gfn(1), Access::Write).with_max_level(Level::SIZE_4K);
    assert_eq!(rig.fault(fault), FaultOutcome::Retry);
    assert_eq!(
        rig.mmu.prefault(&mut rig.vcpu, range(0, 3), Level::SIZE_4K),
        Err(PrefaultError::Again {
            gfn: Gfn(1),
            done: 1
        })
    );
}

#[test]
fn an_entry_of_unknown_make_is_reported_and_not_followed() {
    let mut rig = small();
    rig.touch(0, Level::SIZE_4K);
    rig.at_root(|root| root.replace(1, Flat::EMPTY, LEAF).unwrap());
    let level = Level::SIZE_2M;
    let fault = Fault::new(Gfn(512), Access::Read);
    assert_eq!(rig.fault(fault), FaultOutcome::BadEntry { level });
    assert_eq!(
        rig.mmu.access(&mut rig.vcpu, Gfn(512), Access::Read),
        Err(WalkFault::Malformed)
    );
    assert_eq!(rig.mmu.stats().faults_failed, 1);
}

#[test]
fn another_frame_in_place_of_ours_is_reported() {
    let mut rig = small();
    rig.touch(512, Level::SIZE_2M);
    rig.mmu.space(0).write_protect_gfn(Gfn(512), Level::SIZE_4K);
    rig.at_root(|root| {
        let raw = root.load(1);
        root.replace(1, raw, raw + (512 << 12)).unwrap();
    });
    let fault = Fault::new(Gfn(512), Access::Write);
    let level = Level::SIZE_2M;
    assert_eq!(rig.fault(fault), FaultOutcome::BadEntry { level });
}

#[test]
fn a_table_entry_cannot_be_stored_as_a_value() {
    let mut rig: Rig<Deep> = rig(64, MmuConfig::default());
    rig.touch(0, Level::SIZE_4K);
    let tables = &rig.mmu.tables;
    rig.at_root(|root| {
        let forged = Deep::make_table(Pfn(7));
        assert!(root.replace(1, Deep::EMPTY, forged).is_err());
        let blank = tables.blank().unwrap();
        let filled = blank.fill(tables, Level::SIZE_2M, |_| forged);
        #[expect(unsafe_code, reason = "looks at memory that the MMU has let go of")]
        // SAFETY: nobody makes a table here.
        let first = unsafe { tables.memory().read(filled.pfn().hpa()) };
        assert_eq!(first, Some(Deep::EMPTY));
        let wrong = root.link(1, Deep::EMPTY, filled).unwrap_err();
        tables.free_blank(tables.blank_again(wrong));
        assert_eq!(root.load(1), Deep::EMPTY);
    });
}

/// Whether the vCPU's hint is believed for `gfn`.
fn hinted(rig: &Rig, gfn: u64) -> bool {
    let reader = rig.mmu.participants.reader_slot();
    let guard = Guard::new(&rig.mmu.tables, rig.mmu.participants.pin(&reader));
    rig.vcpu.hint.node::<Flat, _>(&guard, Gfn(gfn)).is_some()
}

#[test]
fn a_hint_is_believed_until_any_table_is_retired() {
    let mut rig = small();
    assert!(!hinted(&rig, 0));
    rig.touch(3, Level::SIZE_4K);
    assert!(hinted(&rig, 0) && hinted(&rig, 511) && !hinted(&rig, 512));
    rig.touch(5, Level::SIZE_4K);
    rig.touch(600, Level::SIZE_4K);
    assert!(hinted(&rig, 512) && !hinted(&rig, 0));
    // Another table goes: the hint's own is still there, but who could tell?
    assert_eq!(
        rig.fault(Fault::new(Gfn(3), Access::Write)),
        FaultOutcome::Fixed {
            level: Level::SIZE_2M
        }
    );
    assert!(!hinted(&rig, 512));
    rig.touch(601, Level::SIZE_4K);
    assert!(hinted(&rig, 512));
    rig.vcpu.set_as_id(1);
    assert!(!hinted(&rig, 512));
}

#[test]
fn a_hint_to_a_freed_table_maps_nothing_into_it() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    assert!(hinted(&rig, 3));
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::LOG_DIRTY)
        .unwrap();
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::empty())
        .unwrap();
    assert_eq!(rig.mmu.stats().recovered, 1);
    assert!(!hinted(&rig, 3));
    rig.mmu.zap_all();
    rig.touch(4, Level::SIZE_4K);
    assert_eq!(rig.mmu.stats().pages[..2], [1, 0]);
    assert_eq!(
        rig.mmu.space(0).translate(Gfn(4)).unwrap().pfn,
        Pfn((1 << 20) + 4)
    );
}

#[test]
fn the_fast_path_takes_only_what_needs_no_decision() {
    let mut rig = small();
    let write = Fault::new(Gfn(3), Access::Write).with_present();
    let none = |rig: &mut Rig, fault: Fault| {
        let Rig { mmu, vcpu, .. } = rig;
        assert_eq!(mmu.fast_fault(vcpu, &fault), None, "{fault:?}");
    };
    // No root, then nothing mapped, then what is not the guest's own doing.
    none(&mut rig, write);
    rig.touch(600, Level::SIZE_4K);
    none(&mut rig, write);
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::LOG_DIRTY)
        .unwrap();
    assert!(matches!(
        rig.fault(Fault::new(Gfn(3), Access::Read)),
        FaultOutcome::Fixed { .. }
    ));
    none(&mut rig, Fault::prefetch(Gfn(3)).with_present());
    // No slot; a slot that is going.
    none(
        &mut rig,
        Fault::new(Gfn(1 << 20), Access::Write).with_present(),
    );
    let level = Level::SIZE_4K;
    let fast = |rig: &mut Rig, fault: &Fault| {
        let Rig { mmu, vcpu, .. } = rig;
        mmu.fast_fault(vcpu, fault)
    };
    assert_eq!(fast(&mut rig, &write), Some(FaultOutcome::Fixed { level }));
    assert_eq!(
        fast(&mut rig, &write),
        Some(FaultOutcome::Spurious { level })
    );
    assert_eq!(
        rig.mmu.space(0).dirty_pages(0),
        Ok(2 - 1),
        "the page, and not the one mapped before"
    );
    // Write-protected by someone who must be asked.
    rig.mmu.space(0).write_protect_gfn(Gfn(3), level);
    none(&mut rig, write);
    // Aged: the use is given back without the lock.
    let read = Fault::new(Gfn(3), Access::Read).with_present();
    assert_eq!(
        fast(&mut rig, &read),
        Some(FaultOutcome::Spurious { level })
    );
    assert!(rig.mmu.space(0).age(range(3, 1)));
    assert_eq!(fast(&mut rig, &read), Some(FaultOutcome::Fixed { level }));
    assert_eq!(rig.mmu.stats().faults_fast, 4);
}

#[test]
fn the_fast_path_gives_a_huge_page_back_only_where_nothing_is_logged() {
    let mut rig = rig::<Flat>(64, MmuConfig::default().with_eager_split(false));
    rig.touch(3, Level::SIZE_2M);
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::LOG_DIRTY)
        .unwrap();
    let write = Fault::new(Gfn(3), Access::Write).with_present();
    assert_eq!(rig.mmu.fast_fault(&mut rig.vcpu, &write), None);
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::empty())
        .unwrap();
    let level = Level::SIZE_2M;
    let fixed = Some(FaultOutcome::Fixed { level });
    assert_eq!(rig.mmu.fast_fault(&mut rig.vcpu, &write), fixed);
}

#[test]
fn nothing_is_recovered_while_its_memory_is_taken_back() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    rig.touch(700, Level::SIZE_4K);
    let token = rig.mmu.space(0).invalidate_begin(range(100, 1), true);
    let log = |rig: &Rig, on| {
        let mut flags = SlotFlags::empty();
        flags.set(SlotFlags::LOG_DIRTY, on);
        rig.mmu.space(0).set_slot_flags(0, flags).unwrap();
    };
    log(&rig, true);
    log(&rig, false);
    assert_eq!(rig.mmu.stats().pages[..2], [1, 1], "the other one");
    rig.mmu.invalidate_end(token).unwrap();
    log(&rig, true);
    log(&rig, false);
    assert_eq!(rig.mmu.stats().pages[..2], [0, 2]);
}

#[test]
fn when_the_generation_comes_round_no_old_hole_is_believed() {
    let config = MmuConfig::default().with_mmio_caching(true);
    let mut rig = rig::<Flat>(64, config);
    rig.mmu.space(0).delete_slot(0).unwrap();
    let hole = Fault::new(Gfn(5), Access::Read);
    let walk = |rig: &mut Rig| rig.mmu.access(&mut rig.vcpu, Gfn(5), Access::Read);
    assert_eq!(rig.fault(hole), FaultOutcome::NoSlot);
    assert_eq!(walk(&mut rig), Err(WalkFault::Mmio));
    let first = rig.mmu.space(0).root().unwrap();
    // Three bits: after eight changes the number is the same, and the table must not be.
    for change in 0..8 {
        rig.mmu
            .create_slot(SlotSpec::new(
                change,
                Gfn(u64::from(change) * 64),
                64,
                Pfn(64),
            ))
            .unwrap();
        assert_eq!(walk(&mut rig), Err(WalkFault::NotPresent), "after {change}");
    }
    assert_ne!(
        rig.mmu.space(0).root().unwrap(),
        first,
        "everything was zapped"
    );
    assert_eq!(
        rig.fault(hole),
        FaultOutcome::Fixed {
            level: Level::SIZE_4K
        }
    );
}
