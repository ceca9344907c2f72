//! Mirror roots and the owner of the tables that they stand for, on every format. What happens when
//! the owner refuses at random is the model's; here are single refusals and their consequences, and
//! many threads at once.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

mod faults;
mod owner;
mod ranges;
mod refusals;
mod stress;
mod under_way;
mod withdrawal;

use owner::{FIXED, HOST, SPURIOUS, each};
use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, Fault, FaultOutcome, Gfn, GfnRange, MmuConfig, NoTlb, Pfn, SlotFlags, SlotSpec,
};

#[test]
fn a_mirror_is_its_owners_in_pages_of_4_kib() {
    each(|mut rig| {
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        assert_eq!(rig.fault(6, Access::Read), FIXED);
        assert_eq!(rig.fault(6, Access::Write), SPURIOUS);
        assert_eq!(rig.owner.frames(), [5, 6]);
        assert_eq!(rig.owner.view().pages[&6].0, HOST + 6);
        assert_eq!(rig.owner.view().tables.len(), rig.levels - 1);
        assert_eq!(
            rig.mmu.space(0).translate(Gfn(5)),
            None,
            "not the guest's own"
        );
        // What is done to the guest's tables leaves it alone.
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
        assert!(!rig.mmu.space(0).age(GfnRange::new(Gfn(0), 9)));
        rig.mmu.zap_all();
        assert_eq!(rig.mmu.stats().pages, [2, 0, 0, 0, 0]);
        assert!(rig.mmu.space(0).zap_gfn_range(GfnRange::new(Gfn(5), 1)));
        assert_eq!(rig.owner.frames(), [6]);
        rig.mmu.space(0).delete_slot(0).unwrap();
        assert_eq!(
            (rig.owner.frames(), rig.mmu.stats().pages),
            (vec![], [0; 5])
        );
        drop(rig.vcpu);
        drop(rig.mmu);
        assert!(rig.owner.view().tables.is_empty());
        assert_eq!(rig.arena.used_frames(), 0);
    });
}

#[test]
fn without_an_owner_there_is_no_mirror() {
    for stage in GuestStage::ALL {
        let mmu = stage.build(Arena::new(Pfn(0x1000), 64), NoTlb, MmuConfig::default());
        mmu.create_slot(SlotSpec::new(0, Gfn(0), 8, Pfn(8)))
            .unwrap();
        let fault = Fault::new(Gfn(1), Access::Read).with_mirror();
        let outcome = mmu.fault(&mut mmu.vcpu(), fault);
        assert_eq!(outcome, FaultOutcome::NoRoot);
    }
}
