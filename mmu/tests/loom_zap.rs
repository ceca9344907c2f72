//! Faults and walks beside everything that takes mappings, tables and roots away.
#![cfg(feature = "loom")]

mod loom_scene;

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom_scene::{HARDWARE, Scene, Tiny, both, explore, small};
use slat_mmu::{Access, Fault, FaultOutcome, Gfn, GfnRange, MmuConfig, SecondStage, SlotSpec};

#[test]
fn unmap() {
    explore("fault x unmap", 3, || {
        let scene = Scene::<Tiny>::new(2, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 0, Access::Write);
        let beside = Arc::clone(&scene);
        both(
            move || beside.touch(0, &mut a, small(1, Access::Write), |_| {}),
            || {
                scene.mmu.space(0).zap_gfn_range(GfnRange::new(Gfn(0), 2));
            },
        );
        assert!(scene.mmu.space(0).translate(Gfn(0)).is_none());
        scene.settled();
    });
}

/// A page's memory, which the host changes while the guest has no way to it.
struct Page(UnsafeCell<u64>);

// SAFETY: whether accesses are ordered is what the models check; loom fails them if they are not.
unsafe impl Sync for Page {}

impl Page {
    fn read(&self) {
        // SAFETY: as above.
        self.0.with(|page| unsafe { *page });
    }

    fn replace(&self) {
        // SAFETY: as above.
        self.0.with_mut(|page| unsafe { *page += 1 });
    }
}

/// The host takes a page's memory away between begin and end. No access that was translated before
/// may still be under way, and none may be translated meanwhile: each would race with the host's
/// own write. The fault is told of `fault`.
fn invalidate(fault: Fault, config: MmuConfig) {
    let scene = Scene::<Tiny>::new(1, 16, config);
    let mut a = scene.vcpu();
    let page = Arc::new(Page(UnsafeCell::new(0)));
    let (beside, mine) = (Arc::clone(&scene), Arc::clone(&page));
    both(
        move || {
            for _ in 0..2 {
                let seq = beside.mmu.invalidate_seq();
                beside.fault_once(&mut a, fault.with_seq(seq));
                let inside = beside.guest.enter(0);
                if beside.mmu.access(&mut a, Gfn(1), Access::Read).is_ok() {
                    mine.read();
                }
                drop(inside);
            }
        },
        || {
            let token = scene
                .mmu
                .space(0)
                .invalidate_begin(GfnRange::new(Gfn(1), 1), true);
            page.replace();
            // Where the memory comes from next is told to vCPUs by the lock that the end takes.
            scene.mmu.invalidate_end(token).unwrap();
        },
    );
    scene.settled();
}

#[test]
fn invalidation() {
    explore("fault x invalidate", 2, || {
        invalidate(small(1, Access::Read), MmuConfig::default());
    });
}

#[test]
fn invalidation_of_a_part_of_a_huge_page() {
    explore("huge fault beside x invalidate", 2, || {
        invalidate(Fault::new(Gfn(0), Access::Read), MmuConfig::default());
    });
}

/// Unmapping under a withdrawn root owes no flush, because whoever withdrew it has flushed: an
/// access that was translated before the withdrawal is over when the host takes the memory.
#[test]
fn invalidation_beside_a_withdrawal() {
    explore("access x withdrawal x invalidate", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 1, Access::Read);
        let page = Arc::new(Page(UnsafeCell::new(0)));
        let (guest, mine) = (Arc::clone(&scene), Arc::clone(&page));
        let vcpu = loom::thread::spawn(move || {
            let inside = guest.guest.enter(0);
            if guest.mmu.access(&mut a, Gfn(1), Access::Read).is_ok() {
                mine.read();
            }
            drop(inside);
        });
        let beside = Arc::clone(&scene);
        let withdrawal = loom::thread::spawn(move || beside.mmu.invalidate_roots());
        let token = scene
            .mmu
            .space(0)
            .invalidate_begin(GfnRange::new(Gfn(1), 1), true);
        page.replace();
        scene.mmu.invalidate_end(token).unwrap();
        vcpu.join().unwrap();
        withdrawal.join().unwrap();
        scene.settled();
    });
}

#[test]
fn fast_zap() {
    explore("fault x fast zap", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 0, Access::Write);
        let beside = Arc::clone(&scene);
        both(
            move || beside.touch(0, &mut a, small(1, Access::Write), |_| {}),
            || scene.mmu.zap_all(),
        );
        assert!(scene.mmu.space(0).translate(Gfn(0)).is_none());
        scene.settled();
    });
}

