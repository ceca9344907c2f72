//! Roots come, are withdrawn and go: pitfalls 5 to 13.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use slat_arch::{Arm64Ipa40, Sv39x4};
use slat_mmu::{
    Access, Arena, Fault, FaultOutcome, Flush, FlushCause, Format, Gfn, Level, MmuConfig, NoTlb,
    Pfn, SecondStage, SlotSpec, TdpMmu,
};

use crate::{
    common::hardware_walk,
    rig::{GIGA, HUGE, PATIENCE, contended, each, each_kind, range, until},
};

#[test]
fn a_root_outlives_its_vcpus() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, 5, Access::Write, Level::SIZE_4K);
        let root = rig.mmu.space(0).root().unwrap();
        drop(vcpu);
        rig.mmu.reclaim();
        assert_eq!(rig.mmu.space(0).root(), Some(root), "{}", rig.stage);
        assert!(
            rig.mmu.space(0).translate(Gfn(5)).is_some(),
            "{}",
            rig.stage
        );
        rig.settled();
    });
}

#[test]
fn roots_that_no_vcpu_uses_are_zapped_too() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, 5, Access::Write, Level::SIZE_4K);
        drop(vcpu);
        rig.mmu.reclaim();
        // Another withdrew it, and nobody has begun to zap it.
        rig.mmu.invalidate_roots();
        rig.mmu.zap_all();
        let stats = rig.mmu.stats();
        assert_eq!((stats.roots, stats.pages), (0, [0; 5]), "{}", rig.stage);
        assert_eq!(rig.memory.arena.used_frames(), 0, "{}", rig.stage);
    });
}

#[test]
fn a_look_that_ends_early_leaks_no_root() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        for gfn in [0, 1, HUGE] {
            rig.touch_small(&mut vcpu, gfn);
        }
        // Ends at the first page.
        assert!(rig.mmu.space(0).test_age(range(0, 2 * HUGE)));
        assert!(rig.mmu.space(0).age(range(0, 2 * HUGE)));
        drop(vcpu);
        rig.settled();
    });
}

#[test]
fn unmapping_visits_withdrawn_roots() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.touch_small(&mut vcpu, 5);
        let old = rig.mmu.space(0).root().unwrap().pfn;
        rig.mmu.invalidate_roots();
        let mapped = || hardware_walk(rig.stage, &rig.memory.arena, old, 5).is_some();
        assert!(mapped(), "{}: its zapper has not begun", rig.stage);
        rig.events();
        let token = rig.mmu.space(0).invalidate_begin(range(5, 1), true);
        assert!(
            !mapped(),
            "{}: a withdrawn root maps memory that is the host's again",
            rig.stage
        );
        // Flushed when it was withdrawn; nothing was cached since.
        assert_eq!(rig.flushes(), []);
        rig.mmu.invalidate_end(token).unwrap();
        rig.mmu.zap_invalidated_roots();
        assert_eq!(rig.mmu.stats().pages, [0; 5]);
    });
}

#[test]
fn a_deleted_slot_is_in_no_root_withdrawn_or_not() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.touch_small(&mut vcpu, 5);
        let old = rig.mmu.space(0).root().unwrap().pfn;
        rig.mmu.invalidate_roots();
        rig.touch_small(&mut vcpu, 6);
        rig.mmu.space(0).delete_slot(0).unwrap();
        let new = rig.mmu.space(0).root().unwrap().pfn;
        assert_ne!(old, new);
        for (root, gfn) in [(old, 5), (new, 6)] {
            assert_eq!(
                hardware_walk(rig.stage, &rig.memory.arena, root, gfn),
                None,
                "{}",
                rig.stage
            );
        }
    });
}

#[test]
fn nothing_is_mapped_under_a_withdrawn_root() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.touch_small(&mut vcpu, 5);
        rig.mmu.invalidate_roots();
        // Beside the last fault: the vCPU remembers the table.
        rig.map(&mut vcpu, 6, Access::Write, Level::SIZE_4K);
        assert!(
            rig.mmu.space(0).translate(Gfn(6)).is_some(),
            "{}: mapped where nobody looks",
            rig.stage
        );
        // A prefault, too.
        rig.mmu.invalidate_roots();
        assert_eq!(
            rig.mmu.prefault(&mut vcpu, range(7, 1), Level::SIZE_4K),
            Ok(1)
        );
        assert!(
            rig.mmu.space(0).translate(Gfn(7)).is_some(),
            "{}",
            rig.stage
        );
        // And the fast path gives nothing back there.
        rig.mmu.invalidate_roots();
        let _ = rig
            .mmu
            .fault(&mut vcpu, Fault::new(Gfn(7), Access::Write).with_present());
        rig.touch(&mut vcpu, 7, Access::Write);
        assert!(
            rig.mmu
                .space(0)
                .translate(Gfn(7))
                .is_some_and(|found| found.writable),
            "{}",
            rig.stage
        );
        drop(vcpu);
        rig.settled();
    });
}

