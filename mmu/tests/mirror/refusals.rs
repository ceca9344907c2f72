//! What the owner refuses does not happen, and is told with its reason.

use std::sync::atomic::Ordering::SeqCst;

use slat_mmu::{Access, Around, FaultOutcome, Gfn, Pfn, Refused, SlotSpec};

use crate::owner::{FIXED, HOST, Rig, each, fault, range};

#[test]
fn what_the_owner_refuses_does_not_happen() {
    each(|mut rig| {
        rig.owner.refuse_tables.store(true, SeqCst);
        let no_memory = FaultOutcome::Refused(Refused::NoMemory);
        assert_eq!(rig.fault(5, Access::Write), no_memory);
        rig.owner.refuse_tables.store(false, SeqCst);
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        let missing = Refused::ContentsMissing;
        rig.owner.refuse(missing);
        assert_eq!(
            rig.fault(6, Access::Write),
            FaultOutcome::Refused(missing),
            "the reason"
        );
        rig.owner.refuse(Refused::Failed(14));
        let mmu = rig.mmu();
        let space = mmu.space(0);
        assert!(!space.zap_gfn_range(range(0..9)));
        assert_eq!(space.write_protect_mirror(range(0..9)).pages, 0);
        let change = space.zap_mirror(range(0..9));
        assert_eq!((change.pages, change.kept), (0, 1));
        assert_eq!(change.refused, Some(Refused::Failed(14)));
        rig.agrees();
        assert_eq!(rig.owner.frames(), [5]);
        let stats = rig.mmu.stats().owner;
        let refused: Vec<_> = stats
            .refused
            .iter()
            .map(|of| (of.reason, of.pages))
            .collect();
        assert_eq!(
            refused,
            [
                ("no_memory", 0),
                ("contents_missing", 1),
                ("gone", 0),
                ("busy", 0),
                ("failed", 3)
            ]
        );
        rig.owner.accept();
        assert!(space.zap_gfn_range(range(0..9)));
        rig.agrees();
        assert_eq!(rig.mapped(), 0);
    });
}

#[test]
fn a_change_may_be_done_in_part() {
    each(|mut rig| {
        rig.owner
            .answer(|change| (change.gfns().pages() > 1).then_some((3, Refused::ContentsMissing)));
        let around = Around::new(range(64..80));
        let mut go = |gfn| {
            let read = fault(gfn, Access::Read);
            rig.mmu.fault_range(&mut rig.vcpu, read, around)
        };
        // Three pages are made, of 64..80: the fault's is not among them.
        let missing = FaultOutcome::Refused(Refused::ContentsMissing);
        let result = go(72);
        assert_eq!((result.outcome, result.mapped), (missing, 3));
        // Now it is, and the rest of the neighbours is told.
        let result = go(68);
        assert_eq!((result.outcome, result.mapped), (FIXED, 3));
        assert_eq!(result.refused, Some(Refused::ContentsMissing));
        rig.agrees();
        assert_eq!(rig.owner.frames(), [64, 65, 66, 67, 68, 69]);
        // An unmapping, too; and what was not done can be asked for again.
        let change = rig.mmu.space(0).zap_mirror(range(0..100));
        assert_eq!((change.pages, change.kept), (3, 3));
        rig.agrees();
        rig.owner.accept();
        let change = rig.mmu.space(0).zap_mirror(range(0..100));
        assert_eq!((change.pages, change.kept, change.refused), (3, 0, None));
        rig.agrees();
    });
}

#[test]
fn silence_is_a_refusal() {
    each(|mut rig| {
        rig.owner.silent.store(true, SeqCst);
        let busy = FaultOutcome::Refused(Refused::Busy);
        assert_eq!(rig.fault(1, Access::Read), busy);
        rig.agrees();
    });
}

/// An owner's panic does not leave entries frozen, for which the rest would wait.
#[test]
fn an_owner_that_panics_has_refused() {
    each(|mut rig| {
        assert_eq!(rig.fault(5, Access::Read), FIXED);
        rig.owner
            .answer(|_| std::panic::resume_unwind(Box::new(())));
        let mut operation = |operation: &mut dyn FnMut(&mut Rig)| {
            let operation = std::panic::AssertUnwindSafe(|| operation(&mut rig));
            assert!(std::panic::catch_unwind(operation).is_err());
            rig.owner.policy.clear_poison();
            rig.owner.view.clear_poison();
        };
        operation(&mut |rig| assert_eq!(rig.fault(6, Access::Read), FIXED));
        operation(&mut |rig| assert!(rig.mmu.space(0).zap_gfn_range(range(0..9))));
        rig.owner.accept();
        rig.agrees();
        assert_eq!(rig.owner.frames(), [5]);
        assert_eq!(rig.fault(6, Access::Read), FIXED);
        rig.agrees();
    });
}

/// A leaf that the owner would not give up when its slot went is asked for again by who faults
/// there, before anything else is mapped.
#[test]
fn a_leaf_of_an_older_slot_is_asked_for_again() {
    each(|mut rig| {
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        rig.owner.refuse(Refused::Busy);
        rig.mmu.space(0).delete_slot(0).unwrap();
        assert_eq!(rig.mapped(), 1, "a leak that shows");
        let spec = SlotSpec::new(0, Gfn(0), 8, Pfn(HOST + 100));
        rig.mmu.create_slot(spec).unwrap();
        let busy = FaultOutcome::Refused(Refused::Busy);
        assert_eq!(rig.fault(5, Access::Read), busy);
        rig.agrees();
        rig.owner.accept();
        assert_eq!(rig.fault(5, Access::Read), FaultOutcome::Retry);
        assert_eq!(rig.mapped(), 0);
        assert_eq!(rig.fault(5, Access::Read), FIXED);
        assert_eq!(rig.owner.view().pages[&5].0, HOST + 105);
        rig.agrees();
    });
}

#[test]
fn a_table_that_the_owner_keeps_is_leaked_and_nothing_else() {
    each(|mut rig| {
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        rig.mmu.space(0).delete_slot(0).unwrap();
        rig.owner.refuse_tables.store(true, SeqCst);
        drop(rig.vcpu);
        drop(rig.mmu);
        assert_eq!(rig.arena.used_frames(), rig.levels - 1);
    });
}
