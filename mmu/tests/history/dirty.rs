//! The dirty log: pitfalls 33 to 43.

use std::{sync::Arc, sync::Mutex, thread};

use slat_mmu::{
    Access, DirtyLogPolicy, DirtyLogStart, Fault, FaultOutcome, FlushCause, Gfn, Level, MmuConfig,
    Pfn, SecondStage, SlotFlags, SlotSpec, Vcpu,
};

use crate::rig::{GIGA, HOST, HUGE, Rig, each, each_with, range};

/// Whether the next write to a page is noticed.
fn is_watched(rig: &Rig, gfn: u64) -> bool {
    let Some(found) = rig.mmu.space(0).translate(Gfn(gfn)) else {
        return true;
    };
    match rig.mmu.format().dirty_log {
        DirtyLogPolicy::WriteProtect => !found.writable,
        DirtyLogPolicy::DirtyBit => !found.writable || !found.dirty,
    }
}

fn initially_set() -> MmuConfig {
    MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet)
}

/// Entries that are no leaf hold bits where leaves hold W and D. Cleared there, they would become
/// something else: on EPT an entry that remembers a hole turns into an executable page.
#[test]
fn protecting_touches_nothing_but_leaves() {
    each_with(MmuConfig::default().with_mmio_caching(true), |rig| {
        let mut vcpu = rig.mmu.vcpu();
        let hole = 2 * GIGA + 3;
        let _ = rig.fault(&mut vcpu, hole, Access::Read);
        rig.slot(1, 2 * GIGA, 64);
        rig.touch_small(&mut vcpu, 2 * GIGA);
        let before = [rig.raw(hole), rig.raw(2 * GIGA + 4)];
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.mmu.space(0).mark_dirty(range(2 * GIGA, 64));
        let mut bitmap = [0];
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(1, &mut bitmap), Ok(64));
        assert_eq!(
            [rig.raw(hole), rig.raw(2 * GIGA + 4)],
            before,
            "{}",
            rig.stage
        );
    });
}

/// Bits with holes, in words that begin anywhere in a table.
#[test]
fn exactly_the_pages_of_the_bits_are_protected() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        // 64-page words that do not begin at a multiple of 64 frames.
        let base = 2 * GIGA + 40;
        rig.slot(1, base, 300);
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::LOG_DIRTY)
            .unwrap();
        let pages: Vec<u64> = (0..300).collect();
        for mask in [
            0b1011_0101,
            1 << 63 | 1,
            u64::MAX,
            1 << 31,
            0xf0f0_0f0f_8001_7ffe,
        ] {
            for &page in &pages {
                rig.touch(&mut vcpu, base + page, Access::Write);
            }
            assert_eq!(
                rig.mmu.space(0).clear_dirty_log(1, 64, 128, &[mask, mask]),
                Ok(2 * u64::from(mask.count_ones()))
            );
            for &page in &pages {
                let asked = (64..192).contains(&page) && mask >> (page % 64) & 1 == 1;
                assert_eq!(
                    is_watched(rig, base + page),
                    asked,
                    "{}: page {page} of {mask:#x}",
                    rig.stage
                );
            }
        }
    });
}

/// All bits set from the beginning and nothing protected; a word of 64 pages lies across two huge
/// pages.
#[test]
fn a_word_across_two_huge_pages_protects_both() {
    each_with(initially_set(), |rig| {
        let mut vcpu = rig.mmu.vcpu();
        let base = 2 * GIGA + HUGE - 32;
        rig.slot(1, base, 3 * HUGE);
        let places = [2 * GIGA + HUGE, 2 * GIGA + 2 * HUGE];
        for place in places {
            rig.map(&mut vcpu, place, Access::Write, Level::SIZE_2M);
        }
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::LOG_DIRTY)
            .unwrap();
        // Pages 512.. of the slot: the last 32 of one huge page and the first 32 of the next.
        assert_eq!(
            rig.mmu.space(0).clear_dirty_log(1, 512, 64, &[u64::MAX]),
            Ok(64)
        );
        for page in 512..576 {
            assert!(is_watched(rig, base + page), "{}: page {page}", rig.stage);
            rig.touch(&mut vcpu, base + page, Access::Write);
        }
        assert_eq!(rig.dirty(1, 3 * HUGE)[8], u64::MAX, "{}", rig.stage);
    });
}

