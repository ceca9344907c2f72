//! Memory for tables: pitfalls 52 to 54.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Duration,
};

use slat_mmu::{Access, Entry, FaultOutcome, Gfn, Level, PrefaultError};

use crate::{
    common::hardware_reach,
    rig::{GIGA, HUGE, each, range},
};

/// Each fault finds as many tables as its walk may need, so none ends in the middle.
#[test]
fn no_fault_runs_out_of_tables_on_its_way() {
    each(|rig| {
        let top = rig.mmu.format().max_gfn.0;
        let mut vcpu = rig.mmu.vcpu();
        // Far from each other: a table for each level each time.
        for (id, gfn) in (1..40).map(|n| (n as u16, top / 64 * n)) {
            rig.slot(id, gfn, 1);
            let outcome = rig.fault(&mut vcpu, gfn, Access::Write);
            assert_eq!(
                outcome,
                FaultOutcome::Fixed {
                    level: Level::SIZE_4K
                },
                "{}: {id}",
                rig.stage
            );
        }
    });
}

/// Without memory every operation says so or does without; nothing stops midway, and all goes on
/// when there is memory.
#[test]
fn without_memory_nothing_breaks() {
    each(|rig| {
        for left in 0..8 {
            rig.allocations_left(left);
            let mut vcpu = rig.mmu.vcpu();
            for gfn in [0, HUGE, GIGA + 3] {
                match rig.fault(&mut vcpu, gfn, Access::Write) {
                    FaultOutcome::Fixed { .. } | FaultOutcome::OutOfMemory => {}
                    other => panic!("{}: {other:?} with {left} tables", rig.stage),
                }
            }
            match rig
                .mmu
                .prefault(&mut vcpu, range(GIGA, 4 * HUGE), Level::SIZE_4K)
            {
                Ok(_) | Err(PrefaultError::OutOfMemory { .. }) => {}
                Err(other) => panic!("{}: {other} with {left} tables", rig.stage),
            }
            rig.mmu
                .space(0)
                .split_huge_pages(range(0, GIGA), Level::SIZE_4K);
            rig.allocations_left(usize::MAX / 2);
            for gfn in [0, HUGE, GIGA + 3] {
                rig.touch(&mut vcpu, gfn, Access::Write);
            }
            drop(vcpu);
            rig.settled();
        }
    });
}

/// Memory may take its time and call back into the host, which may want the MMU's lock: nobody asks
/// for it under the lock.
#[test]
fn tables_are_allocated_without_the_lock() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        for gfn in 0..80 {
            rig.map(&mut vcpu, gfn * HUGE, Access::Write, Level::SIZE_2M);
        }
        let (ask, asked) = mpsc::channel::<mpsc::Sender<()>>();
        let (locked, tries) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (found, count) = (Arc::clone(&locked), Arc::clone(&tries));
        let ask = std::sync::Mutex::new(ask);
        rig.on_allocate(move |()| {
            // Each of the first, and then a few: an allocation costs two switches of threads here.
            let number = count.fetch_add(1, SeqCst);
            if found.load(SeqCst) || (number > 4 && !number.is_multiple_of(16)) {
                return;
            }
            let (answer, answered) = mpsc::channel();
            ask.lock().unwrap().send(answer).unwrap();
            if answered.recv_timeout(Duration::from_secs(5)).is_err() {
                found.store(true, SeqCst);
            }
        });
        thread::scope(|scope| {
            scope.spawn(move || {
                // Ends with the hook, which owns the other end.
                while let Ok(answer) = asked.recv() {
                    rig.mmu.space(0).zap_gfn_range(range(100 * GIGA, 1));
                    // Who asked may have given up waiting: then the test fails by what it noted.
                    answer.send(()).ok();
                }
            });
            // More tables than are fetched at a time, so that some are fetched in the middle.
            assert_eq!(
                rig.mmu
                    .space(0)
                    .split_huge_pages(range(0, 80 * HUGE), Level::SIZE_4K),
                0
            );
            rig.touch_small(&mut rig.mmu.vcpu(), GIGA);
            rig.no_hooks();
        });
        assert!(tries.load(SeqCst) >= 80, "{}", rig.stage);
        assert!(
            !locked.load(SeqCst),
            "{}: an allocation under the lock",
            rig.stage
        );
    });
}

/// Fresh memory holds garbage, and what means "nothing" is not 0 on every format.
#[test]
fn a_new_table_holds_what_the_format_calls_empty() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, 5, Access::Write, Level::SIZE_4K);
        // The root's, which is filled in another place.
        let empty = rig.raw(rig.mmu.format().max_gfn.0 - 1);
        for gfn in [6, HUGE, GIGA] {
            let walk = rig.mmu.space(0).walk(Gfn(gfn));
            let last = walk.last().unwrap();
            assert_eq!(
                (last.raw, last.entry),
                (empty, Entry::NonPresent),
                "{}: {gfn:#x}",
                rig.stage
            );
        }
        rig.mmu
            .prefault(&mut vcpu, range(HUGE + 1, 1), Level::SIZE_4K)
            .unwrap();
        assert_eq!(rig.raw(HUGE), empty, "{}", rig.stage);
        let root = rig.mmu.space(0).root().unwrap().pfn;
        let reach = hardware_reach(rig.stage, &rig.memory.arena, root);
        assert_eq!(
            reach.leaves.iter().map(|leaf| leaf.gfn).collect::<Vec<_>>(),
            [5, HUGE + 1],
            "{}",
            rig.stage
        );
    });
}
