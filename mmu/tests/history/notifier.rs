//! The host takes memory back: pitfalls 44 to 51.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::Instant,
};

use slat_mmu::{Access, Fault, FaultOutcome, Gfn, Level, MmuConfig, PrefaultError};

use crate::rig::{GIGA, HUGE, PATIENCE, Rig, contended, each, each_kind, range};

#[test]
fn a_lookup_from_before_an_invalidation_is_tried_again() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let seen = rig.mmu.invalidate_seq();
        let token = rig.mmu.space(0).invalidate_begin(range(5, 1), true);
        rig.mmu.invalidate_end(token).unwrap();
        let fault = Fault::new(Gfn(5), Access::Write).with_max_level(Level::SIZE_4K);
        assert_eq!(
            rig.mmu.fault(&mut vcpu, fault.with_seq(seen)),
            FaultOutcome::Retry,
            "{}",
            rig.stage
        );
        let now = rig.mmu.invalidate_seq();
        assert_eq!(
            rig.mmu.fault(&mut vcpu, fault.with_seq(now)),
            FaultOutcome::Fixed {
                level: Level::SIZE_4K
            }
        );
        // Beside it, where the vCPU remembers the table.
        let beside = Fault::new(Gfn(6), Access::Write).with_max_level(Level::SIZE_4K);
        assert_eq!(
            rig.mmu.fault(&mut vcpu, beside.with_seq(seen)),
            FaultOutcome::Retry,
            "{}",
            rig.stage
        );
    });
}

/// The end is exclusive, and no mapping reaches into the range from beside it.
#[test]
fn exactly_the_range_is_held_off() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let token = rig.mmu.space(0).invalidate_begin(range(HUGE + 10, 5), true);
        for (gfn, held) in [(9, false), (10, true), (14, true), (15, false)] {
            let outcome = rig.fault(&mut vcpu, HUGE + gfn, Access::Write);
            let expected = if held {
                FaultOutcome::Retry
            } else {
                FaultOutcome::Fixed {
                    level: Level::SIZE_4K,
                }
            };
            assert_eq!(outcome, expected, "{}: {gfn}", rig.stage);
        }
        assert_eq!(
            rig.fault(&mut vcpu, 3, Access::Write),
            FaultOutcome::Fixed {
                level: Level::SIZE_2M
            }
        );
        rig.mmu.invalidate_end(token).unwrap();
        assert_eq!(
            rig.fault(&mut vcpu, HUGE + 10, Access::Write),
            FaultOutcome::Fixed {
                level: Level::SIZE_1G
            }
        );
    });
}

/// A range is named by frames and ended by its token, so slots may come and go meanwhile.
#[test]
fn an_invalidation_ends_though_its_slot_went() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let token = rig.mmu.space(0).invalidate_begin(range(5, 1), true);
        rig.mmu.space(0).delete_slot(0).unwrap();
        rig.slot(0, 0, GIGA);
        assert_eq!(
            rig.fault(&mut vcpu, 5, Access::Read),
            FaultOutcome::Retry,
            "{}",
            rig.stage
        );
        rig.mmu.space(0).delete_slot(0).unwrap();
        rig.mmu.invalidate_end(token).unwrap();
        rig.slot(0, 0, GIGA);
        assert_eq!(
            rig.fault(&mut vcpu, 5, Access::Read),
            FaultOutcome::Fixed {
                level: Level::SIZE_1G
            }
        );
    });
}

/// Who may not block does not let go of the lock, however many want it.
#[test]
fn an_unmap_that_may_not_yield_does_not() {
    each_kind(|rig| {
        let begin = Instant::now();
        rig.slot(1, 2 * GIGA, 60 * GIGA);
        let everything = range(0, 62 * GIGA);
        contended(rig, |_| {
            loop {
                for may_yield in [false, true] {
                    let mut vcpu = rig.mmu.vcpu();
                    for giga in 0..62 {
                        rig.touch_small(&mut vcpu, giga * GIGA);
                    }
                    let before = rig.mmu.stats().yields;
                    let token = rig.mmu.space(0).invalidate_begin(everything, may_yield);
                    let yields = rig.mmu.stats().yields - before;
                    rig.mmu.invalidate_end(token).unwrap();
                    assert!(may_yield || yields == 0, "{}: {yields} yields", rig.stage);
                    if yields > 0 {
                        return;
                    }
                }
                assert!(
                    begin.elapsed() < PATIENCE,
                    "{}: nobody ever wanted the lock",
                    rig.stage
                );
            }
        });
    });
}