/// Without eager splitting a huge page loses W as a whole, and the first write must not give it
/// back as a whole.
#[test]
fn the_fast_path_never_makes_a_logged_huge_page_writable() {
    each_with(MmuConfig::default().with_eager_split(false), |rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, 0, Access::Write, Level::SIZE_2M);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        for gfn in [5, 6] {
            assert!(is_watched(rig, gfn), "{}", rig.stage);
            while rig.mmu.access(&mut vcpu, Gfn(gfn), Access::Write).is_err() {
                let fault = Fault::new(Gfn(gfn), Access::Write).with_present();
                assert!(
                    matches!(rig.mmu.fault(&mut vcpu, fault), FaultOutcome::Fixed { .. }),
                    "{}",
                    rig.stage
                );
            }
        }
        assert_eq!(rig.dirty(0, 2 * GIGA)[0], 0b11 << 5, "{}", rig.stage);
        assert!(is_watched(rig, 7), "{}", rig.stage);
    });
}

/// Each way in which a page becomes writable marks it.
#[test]
fn no_way_to_write_leaves_the_bit_clear() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let mut expected = 0;
        let mut check =
            |vcpu: &mut Vcpu, gfn: u64, how: &str, write: &dyn Fn(&dyn SecondStage, &mut Vcpu)| {
                write(rig.mmu.as_ref(), vcpu);
                rig.touch(vcpu, gfn, Access::Write);
                expected |= 1 << gfn;
                assert_eq!(rig.dirty(0, 2 * GIGA)[0], expected, "{}: {how}", rig.stage);
            };
        for gfn in 0..3 {
            rig.touch_small(&mut vcpu, gfn);
        }
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        check(&mut vcpu, 0, "fast path", &|mmu, vcpu| {
            let _ = mmu.fault(vcpu, Fault::new(Gfn(0), Access::Write).with_present());
        });
        check(&mut vcpu, 1, "slow path", &|mmu, vcpu| {
            let _ = mmu.fault(vcpu, Fault::new(Gfn(1), Access::Write));
        });
        check(&mut vcpu, 2, "hardware", &|_, _| {});
        check(&mut vcpu, 3, "first touch", &|mmu, vcpu| {
            let _ = mmu.fault(vcpu, Fault::new(Gfn(3), Access::Write));
        });
        check(&mut vcpu, 4, "beside the last", &|mmu, vcpu| {
            let _ = mmu.fault(vcpu, Fault::new(Gfn(4), Access::Write));
        });
        check(&mut vcpu, 5, "mapped ahead", &|mmu, vcpu| {
            mmu.prefault(vcpu, range(5, 1), Level::SIZE_4K).unwrap();
        });
    });
}

/// A write while the flush of a clear is carried out belongs to the next round: its bit must
/// survive.
#[test]
fn a_write_during_the_flush_of_a_clear_stays_dirty() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let vcpu = Arc::new(Mutex::new(rig.mmu.vcpu()));
        rig.touch(&mut vcpu.lock().unwrap(), 5, Access::Write);
        let (go, gone) = (
            Arc::new(std::sync::Barrier::new(2)),
            Arc::new(std::sync::Barrier::new(2)),
        );
        let (at, after) = (Arc::clone(&go), Arc::clone(&gone));
        rig.on_flush(move |request| {
            if request.cause == FlushCause::DirtyLog {
                at.wait();
                after.wait();
            }
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                go.wait();
                rig.touch(&mut vcpu.lock().unwrap(), 5, Access::Write);
                gone.wait();
            });
            assert_eq!(rig.mmu.space(0).clear_dirty_log(0, 0, 64, &[1 << 5]), Ok(1));
        });
        rig.no_hooks();
        assert_eq!(
            rig.dirty(0, 2 * GIGA)[0],
            1 << 5,
            "{}: the second write is lost",
            rig.stage
        );
    });
}

#[test]
fn a_log_without_a_vcpu_is_complete() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(rig.mmu.space(0).mark_dirty(range(100, 3)), 3);
        let mut bitmap = vec![0; (2 * GIGA / 64) as usize];
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(3));
        assert_eq!(bitmap[1], 0b111 << 36, "{}", rig.stage);
    });
}

