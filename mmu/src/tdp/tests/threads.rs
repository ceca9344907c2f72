//! Small scenes with real threads.

use core::ptr::NonNull;
use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{EntryCell, Header, WalkFault};

/// Ends the other threads also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn ageing_never_undoes_what_a_sweep_takes_by_plain_stores() {
    let mut rig = small();
    let all = range(0, 1024);
    let stop = AtomicBool::new(false);
    let Rig { mmu, vcpu, .. } = &mut rig;
    let mmu = &*mmu;
    mmu.prefault(vcpu, all, Level::SIZE_4K).unwrap();
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                mmu.space(0).age(all);
            }
        });
        for _ in 0..40 {
            mmu.space(0).forbid_huge_pages(all, Level::SIZE_2M).unwrap();
            mmu.space(0)
                .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                .unwrap();
            for gfn in 0..1024 {
                let hit = mmu.space(0).translate(Gfn(gfn)).unwrap();
                assert!(!hit.writable, "{gfn} got W back");
                assert_eq!(hit.pfn, Pfn((1 << 20) + gfn));
            }
            mmu.space(0).set_slot_flags(0, SlotFlags::empty()).unwrap();
            for gfn in 0..1024 {
                let write = Fault::new(Gfn(gfn), Access::Write).with_present();
                assert!(matches!(
                    mmu.fault(vcpu, write),
                    FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. }
                ));
            }
        }
    });
    assert_eq!(rig.mmu.stats().pages[..2], [1024, 0]);
}

/// Host and table memory that hold a fault up between its choice of a level and its mapping, until
/// something else is done or plainly waits for the fault.
#[derive(Debug)]
struct Slow {
    arena: Arena,
    chosen: AtomicBool,
    held: AtomicBool,
    done: AtomicBool,
}

impl Host for Slow {
    fn flush(&self, _: &FlushRequest) {}

    fn mapping_level(&self, _: &SlotSpec, _: Gfn) -> Level {
        self.chosen.store(true, SeqCst);
        Level::SIZE_2M
    }
}

// SAFETY: everything is the arena's.
#[expect(unsafe_code, reason = "table memory that waits")]
unsafe impl TableMemory for Slow {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        self.arena.allocate(bytes)
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        // SAFETY: the caller's promise is the arena's condition.
        unsafe { self.arena.free(pfn, bytes) }
    }

    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        if self.chosen.swap(false, SeqCst) {
            self.held.store(true, SeqCst);
            let patience = Instant::now();
            while !self.done.load(SeqCst) && patience.elapsed() < Duration::from_millis(100) {
                thread::yield_now();
            }
        }
        // SAFETY: the caller's promise is the arena's condition.
        unsafe { self.arena.entries(pfn) }
    }

    fn header(&self, pfn: Pfn) -> &Header {
        self.arena.header(pfn)
    }
}

#[test]
fn once_forbidden_no_fault_on_its_way_makes_a_huge_page() {
    let slow = Arc::new(Slow {
        arena: Arena::new(Pfn(0x400), 64),
        chosen: AtomicBool::new(false),
        held: AtomicBool::new(false),
        done: AtomicBool::new(false),
    });
    let config = MmuConfig::default();
    let mmu = TdpMmu::<Flat, Arc<Slow>>::new(Arc::clone(&slow), Arc::clone(&slow), config);
    let spec = SlotSpec::new(0, Gfn(0), 1024, Pfn(1024));
    mmu.create_slot(spec).unwrap();
    thread::scope(|scope| {
        let fault = scope.spawn(|| {
            let mut vcpu = mmu.vcpu();
            mmu.fault(&mut vcpu, Fault::new(Gfn(600), Access::Read))
        });
        while !slow.held.load(SeqCst) {
            thread::yield_now();
        }
        mmu.space(0)
            .forbid_huge_pages(range(600, 1), Level::SIZE_2M)
            .unwrap();
        slow.done.store(true, SeqCst);
        let outcome = fault.join().unwrap();
        assert!(matches!(outcome, FaultOutcome::Fixed { .. }));
    });
    assert_eq!(
        mmu.space(0).translate(Gfn(600)).unwrap().level,
        Level::SIZE_4K
    );
}

#[test]
fn a_hole_is_forgotten_before_a_slot_is_there() {
    let config = MmuConfig::default().with_mmio_caching(true);
    let mut rig = rig::<Flat>(64, config);
    rig.mmu.space(0).delete_slot(0).unwrap();
    let stop = AtomicBool::new(false);
    let Rig { mmu, vcpu, .. } = &mut rig;
    let mmu = &*mmu;
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                let _ = mmu.fault(vcpu, Fault::new(Gfn(5), Access::Read));
                mmu.space(0).zap_gfn_range(range(5, 1));
            }
        });
        let mut own = mmu.vcpu();
        for _ in 0..2000 {
            mmu.create_slot(SlotSpec::new(0, Gfn(0), 8, Pfn(64)))
                .unwrap();
            let walk = mmu.access(&mut own, Gfn(5), Access::Read);
            assert_ne!(walk.err(), Some(WalkFault::Mmio), "there is memory");
            mmu.space(0).delete_slot(0).unwrap();
        }
    });
}

#[test]
fn a_frozen_entry_in_a_table_that_goes_is_waited_for() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    let mmu = &rig.mmu;
    let (reader, root) = (mmu.participants.reader_slot(), rig.root());
    let guard = Guard::new(&mmu.tables, mmu.participants.pin(&reader));
    let bottom = guard.child(guard.root(&root.table), 0).unwrap();
    let mine = bottom.load(3);
    bottom.replace(3, mine, Flat::FROZEN).unwrap();
    let pages = mmu.stats().pages[0];
    assert_eq!(pages, 1);
    thread::scope(|scope| {
        let promote = scope.spawn(|| {
            let mut vcpu = mmu.vcpu();
            mmu.fault(&mut vcpu, Fault::new(Gfn(9), Access::Write))
        });
        // It has cut the table off, frozen the entries before ours, and waits for it.
        while bottom.load(2) != Flat::FROZEN {
            thread::yield_now();
        }
        assert!(!promote.is_finished());
        bottom.replace(3, Flat::FROZEN, mine).unwrap();
        let level = Level::SIZE_2M;
        assert_eq!(promote.join().unwrap(), FaultOutcome::Fixed { level });
    });
    assert_eq!(
        (bottom.load(3), bottom.load(511)),
        (Flat::FROZEN, Flat::FROZEN)
    );
    drop(guard);
    assert_eq!(mmu.stats().pages[..2], [0, 1]);
}
