//! Sweeps: order, bounds, yields.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use super::*;

fn visits<F: Format>(rig: &Rig<F>, plan: Sweep) -> Vec<(u8, u64)> {
    let (reader, root) = (rig.mmu.participants.reader_slot(), rig.root());
    let session = Session::begin(&rig.mmu, &reader, Mode::Shared, FlushCause::Unmap, 0);
    let mut seen = vec![];
    let session = sweep(
        session,
        &root,
        plan,
        || {},
        |_, run| {
            for index in run.first..run.end {
                seen.push((run.node.level().get(), run.span_of(index).start.0));
            }
            Visit::Done(Flush::None)
        },
    );
    assert!(!session.finish());
    seen
}

#[test]
fn an_entry_is_visited_before_what_it_points_to() {
    let mut rig = small();
    rig.touch(513, Level::SIZE_4K);
    rig.touch(1024, Level::SIZE_2M);
    let all = Sweep::leaves(range(510, 600)).tables();
    let seen = visits(&rig, all);
    assert_eq!(seen[..3], [(2, 512), (1, 512), (1, 513)]);
    assert_eq!((seen.len(), seen.last()), (514, Some(&(2, 1024))));
    let leaves = visits(&rig, Sweep::leaves(range(514, 3)));
    assert_eq!(leaves, [(1, 514), (1, 515), (1, 516)]);
    let huge = visits(&rig, Sweep::leaves(range(513, 600)).finest(Level::SIZE_2M));
    assert_eq!(huge, [(2, 512), (2, 1024)]);
}

#[test]
fn a_wide_root_is_walked_to_its_last_entry_and_no_further() {
    let mut rig = small();
    rig.touch((1 << 20) - 1, Level::SIZE_4K);
    let seen = visits(&rig, Sweep::leaves(range(0, u64::MAX)));
    assert_eq!((seen.len(), seen.last()), (512, Some(&(1, (1 << 20) - 1))));
    let roots = visits(
        &rig,
        Sweep::leaves(range(0, u64::MAX)).finest(Level::SIZE_2M),
    );
    assert_eq!(roots.len(), 2048);
    assert!(visits(&rig, Sweep::leaves(range(1 << 20, 5))).is_empty());
    assert!(visits(&rig, Sweep::leaves(range(3, 0))).is_empty());
}

#[test]
fn a_table_linked_during_the_visit_is_entered() {
    let mut rig = small();
    rig.touch(5, Level::SIZE_2M);
    let (reader, root) = (rig.mmu.participants.reader_slot(), rig.root());
    let session = Session::begin(&rig.mmu, &reader, Mode::Shared, FlushCause::Unmap, 0);
    let mut seen = vec![];
    let session = sweep(
        session,
        &root,
        Sweep::leaves(range(5, 1)),
        || {},
        |s, run| {
            seen.push((run.node.level().get(), run.gfn.0));
            if run.node.level() == Level::SIZE_2M {
                let raw = run.node.load(run.first);
                let blank = rig.mmu.tables.blank().unwrap();
                let split = rig
                    .mmu
                    .split(run.node, run.first, raw, blank, s.cell, false);
                assert!(matches!(split, super::super::split::Split::Done));
            }
            Visit::Done(Flush::None)
        },
    );
    session.finish();
    assert_eq!(seen, [(2, 0), (1, 5)]);
    let stats = rig.mmu.stats();
    assert_eq!((stats.pages[..2].to_vec(), stats.splits), (vec![512, 0], 1));
}

/// Runs a sweep that is contended at every single run, by a thread that wants the lock exclusive.
fn contended(rig: &Rig<Deep>, mode: Mode, plan: Sweep) -> (Vec<(u8, u64)>, u64) {
    let mmu = &rig.mmu;
    let (ask, asked) = mpsc::channel::<()>();
    let before = mmu.stats().yields;
    let seen = thread::scope(|scope| {
        scope.spawn(move || {
            while asked.recv().is_ok() {
                drop(mmu.lock.exclusive());
            }
        });
        let (reader, root) = (mmu.participants.reader_slot(), rig.root());
        let session = Session::begin(mmu, &reader, mode, FlushCause::Unmap, 0);
        let mut seen = vec![];
        let session = sweep(
            session,
            &root,
            plan,
            || {},
            |session, run| {
                seen.push((run.node.level().get(), run.gfn.0));
                ask.send(()).unwrap();
                let patience = Instant::now();
                while !session.is_contended() {
                    assert!(patience.elapsed() < Duration::from_secs(30), "nobody came");
                    thread::yield_now();
                }
                Visit::Done(Flush::None)
            },
        );
        session.finish();
        drop(ask);
        seen
    });
    (seen, mmu.stats().yields - before)
}

#[test]
fn yielding_at_every_step_skips_nothing_and_ends() {
    let mut rig = rig::<Deep>(64, MmuConfig::default());
    for gfn in [0, 513, 1 << 18, (1 << 19) + 7] {
        rig.touch(gfn, Level::SIZE_4K);
    }
    rig.touch(2048, Level::SIZE_2M);
    let plan = Sweep::leaves(range(0, 1 << 20));
    let runs = [(1, 0), (1, 512), (2, 2048), (1, 1 << 18), (1, 1 << 19)];
    for mode in [Mode::Shared, Mode::Exclusive] {
        let (seen, yields) = contended(&rig, mode, plan);
        assert_eq!(seen, runs, "{mode:?}");
        assert_eq!(yields, runs.len() as u64 - 1, "{mode:?}");
        let (seen, yields) = contended(&rig, mode, plan.atomic());
        assert_eq!((seen.as_slice(), yields), (&runs[..], 0), "{mode:?}");
    }
    // Tables come again after each yield, leaves do not, and the sweep gets on.
    let (seen, _) = contended(&rig, Mode::Shared, plan.tables());
    let leaves: Vec<_> = seen.iter().filter(|(level, _)| *level == 1).collect();
    assert_eq!(leaves.len(), 4);
}

#[test]
fn what_is_owed_is_paid_before_the_lock_goes() {
    let mut rig = small();
    for gfn in [3, 600] {
        rig.touch(gfn, Level::SIZE_4K);
    }
    let (mmu, log) = (&rig.mmu, &rig.log);
    log.take();
    let reader = mmu.participants.reader_slot();
    let mut session = Session::begin(mmu, &reader, Mode::Exclusive, FlushCause::Unmap, 0);
    let flush = |gfn| Flush::range(range(gfn, 1));
    session.owe(flush(3));
    session.owe(flush(5));
    let session = session.yielded(|| {
        // Without the lock, and everything paid.
        let paid = [(Flush::range(range(3, 3)), FlushCause::Unmap)];
        assert_eq!(log.take(), paid);
        drop(mmu.lock.exclusive());
    });
    assert!(session.finish(), "something was flushed on the way");
    assert_eq!(log.take(), [], "and is not owed twice");
}

#[test]
fn a_visitor_that_cannot_go_on_is_asked_again() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    let (reader, root) = (rig.mmu.participants.reader_slot(), rig.root());
    let mut stops = 2;
    let session = Session::begin(&rig.mmu, &reader, Mode::Shared, FlushCause::Unmap, 0);
    let plan = Sweep::leaves(range(3, 1));
    let session = sweep(
        session,
        &root,
        plan,
        || {},
        |_, _| {
            stops -= 1;
            if stops >= 0 {
                Visit::Stop
            } else {
                Visit::Done(Flush::None)
            }
        },
    );
    session.finish();
    assert_eq!(stops, -1);
}
