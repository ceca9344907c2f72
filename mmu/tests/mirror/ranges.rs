//! Operations on a range: unmapping, protecting, ageing, slots that go, the list of leaves; and how
//! they are counted.

use slat_mmu::{Access, Around, FaultOutcome, FlushCause, Gfn, GfnRange};

use crate::owner::{FIXED, PAGES, Rig, SPURIOUS, each, fault, range};

/// Maps all of the slot, writable.
fn fill(rig: &mut Rig) {
    for gfn in [0, 512] {
        let around = Around::new(range(0..PAGES));
        let write = fault(gfn, Access::Write);
        let result = rig.mmu.fault_range(&mut rig.vcpu, write, around);
        assert_eq!((result.outcome, result.mapped), (FIXED, 512));
    }
    rig.log();
}

fn counted(rig: &Rig, cause: FlushCause) -> (u64, u64) {
    let stats = rig.mmu.stats();
    let of = stats.flushes.iter().find(|of| of.cause == cause).unwrap();
    (of.ranges, of.pages)
}

#[test]
fn a_range_is_one_change() {
    each(|mut rig| {
        fill(&mut rig);
        let mmu = rig.mmu();
        let space = mmu.space(0);
        assert!(space.zap_gfn_range(range(100..1000)));
        assert_eq!(rig.log(), ["unmap 100..1000"]);
        assert_eq!(counted(&rig, FlushCause::Unmap), (1, 900));
        rig.agrees();
        assert!(!space.zap_gfn_range(range(100..1000)), "nothing is left");
        assert_eq!(rig.log(), [""; 0]);
        let change = space.zap_mirror(range(0..u64::MAX));
        assert_eq!((change.pages, change.kept), (124, 0));
        assert_eq!(rig.log(), ["unmap 0..100", "unmap 1000..1024"]);
        rig.agrees();
    });
}

#[test]
fn protecting_takes_the_leave_to_write() {
    each(|mut rig| {
        fill(&mut rig);
        let mmu = rig.mmu();
        let space = mmu.space(0);
        let change = space.write_protect_mirror(range(10..20));
        assert_eq!((change.pages, change.kept), (10, 0));
        assert_eq!(rig.log(), ["protect 10..20"]);
        assert_eq!(counted(&rig, FlushCause::WriteProtect), (1, 10));
        rig.agrees();
        // Only what is writable.
        let change = space.write_protect_mirror(range(5..22));
        assert_eq!((change.pages, change.kept), (7, 0));
        assert_eq!(rig.log(), ["protect 5..10", "protect 20..22"]);
        assert_eq!(rig.fault(15, Access::Read), SPURIOUS);
        assert_eq!(rig.fault(15, Access::Write), FIXED);
        assert_eq!(rig.log(), ["permit 15..16"]);
        rig.agrees();
    });
}

#[test]
fn ageing_says_what_was_mapped_and_unmaps_it() {
    each(|mut rig| {
        fill(&mut rig);
        let mmu = rig.mmu();
        let space = mmu.space(0);
        let aged = space.age_mirror(range(0..u64::MAX));
        assert_eq!(aged.young, [range(0..PAGES)]);
        assert_eq!((aged.change.pages, rig.mapped()), (PAGES, 0));
        assert_eq!(counted(&rig, FlushCause::Age), (1, PAGES));
        for gfn in [7, 8, 600] {
            assert_eq!(rig.fault(gfn, Access::Read), FIXED);
        }
        let mut young = vec![];
        let mut rest = range(0..u64::MAX);
        while !rest.is_empty() {
            let aged = space.age_mirror(rest);
            young.extend(aged.young);
            assert!(aged.rest.pages() < rest.pages(), "it comes to its end");
            rest = aged.rest;
        }
        assert_eq!(young, [range(7..9), range(600..601)]);
        rig.agrees();
    });
}

