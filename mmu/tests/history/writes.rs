//! Changing entries: pitfalls 14 to 24.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};
use std::{thread, time::Duration};

use slat_arch::{
    Arm64Ipa40, Arm64Ipa48, Ept4, Ept4NoAd, Ept5, Ept5NoAd, Npt4, Npt5, Sv39x4, Sv48x4, Sv57x4,
};
use slat_mmu::{
    Access, AdPolicy, Entry, Fault, FaultOutcome, FlushCause, Format, Gfn, Leaf, Level, MemoryType,
    MmuConfig, Pfn, SlotFlags, TableMemory,
};

use crate::rig::{GIGA, HUGE, PATIENCE, each, each_with, range, until};

/// A leaf is volatile exactly when someone without the lock may set its W or D, so that a plain
/// store would lose it; and never for want of Accessed alone, which would make every sweep as slow
/// as exchanges are.
fn volatility<F: Format>() {
    for bits in 0..16u32 {
        let bit = |n: u32| bits >> n & 1 == 1;
        let (writable, mmu_writable, accessed, dirty) = (bit(0), bit(0) || bit(1), bit(2), bit(3));
        let leaf = Leaf {
            pfn: Pfn(512),
            readable: true,
            writable,
            executable: true,
            mmu_writable,
            host_writable: true,
            accessed,
            dirty,
            memory: MemoryType::Normal,
        };
        if !F::holds(&leaf) {
            continue;
        }
        let fast_path = !writable && mmu_writable;
        let expected = match F::AD_POLICY {
            AdPolicy::Hardware => fast_path || (writable && !dirty),
            AdPolicy::SetAtInstall => fast_path,
            AdPolicy::AccessTracking => !(writable && accessed),
        };
        for level in [Level::SIZE_4K, Level::SIZE_2M] {
            let raw = F::make_leaf(&leaf, level);
            assert_eq!(F::is_volatile(raw, level), expected, "{} {leaf:?}", F::NAME);
        }
    }
    for raw in [0, F::EMPTY, F::FROZEN, F::make_table(Pfn(4))] {
        assert!(!F::is_volatile(raw, Level::SIZE_2M), "{} {raw:#x}", F::NAME);
    }
}

#[test]
fn an_entry_is_volatile_exactly_when_a_store_could_lose_a_bit() {
    volatility::<Ept4>();
    volatility::<Ept5>();
    volatility::<Ept4NoAd>();
    volatility::<Ept5NoAd>();
    volatility::<Npt4>();
    volatility::<Npt5>();
    volatility::<Sv39x4>();
    volatility::<Sv48x4>();
    volatility::<Sv57x4>();
    volatility::<Arm64Ipa40>();
    volatility::<Arm64Ipa48>();
}

/// While one thread holds a frozen entry (an arm64 split waits for its flush), another replaces the
/// table above it by a leaf. Tearing that table down must wait for the owner, whose new table is
/// then taken out as well.
#[test]
fn teardown_waits_for_the_owner_of_a_frozen_entry() {
    each(|rig| {
        if !rig.mmu.format().break_before_make {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, 5 * HUGE, Access::Write, Level::SIZE_2M);
        let breaks = Arc::new(AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let early = Arc::new(AtomicBool::new(false));
        let (seen, ended, too_early) = (Arc::clone(&breaks), Arc::clone(&over), Arc::clone(&early));
        rig.on_flush(move |request| {
            if request.cause == FlushCause::BreakBeforeMake && seen.fetch_add(1, SeqCst) == 0 {
                // The splitter: wait for the other to have broken the entry above, and some time
                // for it to go wrong.
                assert!(until(PATIENCE, || seen.load(SeqCst) == 2));
                too_early.store(
                    until(Duration::from_millis(300), || ended.load(SeqCst)),
                    SeqCst,
                );
            }
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(
                    rig.mmu
                        .space(0)
                        .split_huge_pages(range(5 * HUGE, HUGE), Level::SIZE_4K),
                    0
                )
            });
            assert!(until(PATIENCE, || breaks.load(SeqCst) == 1));
            let fault = Fault::new(Gfn(0), Access::Write);
            assert_eq!(
                rig.mmu.fault(&mut vcpu, fault),
                FaultOutcome::Fixed {
                    level: Level::SIZE_1G
                }
            );
            over.store(true, SeqCst);
        });
        rig.no_hooks();
        assert!(
            !early.load(SeqCst),
            "{}: torn down under the owner of an entry",
            rig.stage
        );
        assert_eq!(rig.mmu.stats().pages, [0, 0, 1, 0, 0], "{}", rig.stage);
        drop(vcpu);
        rig.settled();
    });
}

