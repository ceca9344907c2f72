//! Faults: permission, mappings that the owner lost, neighbours.

use slat_mmu::{Access, Around, FaultOutcome, Gfn, Pfn, Refused, SlotFlags, SlotSpec};

use crate::owner::{FIXED, HOST, Rig, SPURIOUS, each, fault, range};

#[test]
fn what_is_only_read_need_not_become_writable() {
    each(|mut rig| {
        let read = |gfn| fault(gfn, Access::Read);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, read(3).read_only()), FIXED);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, read(4)), FIXED);
        assert_eq!(rig.owner.view().writable(), [4]);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, read(3)), SPURIOUS);
        rig.agrees();
        let write = fault(3, Access::Write).read_only();
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, write), FIXED);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, write), SPURIOUS);
        assert_eq!(rig.log(), ["map ro 3..4", "map rw 4..5", "permit 3..4"]);
        rig.agrees();
    });
}

#[test]
fn a_read_only_slot_is_mapped_read_only() {
    each(|mut rig| {
        let spec = SlotSpec::new(1, Gfn(4096), 8, Pfn(HOST + 4096));
        let spec = spec.with_flags(SlotFlags::READONLY);
        rig.mmu.create_slot(spec).unwrap();
        let around = Around::new(range(4096..4100));
        let read = fault(4097, Access::Read);
        let result = rig.mmu.fault_range(&mut rig.vcpu, read, around);
        assert_eq!((result.outcome, result.mapped), (FIXED, 4));
        assert_eq!(rig.log(), ["map ro 4096..4100"]);
        assert_eq!(rig.fault(4097, Access::Write), FaultOutcome::ReadOnly);
    });
}

/// A page that a mirror makes writable counts as written; one that is mapped to be read does not.
#[test]
fn what_becomes_writable_is_dirty() {
    each(|mut rig| {
        let mmu = rig.mmu();
        let space = mmu.space(0);
        space.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        let mut log = [0; 16];
        space.harvest_dirty_log(0, &mut log).unwrap();
        let around = Around::new(range(0..4)).read_only();
        let read = fault(8, Access::Read).read_only();
        let _ = rig.mmu.fault_range(&mut rig.vcpu, read, around);
        assert_eq!(space.dirty_pages(0).unwrap(), 0);
        let around = Around::new(range(64..80));
        // A range is of the mirror, also if the fault does not say so.
        let write = slat_mmu::Fault::new(Gfn(8), Access::Write);
        let result = rig.mmu.fault_range(&mut rig.vcpu, write, around);
        assert_eq!((result.outcome, result.mapped), (FIXED, 16));
        assert_eq!(rig.mmu.stats().prefetched, 4 + 16);
        assert_eq!(rig.fault(2, Access::Write), FIXED);
        log = [0; 16];
        space.harvest_dirty_log(0, &mut log).unwrap();
        assert_eq!(log[..2], [1 << 8 | 1 << 2, 0xffff]);
    });
}

#[test]
fn a_mapping_that_the_owner_lost_is_made_again() {
    each(|mut rig| {
        rig.owner.view().loses = true;
        let read = fault(3, Access::Read);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, read.read_only()), FIXED);
        assert_eq!(rig.fault(4, Access::Write), FIXED);
        rig.owner.view().pages.clear();
        // Without a word it is spurious, and stays so.
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, read), SPURIOUS);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, read.again()), FIXED);
        let lost = fault(4, Access::Read).again();
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, lost), FIXED);
        assert_eq!(
            rig.log()[2..],
            ["map ro again 3..4", "map rw again 4..5"],
            "as they were"
        );
        rig.agrees();
        // It was there after all, and gets the leave to write.
        let write = fault(3, Access::Write).again();
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, write), FIXED);
        assert_eq!(rig.log(), ["map rw again 3..4"]);
        rig.agrees();
        // A refusal leaves the mirror as it was.
        rig.owner.refuse(Refused::Busy);
        let refused = FaultOutcome::Refused(Refused::Busy);
        assert_eq!(rig.mmu.fault(&mut rig.vcpu, lost), refused);
        assert_eq!(rig.mapped(), 2);
    });
}

