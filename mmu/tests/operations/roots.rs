//! Roots, vCPUs and what is counted.

use super::*;

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
        assert_eq!(other.space(0).translate(BASE).unwrap().pfn, Pfn(64));
        other.zap_all();
        assert_eq!(other.stats().tables, 0);
    });
}

#[test]
fn flush_requests_are_counted_by_cause() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
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

/// Memory that is mapped in two address spaces is taken back in each.
#[test]
fn an_invalidation_unmaps_in_its_address_space_and_holds_faults_off_in_all() {
    each_with(MmuConfig::default().with_address_spaces(2), |rig| {
        let spec = SlotSpec::new(0, BASE, PAGES, HOST).with_as_id(1);
        rig.mmu.create_slot(spec).unwrap();
        for space in [0, 1] {
            rig.vcpu.set_as_id(space);
            rig.run(BASE.0, Access::Write);
        }
        let taken = GfnRange::new(BASE, 1);
        let token = rig.mmu.space(1).invalidate_begin(taken, true);
        assert_eq!(rig.mmu.space(1).translate(BASE), None);
        assert!(rig.mmu.space(0).translate(BASE).is_some());
        let other = rig.mmu.space(0).invalidate_begin(taken, true);
        assert_eq!(rig.mmu.space(0).translate(BASE), None);
        rig.mmu.invalidate_end(other).unwrap();
        for space in [0, 1] {
            rig.vcpu.set_as_id(space);
            assert_eq!(rig.touch(BASE.0, Access::Write), FaultOutcome::Retry);
        }
        rig.mmu.invalidate_end(token).unwrap();
        for space in [0, 1] {
            rig.vcpu.set_as_id(space);
            assert_eq!(rig.touch(BASE.0, Access::Write), fixed(Level::SIZE_2M));
        }
    });
}