#[test]
fn no_fault_maps_huge_in_a_logged_slot() {
    each_with(initially_set(), |rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let mut vcpu = rig.mmu.vcpu();
        for (gfn, access) in [
            (0, Access::Read),
            (HUGE, Access::Write),
            (GIGA, Access::Execute),
        ] {
            let outcome = rig.fault(&mut vcpu, gfn, access);
            assert_eq!(
                outcome,
                FaultOutcome::Fixed {
                    level: Level::SIZE_4K
                },
                "{} {access:?}",
                rig.stage
            );
        }
    });
}

/// Recovery when logging ends: not where the slot ends within the huge page, nor where another slot
/// is still logged.
#[test]
fn recovery_stays_inside_the_slot_and_out_of_logged_ones() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let base = 2 * GIGA + 100;
        rig.slot(1, base, 2 * HUGE);
        let end = base + 2 * HUGE;
        for id in [0, 1] {
            rig.mmu
                .space(0)
                .set_slot_flags(id, SlotFlags::LOG_DIRTY)
                .unwrap();
        }
        for gfn in [0, base, base + HUGE, end - 1] {
            rig.touch(&mut vcpu, gfn, Access::Write);
        }
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::empty())
            .unwrap();
        let levels = [0, base, base + HUGE, end - 1]
            .map(|gfn| rig.mmu.space(0).translate(Gfn(gfn)).unwrap().level.get());
        assert_eq!(levels, [1, 1, 2, 1], "{}", rig.stage);
        for outside in [base - 1, end, end + HUGE - 101] {
            assert!(
                rig.mmu.space(0).translate(Gfn(outside)).is_none(),
                "{}: {outside:#x} has no slot",
                rig.stage
            );
        }
    });
}

#[test]
fn a_split_of_a_range_splits_what_it_cuts_at_both_ends() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        for huge in 0..4 {
            rig.map(&mut vcpu, huge * HUGE, Access::Write, Level::SIZE_2M);
        }
        assert_eq!(
            rig.mmu
                .space(0)
                .split_huge_pages(range(HUGE + 200, 500), Level::SIZE_4K),
            0
        );
        let levels = [0, 1, 2, 3].map(|huge| {
            rig.mmu
                .space(0)
                .translate(Gfn(huge * HUGE))
                .unwrap()
                .level
                .get()
        });
        assert_eq!(levels, [2, 1, 1, 2], "{}", rig.stage);
        // Unmapping a part of a huge page is never passed over: all of it goes, and the guest
        // faults the rest in.
        assert!(
            rig.mmu.space(0).zap_gfn_range(range(3 * HUGE + 17, 1)),
            "{}",
            rig.stage
        );
        assert!(
            rig.mmu.space(0).translate(Gfn(3 * HUGE + 17)).is_none(),
            "{}",
            rig.stage
        );
    });
}

/// A huge leaf needs guest and host frames that run alike: the leaf's frame is aligned, and every
/// page is its own.
#[test]
fn host_memory_that_is_not_aligned_alike_is_never_mapped_huge() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let base = 2 * GIGA;
        rig.mmu
            .create_slot(SlotSpec::new(1, Gfn(base), GIGA, Pfn(HOST + 8 * GIGA + 1)))
            .unwrap();
        for gfn in [base, base + HUGE + 7] {
            let outcome = rig.fault(&mut vcpu, gfn, Access::Write);
            assert_eq!(
                outcome,
                FaultOutcome::Fixed {
                    level: Level::SIZE_4K
                },
                "{}",
                rig.stage
            );
            let found = rig.mmu.space(0).translate(Gfn(gfn)).unwrap();
            assert_eq!(
                found.pfn,
                Pfn(HOST + 8 * GIGA + 1 + gfn - base),
                "{}",
                rig.stage
            );
        }
        // Alike to 2 MiB and no further.
        rig.mmu
            .create_slot(SlotSpec::new(
                2,
                Gfn(base + GIGA),
                GIGA,
                Pfn(HOST + 8 * GIGA + HUGE),
            ))
            .unwrap();
        let outcome = rig.fault(&mut vcpu, base + GIGA + 5, Access::Write);
        assert_eq!(
            outcome,
            FaultOutcome::Fixed {
                level: Level::SIZE_2M
            },
            "{}",
            rig.stage
        );
    });
}