#[test]
fn a_fault_on_a_frozen_entry_tries_again() {
    each(|rig| {
        if !rig.mmu.format().break_before_make {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, 0, Access::Write, Level::SIZE_2M);
        let (frozen, go_on) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let (at, until_then) = (Arc::clone(&frozen), Arc::clone(&go_on));
        rig.on_flush(move |request| {
            if request.cause == FlushCause::BreakBeforeMake {
                at.store(true, SeqCst);
                assert!(until(PATIENCE, || until_then.load(SeqCst)));
            }
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(
                    rig.mmu
                        .space(0)
                        .split_huge_pages(range(0, HUGE), Level::SIZE_4K),
                    0
                )
            });
            assert!(until(PATIENCE, || frozen.load(SeqCst)));
            let outcomes = [Level::SIZE_4K, Level::SIZE_2M].map(|level| {
                let fault = Fault::new(Gfn(3), Access::Write).with_max_level(level);
                rig.mmu.fault(&mut vcpu, fault)
            });
            go_on.store(true, SeqCst);
            assert_eq!(outcomes, [FaultOutcome::Retry; 2], "{}", rig.stage);
        });
        rig.no_hooks();
        assert_eq!(rig.mmu.stats().pages, [512, 0, 0, 0, 0]);
    });
}

/// Puts `raw` into the 4 KiB table that maps `gfn`, as memory corruption would.
fn corrupt(rig: &crate::rig::Rig, gfn: u64, raw: u64) {
    let root = rig.mmu.space(0).root().unwrap().pfn;
    let walk = rig.mmu.space(0).walk(Gfn(gfn));
    let table = walk.steps().fold(root, |table, step| match step.entry {
        Entry::Table { pfn } => pfn,
        _ => table,
    });
    // SAFETY: the walk led there, and nothing was zapped since.
    let entry = unsafe { rig.memory.entries(table) };
    // SAFETY: the table is in use and has 512 entries; an `EntryCell` is an `AtomicU64`
    // (transparent).
    let entry = unsafe {
        entry
            .add((gfn % HUGE) as usize)
            .cast::<AtomicU64>()
            .as_ref()
    };
    entry.store(raw, SeqCst);
}

#[test]
fn a_leaf_to_other_memory_is_reported_and_not_changed() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        // The neighbour's entry holds the neighbour's frame. Mapped for reading while writes are
        // logged: the write upgrades it.
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        for gfn in [3, 4] {
            rig.touch_small(&mut vcpu, gfn);
        }
        assert!(rig.mmu.space(0).write_protect_gfn(Gfn(3), Level::SIZE_4K));
        assert!(rig.mmu.space(0).write_protect_gfn(Gfn(4), Level::SIZE_4K));
        let foreign = rig.raw(4);
        corrupt(rig, 3, foreign);
        let outcome = rig.mmu.fault(&mut vcpu, Fault::new(Gfn(3), Access::Write));
        assert_eq!(
            outcome,
            FaultOutcome::BadEntry {
                level: Level::SIZE_4K
            },
            "{}",
            rig.stage
        );
        assert_eq!(rig.raw(3), foreign, "{}", rig.stage);
    });
}

#[test]
fn a_write_to_a_page_mapped_for_reading_makes_it_writable() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let mut vcpu = rig.mmu.vcpu();
        rig.touch(&mut vcpu, 9, Access::Read);
        // Without a word about the entry that is there, then with.
        rig.touch(&mut vcpu, 9, Access::Write);
        assert!(
            rig.mmu.space(0).translate(Gfn(9)).unwrap().writable,
            "{}",
            rig.stage
        );
        assert_eq!(rig.dirty(0, 2 * GIGA)[0], 1 << 9, "{}", rig.stage);
        let again = rig.fault(&mut vcpu, 9, Access::Write);
        assert_eq!(
            again,
            FaultOutcome::Spurious {
                level: Level::SIZE_4K
            },
            "{}",
            rig.stage
        );
    });
}