#[test]
fn neighbours_come_in_one_batch() {
    each(|mut rig| {
        assert_eq!(rig.fault(70, Access::Write), FIXED);
        let batches = rig.mmu.stats().owner.batches;
        let around = Around::new(range(64..80));
        let result = rig
            .mmu
            .fault_range(&mut rig.vcpu, fault(72, Access::Read), around);
        assert_eq!((result.outcome, result.mapped), (FIXED, 15));
        assert_eq!(result.refused, None);
        assert_eq!(rig.log()[1..], ["map rw 64..70", "map rw 71..80"]);
        let stats = rig.mmu.stats();
        assert_eq!(stats.owner.batches, batches + 1);
        assert_eq!((stats.faults_fixed, stats.prefetched), (2, 14));
        rig.agrees();
        // Nothing is left to do.
        let result = rig
            .mmu
            .fault_range(&mut rig.vcpu, fault(72, Access::Read), around);
        assert_eq!((result.outcome, result.mapped), (SPURIOUS, 0));
        assert_eq!(rig.mmu.stats().owner.batches, batches + 1);
    });
}

#[test]
fn neighbours_have_their_own_leave_to_write() {
    each(|mut rig| {
        let around = Around::new(range(64..80)).read_only();
        let write = fault(72, Access::Write);
        let result = rig.mmu.fault_range(&mut rig.vcpu, write, around);
        assert_eq!((result.outcome, result.mapped), (FIXED, 16));
        assert_eq!(
            rig.log(),
            ["map ro 64..72", "map rw 72..73", "map ro 73..80"]
        );
        rig.agrees();
        // The fault's own may be beside the neighbours, at either side.
        for gfn in [99, 116] {
            let around = Around::new(range(100..116)).read_only();
            let read = fault(gfn, Access::Read).read_only();
            let _ = rig.mmu.fault_range(&mut rig.vcpu, read, around);
        }
        assert_eq!(rig.log(), ["map ro 99..116", "map ro 116..117"]);
        rig.agrees();
    });
}

#[test]
fn neighbours_end_with_slot_and_table() {
    each(|mut rig| {
        let all = Around::new(range(0..u64::MAX));
        let read = |gfn| fault(gfn, Access::Read);
        let result = rig.mmu.fault_range(&mut rig.vcpu, read(700), all);
        assert_eq!((result.outcome, result.mapped), (FIXED, 512));
        assert_eq!(rig.log(), ["map rw 512..1024"]);
        let spec = SlotSpec::new(1, Gfn(1100), 100, Pfn(HOST + 1100));
        rig.mmu.create_slot(spec).unwrap();
        let result = rig.mmu.fault_range(&mut rig.vcpu, read(1150), all);
        assert_eq!((result.outcome, result.mapped), (FIXED, 100));
        assert_eq!(rig.log(), ["map rw 1100..1200"]);
        let nowhere = rig.mmu.fault_range(&mut rig.vcpu, read(1099), all);
        assert_eq!((nowhere.outcome, nowhere.mapped), (FaultOutcome::NoSlot, 0));
        rig.agrees();
    });
}

/// The number of the sequence is old, or memory is being taken back: nothing is mapped that could
/// be out of date.
#[test]
fn an_invalidation_keeps_neighbours_off() {
    each(|mut rig| {
        let around = Around::new(range(64..80));
        let seq = rig.mmu.invalidate_seq();
        let token = rig.mmu.space(0).invalidate_begin(range(70..72), true);
        let go = |rig: &mut Rig, gfn, seq| {
            let fault = fault(gfn, Access::Read).with_seq(seq);
            let result = rig.mmu.fault_range(&mut rig.vcpu, fault, around);
            (result.outcome, result.mapped)
        };
        assert_eq!(go(&mut rig, 71, seq), (FaultOutcome::Retry, 0));
        assert_eq!(go(&mut rig, 66, seq), (FIXED, 1), "alone");
        rig.mmu.invalidate_end(token).unwrap();
        assert_eq!(go(&mut rig, 67, seq), (FaultOutcome::Retry, 0), "old");
        let seq = rig.mmu.invalidate_seq();
        assert_eq!(go(&mut rig, 67, seq), (FIXED, 15));
    });
}
