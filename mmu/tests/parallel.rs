//! Real threads against one MMU: faults beside harvests, unmaps, slot changes and fast zaps, on
//! every format.
//!
//! What is checked is what must hold whatever the threads did: translations are the slot's,
//! counters are 0 at the end, and every table came back.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

mod common;
#[path = "common/planted_race.rs"]
mod planted_race;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, Fault, FaultOutcome, Gfn, GfnRange, Level, MmuConfig, NoTlb, Pfn, SecondStage,
    SlotFlags, SlotSpec,
};

const PAGES: u64 = 4096;
const HOST: u64 = 0x10_0000;

fn build(stage: GuestStage) -> (Arc<Arena>, Box<dyn SecondStage>) {
    let arena = Arc::new(Arena::new(Pfn(0x1000), 512));
    let mmu = stage.build(Arc::clone(&arena), NoTlb, MmuConfig::default());
    mmu.create_slot(SlotSpec::new(0, Gfn(0), PAGES, Pfn(HOST)))
        .unwrap();
    (arena, mmu)
}

fn settled(arena: &Arena, mmu: Box<dyn SecondStage>) {
    mmu.zap_all();
    mmu.reclaim();
    let stats = mmu.stats();
    assert_eq!(stats.pages, [0; 5], "{stats:?}");
    assert_eq!((stats.tables, stats.tables_retired, stats.roots), (0, 0, 0));
    assert_eq!(arena.used_frames(), 0);
}

#[test]
fn faults_in_parallel_with_everything_else() {
    for stage in GuestStage::ALL {
        let (arena, mmu) = build(stage);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for number in 0..3u64 {
                let (mmu, stop) = (&mmu, &stop);
                scope.spawn(move || {
                    let mut vcpu = mmu.vcpu();
                    let mut at = number * 7919;
                    while !stop.load(Ordering::Relaxed) {
                        at = at
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        let gfn = Gfn((at >> 33) % PAGES);
                        let access =
                            [Access::Read, Access::Write, Access::Execute][(at >> 20) as usize % 3];
                        match mmu.access(&mut vcpu, gfn, access) {
                            Ok(to) => assert_eq!(to.pfn, Pfn(HOST + gfn.0)),
                            Err(fault) => {
                                let present = fault == slat_mmu::WalkFault::Permission;
                                let mut fault = Fault::new(gfn, access);
                                fault.present = present;
                                match mmu.fault(&mut vcpu, fault) {
                                    FaultOutcome::Fixed { .. }
                                    | FaultOutcome::Spurious { .. }
                                    | FaultOutcome::Retry
                                    | FaultOutcome::NoSlot => {}
                                    other => panic!("{stage}: {other:?}"),
                                }
                            }
                        }
                    }
                });
            }
            let mut bitmap = vec![0; PAGES as usize / 64];
            for round in 0..20u64 {
                mmu.space(0)
                    .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                    .unwrap();
                for _ in 0..4 {
                    mmu.space(0).harvest_dirty_log(0, &mut bitmap).unwrap();
                    mmu.space(0).age(GfnRange::new(Gfn(0), PAGES));
                    thread::yield_now();
                }
                let token = mmu
                    .space(0)
                    .invalidate_begin(GfnRange::new(Gfn(round * 31 % PAGES), 700), true);
                mmu.invalidate_end(token).unwrap();
                mmu.space(0).set_slot_flags(0, SlotFlags::empty()).unwrap();
                mmu.space(0)
                    .split_huge_pages(GfnRange::new(Gfn(0), 2048), Level::SIZE_4K);
                if round % 7 == 0 {
                    mmu.zap_all();
                }
                if round % 11 == 0 {
                    mmu.space(0).delete_slot(0).unwrap();
                    assert!(mmu.space(0).translate(Gfn(5)).is_none());
                    mmu.create_slot(SlotSpec::new(0, Gfn(0), PAGES, Pfn(HOST)))
                        .unwrap();
                }
                mmu.reclaim();
            }
            stop.store(true, Ordering::Relaxed);
        });
        settled(&arena, mmu);
    }
}

#[test]
fn a_prefaulted_range_translates_and_counts() {
    for stage in GuestStage::ALL {
        let (arena, mmu) = build(stage);
        let mut vcpu = mmu.vcpu();
        let range = GfnRange::new(Gfn(3), PAGES - 5);
        assert_eq!(
            mmu.prefault(&mut vcpu, range, Level::SIZE_4K),
            Ok(PAGES - 5)
        );
        assert_eq!(mmu.stats().pages_at(Level::SIZE_4K), PAGES as i64 - 5);
        for gfn in 0..PAGES {
            let expected = range.contains(Gfn(gfn)).then_some(Pfn(HOST + gfn));
            assert_eq!(mmu.space(0).translate(Gfn(gfn)).map(|to| to.pfn), expected);
        }
        assert!(
            mmu.prefault(&mut vcpu, GfnRange::new(Gfn(PAGES - 3), 9), Level::SIZE_4K)
                .is_err()
        );
        drop(vcpu);
        settled(&arena, mmu);
    }
}

#[test]
fn a_handle_of_an_address_space_goes_to_other_threads() {
    for stage in GuestStage::ALL {
        let (arena, mmu) = build(stage);
        let mut vcpu = mmu.vcpu();
        let range = GfnRange::new(Gfn(0), PAGES);
        mmu.prefault(&mut vcpu, range, Level::SIZE_4K).unwrap();
        let space = mmu.space(0);
        let (one, mut two) = (space.leaves(range), space.leaves(range));
        thread::scope(|scope| {
            let counts = [
                scope.spawn(move || one.count()),
                scope.spawn(|| two.by_ref().count()),
            ];
            let ages = scope.spawn(move || space.age(range));
            // Joined one by one: a scope's own end is not seen by ThreadSanitizer.
            for count in counts {
                assert_eq!(count.join().unwrap() as u64, PAGES);
            }
            ages.join().unwrap();
        });
        drop(two);
        drop(vcpu);
        settled(&arena, mmu);
    }
}