/// Mapping ahead gives up where memory is being taken back, instead of waiting for who may be
/// waiting for it.
#[test]
fn mapping_ahead_gives_up_where_memory_is_going() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let token = rig
            .mmu
            .space(0)
            .invalidate_begin(range(2 * HUGE + 3, 1), true);
        let error = rig
            .mmu
            .prefault(&mut vcpu, range(0, 4 * HUGE), Level::SIZE_4K)
            .unwrap_err();
        let gfn = Gfn(2 * HUGE + 3);
        assert_eq!(
            error,
            PrefaultError::Again { gfn, done: gfn.0 },
            "{}",
            rig.stage
        );
        rig.mmu.invalidate_end(token).unwrap();
        assert_eq!(
            rig.mmu
                .prefault(&mut vcpu, range(0, 4 * HUGE), Level::SIZE_4K),
            Ok(4 * HUGE)
        );
    });
}

/// Faults that try again for ever do not keep the invalidator from ending what they wait for.
#[test]
fn retrying_faults_do_not_starve_the_invalidator() {
    each(|rig| {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut vcpu = rig.mmu.vcpu();
                    while !stop.load(SeqCst) {
                        let _ = rig.fault(&mut vcpu, 5, Access::Write);
                    }
                });
            }
            let begin = Instant::now();
            for _ in 0..50 {
                let token = rig.mmu.space(0).invalidate_begin(range(5, 1), true);
                rig.mmu.invalidate_end(token).unwrap();
            }
            stop.store(true, SeqCst);
            assert!(begin.elapsed() < PATIENCE, "{}", rig.stage);
        });
    });
}

/// A token belongs to the MMU that gave it: another one neither loses a count nor stops holding its
/// own range off.
#[test]
fn an_invalidation_ends_only_at_the_mmu_that_began_it() {
    each(|rig| {
        let other = Rig::new(rig.stage, MmuConfig::default());
        other.slot(0, 0, GIGA);
        let (mut vcpu, mut theirs) = (rig.mmu.vcpu(), other.mmu.vcpu());
        let token = rig.mmu.space(0).invalidate_begin(range(5, 1), true);
        let refused = other.mmu.invalidate_end(token).unwrap_err();
        assert_eq!(
            other.fault(&mut theirs, 5, Access::Write),
            FaultOutcome::Fixed {
                level: Level::SIZE_1G
            },
            "{}",
            rig.stage
        );
        assert_eq!(
            rig.fault(&mut vcpu, 5, Access::Write),
            FaultOutcome::Retry,
            "{}",
            rig.stage
        );
        let own = other.mmu.space(0).invalidate_begin(range(5, 1), true);
        let refused = other
            .mmu
            .invalidate_end(refused.into_token())
            .expect_err("refused however often it comes");
        assert_eq!(
            other.fault(&mut theirs, 5, Access::Write),
            FaultOutcome::Retry,
            "{}",
            rig.stage
        );
        other.mmu.invalidate_end(own).unwrap();
        rig.mmu.invalidate_end(refused.into_token()).unwrap();
        for (rig, vcpu) in [(rig, &mut vcpu), (&other, &mut theirs)] {
            assert_eq!(
                rig.fault(vcpu, 5, Access::Write),
                FaultOutcome::Fixed {
                    level: Level::SIZE_1G
                },
                "{}",
                rig.stage
            );
        }
    });
}

/// Whoever lost its token may have left the memory partly taken: the guest is held off for good,
/// other invalidations or not.
#[test]
fn a_token_that_is_dropped_holds_faults_off() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        drop(rig.mmu.space(0).invalidate_begin(range(5, 1), true));
        let token = rig.mmu.space(0).invalidate_begin(range(5, 1), true);
        rig.mmu.invalidate_end(token).unwrap();
        for (gfn, held) in [(4, false), (5, true), (6, false)] {
            let held_off = rig.fault(&mut vcpu, gfn, Access::Write) == FaultOutcome::Retry;
            assert_eq!(held_off, held, "{}: {gfn}", rig.stage);
        }
    });
}