#[test]
fn two_fast_zaps() {
    explore("fast zap x fast zap", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 0, Access::Write);
        drop(a);
        let beside = Arc::clone(&scene);
        both(move || beside.mmu.zap_all(), || scene.mmu.zap_all());
        assert!(scene.mmu.space(0).translate(Gfn(0)).is_none());
        scene.settled();
    });
}

/// A walk that began before a table was given back never touches it afterwards; the memory fails
/// the model if it does.
#[test]
fn walk_beside_the_freeing_of_its_tables() {
    explore("walk x table free", 2, || {
        let scene = Scene::<Tiny<3>>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 5, Access::Read);
        drop(a);
        let beside = Arc::clone(&scene);
        both(
            move || {
                let mut slot = beside.mmu.walker();
                for _ in 0..2 {
                    let mut walker = slot.enter();
                    let before = walker.translate(Gfn(5));
                    let after = walker.translate(Gfn(5));
                    assert!(before.is_some() || after.is_none(), "it came back");
                }
            },
            || {
                scene.mmu.zap_all();
                scene.mmu.reclaim();
            },
        );
        scene.settled();
    });
}

#[test]
fn root_given_up_beside_its_withdrawal() {
    explore("root put x invalidate", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let a = scene.vcpu();
        drop(a);
        let beside = Arc::clone(&scene);
        both(
            move || {
                // Taken and given up at once; and by a vCPU that comes and goes.
                assert!(beside.mmu.space(0).root().is_some());
                beside.mmu.reclaim();
            },
            || {
                scene.mmu.invalidate_roots();
                scene.mmu.zap_invalidated_roots();
            },
        );
        scene.settled();
    });
}

#[test]
fn root_loaded_beside_its_withdrawal() {
    explore("root load x fast zap", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        let beside = Arc::clone(&scene);
        both(
            move || {
                assert!(beside.mmu.load_root(&mut a).is_some());
                drop(a);
                beside.mmu.reclaim();
            },
            || scene.mmu.zap_all(),
        );
        scene.settled();
    });
}

/// A hardware walker's access beside the withdrawal of its root: it must not wait for the one who
/// flushes.
#[test]
fn access_beside_a_withdrawal() {
    explore("access x withdrawal", 3, || {
        let scene = Scene::<Tiny<2, false, HARDWARE>>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 0, Access::Read);
        let beside = Arc::clone(&scene);
        both(
            move || {
                let inside = beside.guest.enter(0);
                let _ = beside.mmu.access(&mut a, Gfn(0), Access::Write);
                drop(inside);
                drop(a);
            },
            || scene.mmu.invalidate_roots(),
        );
        scene.settled();
    });
}

#[test]
fn delete_beside_a_fault() {
    explore("fault x slot delete and create", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 0, Access::Write);
        let beside = Arc::clone(&scene);
        both(
            move || {
                if let Ok(to) = beside.mmu.access(&mut a, Gfn(0), Access::Read) {
                    assert_eq!(to.pfn.0, loom_scene::HOST);
                }
                let outcome = beside.mmu.fault(&mut a, small(1, Access::Write));
                assert!(
                    matches!(
                        outcome,
                        FaultOutcome::Fixed { .. } | FaultOutcome::NoSlot | FaultOutcome::Retry
                    ),
                    "{outcome:?}"
                );
                drop(a);
            },
            || {
                scene.mmu.space(0).delete_slot(0).unwrap();
                for gfn in 0..4 {
                    assert_eq!(
                        scene.mmu.space(0).translate(Gfn(gfn)),
                        None,
                        "mapped without a slot"
                    );
                }
            },
        );
        scene.settled();
    });
}

#[test]
fn move_beside_a_fault() {
    explore("fault x slot move", 2, || {
        let scene = Scene::<Tiny<3>>::new(1, 16, MmuConfig::default());
        scene.mmu.space(0).delete_slot(0).unwrap();
        let spec = SlotSpec::new(0, Gfn(0), 2, slat_mmu::Pfn(loom_scene::HOST));
        scene.mmu.create_slot(spec).unwrap();
        let mut a = scene.vcpu();
        let beside = Arc::clone(&scene);
        both(
            move || {
                let _ = beside.mmu.fault(&mut a, small(0, Access::Write));
                drop(a);
            },
            || scene.mmu.space(0).move_slot(0, Gfn(4)).unwrap(),
        );
        assert_eq!(scene.mmu.space(0).translate(Gfn(0)), None, "the old place");
        assert_eq!(scene.mmu.stats().pages, [0; 5]);
        scene.mmu.zap_all();
        scene.mmu.reclaim();
        assert_eq!(scene.frames.live(), 0);
    });
}