/// The flush that makes vCPUs leave a root is in the section that withdraws it: while it is carried
/// out the lock is held, so nobody maps anything, under whatever root.
#[test]
fn withdrawal_and_flush_are_one_section() {
    each_kind(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.touch_small(&mut vcpu, 5);
        rig.events();
        let (flushing, ended) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let early = Arc::new(AtomicBool::new(false));
        let (at, other, too_early) = (
            Arc::clone(&flushing),
            Arc::clone(&ended),
            Arc::clone(&early),
        );
        rig.on_flush(move |_| {
            at.store(true, SeqCst);
            too_early.store(
                until(Duration::from_millis(200), || other.load(SeqCst)),
                SeqCst,
            );
        });
        thread::scope(|scope| {
            scope.spawn(|| rig.mmu.invalidate_roots());
            assert!(until(PATIENCE, || flushing.load(SeqCst)));
            rig.touch_small(&mut vcpu, 6);
            ended.store(true, SeqCst);
        });
        rig.no_hooks();
        assert!(
            !early.load(SeqCst),
            "{}: mapped while vCPUs were told to leave their root",
            rig.stage
        );
        assert!(
            rig.mmu.space(0).translate(Gfn(6)).is_some(),
            "{}",
            rig.stage
        );
        assert_eq!(
            rig.flushes(),
            [(Flush::All, FlushCause::Roots)],
            "{}",
            rig.stage
        );
    });
}

#[test]
fn every_table_of_a_zapped_root_comes_back() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        // Tables with leaves, a table whose leaves are gone, and leaves at each level.
        for gfn in [0, HUGE, GIGA] {
            rig.touch_small(&mut vcpu, gfn);
        }
        rig.mmu.space(0).zap_gfn_range(range(HUGE, 1));
        rig.map(&mut vcpu, 2 * HUGE, Access::Write, Level::SIZE_2M);
        drop(vcpu);
        rig.settled();
    });
}

/// Each step of a zap is small: whoever wants the lock gets it in between, whatever the size of the
/// guest.
#[test]
fn zapping_a_root_lets_others_in() {
    each_kind(|rig| {
        let begin = std::time::Instant::now();
        rig.slot(1, 2 * GIGA, 60 * GIGA);
        contended(rig, |_| {
            loop {
                // Tables far from each other: a step is what hangs on one table.
                let mut vcpu = rig.mmu.vcpu();
                for giga in 2..62 {
                    rig.touch_small(&mut vcpu, giga * GIGA);
                }
                rig.mmu.invalidate_roots();
                let before = rig.mmu.stats().yields;
                rig.mmu.zap_invalidated_roots();
                if rig.mmu.stats().yields > before {
                    return;
                }
                assert!(
                    begin.elapsed() < PATIENCE,
                    "{}: a zap never let go of the lock",
                    rig.stage
                );
            }
        });
        rig.settled();
    });
}

#[test]
fn a_fault_on_a_vcpu_whose_root_went_twice_is_served() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        for gfn in 0..3 {
            rig.mmu.zap_all();
            assert_eq!(
                rig.fault(&mut vcpu, gfn, Access::Read),
                FaultOutcome::Fixed {
                    level: Level::SIZE_1G
                }
            );
        }
    });
}

/// A format whose root holds leaves: they go with the rest, though the root stays for whoever still
/// has it loaded.
fn leaves_of_a_withdrawn_root<F: Format>() {
    assert_eq!(F::ROOT_LEVEL, Level::SIZE_1G, "{}", F::NAME);
    let arena = Arc::new(Arena::new(Pfn(0x1000), 64));
    let mmu = TdpMmu::<F, _>::new(Arc::clone(&arena), NoTlb, MmuConfig::default());
    mmu.create_slot(SlotSpec::new(0, Gfn(0), 4 * GIGA, Pfn(0)))
        .unwrap();
    let mut vcpu = mmu.vcpu();
    for gfn in [5, GIGA + 5] {
        let outcome = mmu.fault(&mut vcpu, Fault::new(Gfn(gfn), Access::Write));
        let level = Level::SIZE_1G;
        assert_eq!(outcome, FaultOutcome::Fixed { level }, "{}", F::NAME);
    }
    let small = Fault::new(Gfn(2 * GIGA), Access::Write).with_max_level(Level::SIZE_4K);
    let level = Level::SIZE_4K;
    assert_eq!(mmu.fault(&mut vcpu, small), FaultOutcome::Fixed { level });
    assert_eq!(mmu.stats().pages[..3], [1, 0, 2]);
    let mut reader = mmu.walker();
    let mut walker = reader.enter();
    assert!(walker.translate(Gfn(5)).is_some());
    mmu.invalidate_roots();
    assert_eq!(mmu.stats().pages[..3], [1, 0, 2], "still mapped");
    // Unmapped in the meantime: counted out of what the withdrawn root has, once.
    mmu.space(0).zap_gfn_range(range(GIGA, 1));
    assert_eq!(mmu.stats().pages[..3], [1, 0, 1], "{}", F::NAME);
    assert!(walker.translate(Gfn(GIGA)).is_none());
    mmu.zap_invalidated_roots();
    // The vCPU has the root, and the walker is in it.
    let stats = mmu.stats();
    assert_eq!((stats.roots, stats.pages), (1, [0; 5]), "{}", F::NAME);
    for gfn in [5, GIGA + 5, 2 * GIGA] {
        assert_eq!(walker.translate(Gfn(gfn)), None, "{}: {gfn:#x}", F::NAME);
    }
    // Nothing is left to be found there, and no count falls below nothing.
    assert!(!mmu.space(0).zap_gfn_range(range(0, 4 * GIGA)));
    assert_eq!(mmu.stats().pages, [0; 5], "{}", F::NAME);
    drop(walker);
    drop(vcpu);
    mmu.reclaim();
    assert_eq!(arena.used_frames(), 0, "{}", F::NAME);
}

#[test]
fn leaves_on_the_root_itself_go_with_the_withdrawn_root() {
    leaves_of_a_withdrawn_root::<Sv39x4>();
    leaves_of_a_withdrawn_root::<Arm64Ipa40>();
}
