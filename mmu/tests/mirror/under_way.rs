//! What meets a batch that is under way: faults try again, all that takes mappings away waits, and
//! none of it holds a lock that others need.
//!
//! A batch is kept under way from inside the owner until the operation that must wait has reached
//! the owner for a page before it. So it has met the batch by then, or meets it next.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use slat_mmu::{Access, Around, FaultOutcome, Gfn, SecondStage};

use crate::owner::{FIXED, Rig, each, fault, range};

/// A slow machine's patience.
const LONG: Duration = Duration::from_secs(20);

/// Faults 64..80 in, and while that is under way begins `operation` on another thread, which has to
/// do with page 60 first. It must not be over before the batch is. Returns when both are.
fn beside_a_batch(rig: &mut Rig, operation: impl FnOnce(&dyn SecondStage) + Send + 'static) {
    assert_eq!(rig.fault(60, Access::Write), FIXED);
    rig.log();
    let begun = Arc::new(Mutex::new(None));
    let (mmu, owner, begins) = (Arc::clone(&rig.mmu), Arc::clone(&rig.owner), begun.clone());
    let during = move || {
        let over = Arc::new(AtomicBool::new(false));
        let (is_over, beside) = (Arc::clone(&over), Arc::clone(&mmu));
        let thread = thread::spawn(move || {
            operation(&*beside);
            is_over.store(true, SeqCst);
        });
        *begins.lock().unwrap() = Some(thread);
        let begin = Instant::now();
        while owner.view().log.is_empty() {
            assert!(begin.elapsed() < LONG, "it has not reached the owner");
            thread::yield_now();
        }
        // Others go on meanwhile, in the mirror and beside it.
        let mut vcpu = mmu.vcpu();
        let elsewhere = fault(300, Access::Read);
        assert_eq!(mmu.fault(&mut vcpu, elsewhere), FIXED);
        let beside = fault(70, Access::Read);
        assert_eq!(mmu.fault(&mut vcpu, beside), FaultOutcome::Retry);
        assert!(mmu.space(0).mirror_leaves(range(64..80)).next().is_none());
        assert!(!over.load(SeqCst), "it did not wait for the batch");
    };
    *rig.owner.during.lock().unwrap() = Some(Box::new(during));
    let around = Around::new(range(64..80));
    let write = fault(72, Access::Write);
    let result = rig.mmu.fault_range(&mut rig.vcpu, write, around);
    assert_eq!((result.outcome, result.mapped), (FIXED, 16));
    let thread = begun.lock().unwrap().take();
    thread.expect("it began").join().unwrap();
}

#[test]
fn unmapping_waits() {
    each(|mut rig| {
        beside_a_batch(&mut rig, |mmu| {
            assert!(mmu.space(0).zap_gfn_range(range(60..70)));
        });
        assert_eq!(
            rig.log(),
            [
                "unmap 60..61",
                "map rw 300..301",
                "map rw 64..80",
                "unmap 64..70"
            ]
        );
        rig.agrees();
    });
}

#[test]
fn an_invalidation_waits() {
    each(|mut rig| {
        beside_a_batch(&mut rig, |mmu| {
            let token = mmu.space(0).invalidate_begin(range(60..66), false);
            mmu.invalidate_end(token).unwrap();
        });
        assert_eq!(rig.log().last().unwrap(), "unmap 64..66");
        rig.agrees();
    });
}

#[test]
fn protecting_waits() {
    each(|mut rig| {
        beside_a_batch(&mut rig, |mmu| {
            assert_eq!(mmu.space(0).write_protect_mirror(range(0..100)).pages, 17);
        });
        assert_eq!(rig.log().last().unwrap(), "protect 64..80");
        rig.agrees();
    });
}

#[test]
fn ageing_waits() {
    each(|mut rig| {
        beside_a_batch(&mut rig, |mmu| {
            let first = mmu.space(0).age_mirror(range(0..200));
            assert_eq!(first.young, [range(60..61)]);
            let second = mmu.space(0).age_mirror(first.rest);
            assert_eq!(second.young, [range(64..80)]);
        });
        rig.agrees();
    });
}

/// It holds the slots lock; the fault beside it, and the batch's end, do not need it.
#[test]
fn a_slot_that_goes_waits() {
    each(|mut rig| {
        let spec = slat_mmu::SlotSpec::new(1, Gfn(256), 64, slat_mmu::Pfn(crate::owner::HOST));
        rig.mmu.space(0).delete_slot(0).unwrap();
        let low = slat_mmu::SlotSpec::new(0, Gfn(0), 128, slat_mmu::Pfn(0x9000));
        rig.mmu.create_slot(low).unwrap();
        rig.mmu.create_slot(spec).unwrap();
        beside_a_batch(&mut rig, |mmu| {
            mmu.space(0).move_slot(0, Gfn(1024)).unwrap();
        });
        assert_eq!(rig.owner.frames(), [300]);
        rig.agrees();
        rig.mmu.space(0).delete_slot(1).unwrap();
        assert_eq!(rig.owner.frames(), [0; 0]);
    });
}