#[test]
fn what_is_mapped_ahead_never_replaces_what_is_mapped() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let mut vcpu = rig.mmu.vcpu();
        rig.touch(&mut vcpu, 9, Access::Write);
        rig.touch(&mut vcpu, 10, Access::Read);
        let before = [rig.raw(9), rig.raw(10)];
        assert_eq!(
            rig.mmu.prefault(&mut vcpu, range(0, HUGE), Level::SIZE_4K),
            Ok(HUGE)
        );
        assert_eq!([rig.raw(9), rig.raw(10)], before, "{}", rig.stage);
        assert!(rig.mmu.space(0).translate(Gfn(11)).is_some());
        // Nor makes it a used page of an idle one.
        rig.mmu.space(0).age(range(9, 1));
        let aged = rig.raw(9);
        let outcome = rig.mmu.fault(&mut vcpu, Fault::prefetch(Gfn(9)));
        assert_eq!(
            outcome,
            FaultOutcome::Spurious {
                level: Level::SIZE_4K
            },
            "{}",
            rig.stage
        );
        assert_eq!(rig.raw(9), aged, "{}", rig.stage);
    });
}

fn nx() -> MmuConfig {
    MmuConfig::default().with_nx_huge_pages(true)
}

#[test]
fn a_note_of_the_nx_mitigation_goes_with_its_table() {
    each_with(nx(), |rig| {
        if !rig.mmu.format().nx_huge_pages {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        assert_eq!(
            rig.fault(&mut vcpu, 7, Access::Execute),
            FaultOutcome::Fixed {
                level: Level::SIZE_4K
            }
        );
        let noted = rig
            .mmu
            .space(0)
            .walk(Gfn(7))
            .steps()
            .filter(|step| match step.entry {
                Entry::Table { pfn } => rig.mmu.page_header(pfn).unwrap().nx_huge_page_disallowed,
                _ => false,
            })
            .count();
        assert!(noted > 0, "{}: nothing is noted", rig.stage);
        rig.mmu.zap_all();
        rig.mmu.reclaim();
        // New tables in the same memory, among others, are nobody's to zap.
        for huge in 0..64 {
            rig.map(&mut vcpu, huge * HUGE, Access::Write, Level::SIZE_4K);
        }
        assert_eq!(rig.mmu.recover_nx_huge_pages(100), 0, "{}", rig.stage);
        for huge in 0..64 {
            assert!(
                rig.mmu.space(0).translate(Gfn(huge * HUGE)).is_some(),
                "{}",
                rig.stage
            );
        }
    });
}

#[test]
fn nx_recovery_removes_the_noted_table_and_no_other() {
    each_with(nx(), |rig| {
        if !rig.mmu.format().nx_huge_pages {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        let fault = Fault::new(Gfn(7), Access::Execute).with_max_level(Level::SIZE_2M);
        assert_eq!(
            rig.mmu.fault(&mut vcpu, fault),
            FaultOutcome::Fixed {
                level: Level::SIZE_4K
            }
        );
        rig.map(&mut vcpu, HUGE, Access::Write, Level::SIZE_2M);
        rig.map(&mut vcpu, 2 * HUGE, Access::Write, Level::SIZE_4K);
        assert_eq!(rig.mmu.recover_nx_huge_pages(1), 1, "{}", rig.stage);
        assert!(
            rig.mmu.space(0).translate(Gfn(7)).is_none(),
            "{}",
            rig.stage
        );
        for gfn in [HUGE, 2 * HUGE] {
            assert!(
                rig.mmu.space(0).translate(Gfn(gfn)).is_some(),
                "{}: {gfn:#x} went too",
                rig.stage
            );
        }
    });
}

/// What was judged may be old when it is stored: the exchange fails and the new value is judged.
/// Here the walk that hardware does sets D between.
#[test]
fn writers_and_a_harvester_lose_no_bit() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        let reported = Mutex::new([0u64; 64]);
        let written = AtomicU64::new(0);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut vcpu = rig.mmu.vcpu();
                for round in 0..2_000u64 {
                    rig.touch(&mut vcpu, round % 64, Access::Write);
                    written.fetch_or(1 << (round % 64), SeqCst);
                }
            });
            let harvest = || {
                let mut bitmap = vec![0; (2 * GIGA / 64) as usize];
                rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap).unwrap();
                reported.lock().unwrap()[0] |= bitmap[0];
            };
            while !writer.is_finished() {
                harvest();
            }
            harvest();
        });
        assert_eq!(
            reported.lock().unwrap()[0],
            written.load(SeqCst),
            "{}",
            rig.stage
        );
    });
}