/// Whatever the length, a call ages no more than it says.
#[test]
fn ageing_is_bounded() {
    let mut rig = Rig::new(slat_arch::GuestStage::Npt4);
    let spec = slat_mmu::SlotSpec::new(1, Gfn(1 << 20), 5000, slat_mmu::Pfn(0));
    rig.mmu.create_slot(spec).unwrap();
    let all = spec.range();
    for gfn in (all.start.0..all.end.0).step_by(512) {
        let read = fault(gfn, Access::Read);
        let _ = rig.mmu.fault_range(&mut rig.vcpu, read, Around::new(all));
    }
    let space = rig.mmu.space(0);
    let first = space.age_mirror(all);
    let gfn = Gfn(all.start.0 + 4096);
    assert_eq!(first.young, [GfnRange::new(all.start, 4096)]);
    assert_eq!(first.rest, GfnRange::new(gfn, 904));
    let second = space.age_mirror(first.rest);
    assert_eq!(second.young, [first.rest]);
    assert!(second.rest.is_empty());
    rig.agrees();
}

#[test]
fn a_slot_that_goes_takes_its_mappings_along() {
    each(|mut rig| {
        fill(&mut rig);
        let mmu = rig.mmu();
        let space = mmu.space(0);
        space.move_slot(0, Gfn(4096)).unwrap();
        assert_eq!(rig.log(), ["unmap 0..1024"], "a batch, not a page each");
        assert_eq!(counted(&rig, FlushCause::Slot), (1, PAGES));
        rig.agrees();
        assert_eq!(rig.fault(5, Access::Read), FaultOutcome::NoSlot);
        assert_eq!(rig.fault(4096 + 5, Access::Read), FIXED);
        rig.agrees();
        space.delete_slot(0).unwrap();
        assert_eq!(rig.owner.frames(), [0; 0]);
        rig.agrees();
    });
}

#[test]
fn an_invalidation_unmaps_the_mirror() {
    each(|mut rig| {
        fill(&mut rig);
        let token = rig.mmu.space(0).invalidate_begin(range(3..5), false);
        assert_eq!(rig.log(), ["unmap 3..5"]);
        assert_eq!(rig.fault(4, Access::Read), FaultOutcome::Retry);
        rig.mmu.invalidate_end(token).unwrap();
        assert_eq!(rig.fault(4, Access::Read), FIXED);
        rig.agrees();
    });
}

#[test]
fn leaves_are_listed_apart_from_the_guests_own() {
    each(|mut rig| {
        fill(&mut rig);
        let own =
            slat_mmu::Fault::new(Gfn(9), Access::Write).with_max_level(slat_mmu::Level::SIZE_4K);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, own), FIXED);
        let mmu = rig.mmu();
        let space = mmu.space(0);
        assert_eq!(space.leaves(range(0..u64::MAX)).count(), 1);
        assert_eq!(space.mirror_leaves(range(0..u64::MAX)).count(), 1024);
        let some = space.mirror_leaves(range(500..514));
        let some: Vec<_> = some.map(|found| found.gfn.0).collect();
        assert_eq!(some, (500..514).collect::<Vec<_>>());
        assert_eq!(space.mirror_leaf_batch(range(0..PAGES)).leaves.len(), 512);
    });
}

#[test]
fn owners_work_is_counted() {
    each(|mut rig| {
        fill(&mut rig);
        let mmu = rig.mmu();
        let space = mmu.space(0);
        space.write_protect_mirror(range(0..8));
        assert_eq!(rig.fault(3, Access::Write), FIXED);
        space.zap_mirror(range(0..4));
        let stats = rig.mmu.stats().owner;
        assert_eq!(stats.batches, 5);
        assert_eq!((stats.maps, stats.protects, stats.unmaps), (2, 2, 1));
        assert_eq!(
            (
                stats.pages_mapped,
                stats.pages_protected,
                stats.pages_unmapped
            ),
            (1024, 9, 4)
        );
        assert!(stats.refused.iter().all(|of| of.changes == 0));
    });
}

/// Two slots that touch in the guest and not in the host.
#[test]
fn a_change_leads_to_one_place() {
    each(|mut rig| {
        let spec = slat_mmu::SlotSpec::new(1, Gfn(PAGES), 8, slat_mmu::Pfn(0x40_0000));
        rig.mmu.create_slot(spec).unwrap();
        assert_eq!(rig.fault(PAGES - 1, Access::Write), FIXED);
        assert_eq!(rig.fault(PAGES, Access::Write), FIXED);
        rig.log();
        rig.mmu.space(0).zap_mirror(range(0..2 * PAGES));
        assert_eq!(rig.log(), ["unmap 1023..1024", "unmap 1024..1025"]);
        rig.agrees();
    });
}
