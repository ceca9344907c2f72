//! Sweeps that must let others have the lock: pitfalls 1 to 4.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use slat_mmu::{Access, Flush, FlushCause, Gfn, Level, SlotFlags};

use crate::rig::{HUGE, PATIENCE, Rig, contended, each, each_kind, range};

/// 4 KiB tables in a sweep's way.
const TABLES: u64 = 64;

/// Maps the first pages of each table, and one in the middle.
fn populate(rig: &Rig) -> Vec<u64> {
    let mut vcpu = rig.mmu.vcpu();
    let gfns: Vec<u64> = (0..TABLES)
        .flat_map(|t| [0, 1, 77, 511].map(|at| t * HUGE + at))
        .collect();
    for &gfn in &gfns {
        rig.map(&mut vcpu, gfn, Access::Write, Level::SIZE_4K);
    }
    gfns
}

/// Repeats `round` until sweeps yielded often; `round` says how many runs its sweeps had to visit
/// at most.
fn until_yields(rig: &Rig, mut round: impl FnMut() -> u64) {
    contended(rig, |_| {
        let begin = std::time::Instant::now();
        let (mut yields, mut runs) = (0, 0);
        while yields < 2 {
            assert!(
                begin.elapsed() < PATIENCE,
                "{}: nobody ever yielded",
                rig.stage
            );
            let before = rig.mmu.stats().yields;
            runs += round();
            yields += rig.mmu.stats().yields - before;
            // Each burst but the last ends after it visited a run at least.
            assert!(
                yields <= runs,
                "{}: {yields} yields for {runs} runs",
                rig.stage
            );
        }
    });
}

#[test]
fn a_yield_skips_nothing_and_each_burst_makes_progress() {
    each_kind(|rig| {
        until_yields(rig, || {
            let gfns = populate(rig);
            assert!(rig.mmu.space(0).zap_gfn_range(range(0, TABLES * HUGE)));
            for gfn in gfns {
                assert!(
                    rig.mmu.space(0).translate(Gfn(gfn)).is_none(),
                    "{}: {gfn:#x} was skipped",
                    rig.stage
                );
            }
            TABLES
        });
    });
}

#[test]
fn a_protecting_sweep_that_yields_skips_nothing() {
    each_kind(|rig| {
        let protects = rig.mmu.format().dirty_log == slat_mmu::DirtyLogPolicy::WriteProtect;
        until_yields(rig, || {
            let gfns = populate(rig);
            rig.mmu
                .space(0)
                .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                .unwrap();
            for gfn in gfns {
                let found = rig.mmu.space(0).translate(Gfn(gfn)).unwrap();
                assert!(
                    if protects {
                        !found.writable
                    } else {
                        !found.dirty
                    },
                    "{}: {gfn:#x}",
                    rig.stage
                );
            }
            rig.mmu
                .space(0)
                .set_slot_flags(0, SlotFlags::empty())
                .unwrap();
            rig.mmu.zap_all();
            // Split, protected, recovered: three sweeps and more, each of one run a table at most
            // and one an upper entry.
            8 * TABLES
        });
    });
}

#[test]
fn a_sweep_changes_its_range_and_nothing_beside_it() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        for (first, pages) in [(0, 1), (1, 1), (511, 2), (500, 30), (1023, 1), (7, 1100)] {
            for gfn in 0..3 * HUGE {
                rig.touch_small(&mut vcpu, gfn);
            }
            rig.mmu.space(0).zap_gfn_range(range(first, pages));
            for gfn in 0..3 * HUGE {
                let inside = (first..first + pages).contains(&gfn);
                assert_eq!(
                    rig.mmu.space(0).translate(Gfn(gfn)).is_none(),
                    inside,
                    "{}: {gfn:#x}",
                    rig.stage
                );
            }
        }
    });
}

/// Whoever gets the lock when a sweep yields finds everything flushed that the sweep removed. It
/// looks from inside a flush of its own, so while it holds the lock.
#[test]
fn what_was_removed_is_flushed_before_the_lock_is_let_go_of() {
    const MARK: u64 = 1000 * HUGE;
    each_kind(|rig| {
        let flushed: Arc<Mutex<Vec<Flush>>> = Arc::default();
        let (memory, stage) = (Arc::clone(&rig.memory), rig.stage);
        let (seen, looked) = (Arc::clone(&flushed), Arc::new(AtomicU64::new(0)));
        let violations: Arc<Mutex<Vec<u64>>> = Arc::default();
        let (times, wrong) = (Arc::clone(&looked), Arc::clone(&violations));
        let gfns = Arc::new(Mutex::new(Vec::new()));
        let mapped = Arc::clone(&gfns);
        let root = rig.mmu.space(0).root().unwrap().pfn;
        rig.on_flush(move |request| {
            if request.cause != FlushCause::Unmap {
                return;
            }
            if !request.flush.covers(Gfn(MARK)) {
                seen.lock().unwrap().push(request.flush);
                return;
            }
            times.fetch_add(1, SeqCst);
            let seen = seen.lock().unwrap();
            for &gfn in mapped.lock().unwrap().iter() {
                let gone = crate::common::hardware_walk(stage, &memory.arena, root, gfn).is_none();
                if gone && !seen.iter().any(|flush| flush.covers(Gfn(gfn))) {
                    wrong.lock().unwrap().push(gfn);
                }
            }
        });
        std::thread::scope(|scope| {
            let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
            for _ in 0..2 {
                let stop = Arc::clone(&stop);
                scope.spawn(move || {
                    let mut vcpu = rig.mmu.vcpu();
                    while !stop.load(SeqCst) {
                        rig.touch_small(&mut vcpu, MARK);
                        rig.mmu.space(0).zap_gfn_range(range(MARK, 1));
                    }
                });
            }
            let begin = std::time::Instant::now();
            let yields = rig.mmu.stats().yields;
            while rig.mmu.stats().yields < yields + 2 && begin.elapsed() < PATIENCE {
                // Nobody is looking while this is set up.
                gfns.lock().unwrap().clear();
                let populated = populate(rig);
                flushed.lock().unwrap().clear();
                *gfns.lock().unwrap() = populated;
                rig.mmu.space(0).zap_gfn_range(range(0, TABLES * HUGE));
            }
            stop.store(true, SeqCst);
            assert!(
                rig.mmu.stats().yields >= yields + 2,
                "{stage}: nobody yielded"
            );
        });
        rig.no_hooks();
        assert!(looked.load(SeqCst) > 0);
        let wrong = violations.lock().unwrap();
        assert!(
            wrong.is_empty(),
            "{stage}: removed and not flushed: {wrong:x?}"
        );
    });
}
