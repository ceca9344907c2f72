//! The owner's view is replaced as a whole: the mirror is forgotten, and the owner asked for
//! nothing.

use std::sync::Arc;

use slat_mmu::{Access, Around, FaultOutcome};

use crate::owner::{FIXED, Rig, each, fault, range};

/// Replaces the view by an empty one, as its owner would: notes from when on batches are its.
fn replace(rig: &Rig) {
    let mut view = rig.owner.view();
    view.pages.clear();
    view.tables.clear();
    view.since = rig.mmu.space(0).withdraw_mirrors();
}

#[test]
fn a_withdrawn_mirror_is_forgotten() {
    each(|mut rig| {
        let all = Around::new(range(0..1024));
        let write = fault(5, Access::Write);
        let _ = rig.mmu.fault_range(&mut rig.vcpu, write, all);
        rig.log();
        replace(&rig);
        assert_eq!(rig.mapped(), 0);
        assert_eq!(rig.mmu.space(0).mirror_leaves(range(0..1024)).count(), 0);
        rig.mmu.space(0).zap_gfn_range(range(0..1024));
        rig.mmu.zap_invalidated_roots();
        rig.mmu.reclaim();
        assert_eq!(rig.log(), [""; 0], "the owner is not asked");
        // The next fault begins anew.
        let result = rig.mmu.fault_range(&mut rig.vcpu, write, all);
        assert_eq!((result.outcome, result.mapped), (FIXED, 512));
        rig.agrees();
        rig.mmu.reclaim();
        let stats = rig.mmu.stats();
        assert_eq!((stats.roots, stats.tables_retired), (1, 0));
        replace(&rig);
        drop(rig.vcpu);
        drop(rig.mmu);
        let log = rig.owner.view().take_log();
        assert_eq!(log, ["map rw 0..512"], "nor at the end");
        assert_eq!(rig.arena.used_frames(), 0);
    });
}

#[test]
fn what_is_withdrawn_twice_is_withdrawn() {
    each(|mut rig| {
        let mmu = rig.mmu();
        let space = mmu.space(0);
        let none = space.withdraw_mirrors();
        assert_eq!(rig.fault(1, Access::Read), FIXED);
        let first = space.withdraw_mirrors();
        assert_eq!(space.withdraw_mirrors(), first);
        assert!(first > none);
        assert_eq!(rig.mmu.space(9).withdraw_mirrors(), first);
    });
}

/// A fault whose batch is under way when the mirror is withdrawn tries again, and has changed
/// nothing: not the new mirror, not the count, not the owner's new view.
#[test]
fn a_batch_of_a_withdrawn_mirror_ends_without_effect() {
    each(|mut rig| {
        assert_eq!(rig.fault(1, Access::Read), FIXED);
        let (mmu, owner) = (Arc::clone(&rig.mmu), Arc::clone(&rig.owner));
        let meanwhile = move || {
            let mut view = owner.view();
            view.pages.clear();
            view.since = mmu.space(0).withdraw_mirrors();
            drop(view);
            mmu.zap_invalidated_roots();
            mmu.reclaim();
            // Somebody else faults in the new one.
            let mut other = mmu.vcpu();
            assert_eq!(mmu.fault(&mut other, fault(2, Access::Read)), FIXED);
        };
        *rig.owner.during.lock().unwrap() = Some(Box::new(meanwhile));
        let all = Around::new(range(0..1024));
        let write = fault(5, Access::Write);
        let result = rig.mmu.fault_range(&mut rig.vcpu, write, all);
        assert_eq!((result.outcome, result.mapped), (FaultOutcome::Retry, 0));
        assert_eq!(rig.owner.frames(), [2]);
        rig.agrees();
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        rig.agrees();
        rig.mmu.reclaim();
        assert_eq!(rig.mmu.stats().roots, 1, "the old one is gone");
    });
}
