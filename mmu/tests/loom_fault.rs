//! Faults beside faults.
#![cfg(feature = "loom")]

mod loom_scene;

use std::sync::Arc;

use loom_scene::{HARDWARE, HOST, SOFTWARE, Scene, Tiny, both, explore, small};
use slat_mmu::{
    Access, Fault, FaultOutcome, Format, Gfn, GfnRange, Level, MmuConfig, Pfn, SecondStage,
    SlotSpec, WalkFault,
};

fn two_faults<F: Format>(one: Fault, other: Fault) -> impl Fn() + Send + Sync + 'static {
    move || {
        let scene = Scene::<F>::new(2, 16, MmuConfig::default());
        let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
        let beside = Arc::clone(&scene);
        both(
            move || beside.fault(&mut a, one),
            || {
                scene.fault(&mut b, other);
                drop(b);
            },
        );
        for fault in [one, other] {
            let to = scene.mmu.space(0).translate(fault.gfn).unwrap();
            assert!(to.writable || fault.access != Access::Write);
        }
        scene.settled();
    }
}

#[test]
fn the_same_entry() {
    let scene = two_faults::<Tiny<3>>(small(0, Access::Read), small(0, Access::Write));
    explore("fault x fault, same entry", 3, scene);
}

#[test]
fn the_same_table() {
    let scene = two_faults::<Tiny<3>>(small(0, Access::Write), small(1, Access::Write));
    explore("fault x fault, same table", 3, scene);
}

#[test]
fn neighbouring_tables() {
    let scene = two_faults::<Tiny<3>>(small(1, Access::Write), small(2, Access::Write));
    explore("fault x fault, neighbouring tables", 3, scene);
}

#[test]
fn a_root_is_made_once() {
    explore("fault x fault, no root yet", 3, || {
        let scene = Scene::<Tiny>::new(2, 16, MmuConfig::default());
        let (mut a, mut b) = (scene.mmu.vcpu(), scene.mmu.vcpu());
        let beside = Arc::clone(&scene);
        both(
            move || beside.fault(&mut a, small(0, Access::Read)),
            || {
                scene.fault(&mut b, small(1, Access::Read));
                drop(b);
            },
        );
        assert_eq!(scene.mmu.stats().roots, 1);
        scene.settled();
    });
}

/// A huge leaf takes the place of a table into which another vCPU installs.
fn collapse<const BREAK: bool>() {
    let scene = Scene::<Tiny<2, BREAK, SOFTWARE>>::new(2, 16, MmuConfig::default());
    let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
    scene.map(&mut a, 0, Access::Read);
    let beside = Arc::clone(&scene);
    both(
        move || beside.fault(&mut a, Fault::new(Gfn(1), Access::Write)),
        || {
            scene.touch(1, &mut b, small(1, Access::Read), |_| {});
            drop(b);
        },
    );
    let to = scene.mmu.space(0).translate(Gfn(1)).unwrap();
    assert!(to.writable && to.level == Level::SIZE_2M, "{to:?}");
    scene.settled();
}

#[test]
fn a_table_becomes_a_leaf_under_a_fault() {
    explore("huge fault x fault in the table", 2, collapse::<false>);
    explore(
        "huge fault x fault in the table, break before make",
        2,
        collapse::<true>,
    );
}

/// A vCPU remembers the table of its last fault while another one's huge fault takes that table
/// away and gives it back.
#[test]
fn a_remembered_table_goes() {
    explore("hint x retire", 3, || {
        let scene = Scene::<Tiny>::new(2, 16, MmuConfig::default());
        let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
        scene.map(&mut a, 0, Access::Read);
        scene.map(&mut b, 0, Access::Read);
        scene.mmu.space(0).age(GfnRange::new(Gfn(0), 1));
        let beside = Arc::clone(&scene);
        both(
            move || {
                beside.fault(&mut a, Fault::new(Gfn(1), Access::Write));
                beside.mmu.reclaim();
            },
            || {
                scene.fault(&mut b, small(1, Access::Read));
                drop(b);
            },
        );
        scene.settled();
    });
}

/// The same, where the walk that finds the table comes before it is taken away and its next use
/// after it was given back.
#[test]
fn a_table_is_remembered_as_of_before_its_walk() {
    explore("hint x retire x hint", 2, || {
        let scene = Scene::<Tiny>::new(2, 16, MmuConfig::default());
        let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
        scene.map(&mut a, 0, Access::Read);
        scene.map(&mut b, 2, Access::Read);
        let beside = Arc::clone(&scene);
        both(
            move || {
                beside.fault(&mut a, Fault::new(Gfn(1), Access::Write));
                beside.mmu.reclaim();
            },
            || {
                // The first walks, the second walks there again and remembers; the third begins
                // with what is remembered.
                scene.fault(&mut b, small(1, Access::Read));
                scene.fault(&mut b, small(0, Access::Read));
                scene.fault(&mut b, small(1, Access::Read));
                drop(b);
            },
        );
        scene.settled();
    });
}

#[test]
fn prefault_beside_a_write() {
    explore("prefault x fault", 3, || {
        let scene = Scene::<Tiny<2, false, HARDWARE>>::logging(2, 16, MmuConfig::default());
        let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
        let beside = Arc::clone(&scene);
        both(
            move || {
                let range = GfnRange::new(Gfn(0), 4);
                let done = beside.mmu.prefault(&mut a, range, Level::SIZE_4K);
                assert_eq!(done, Ok(4));
            },
            || {
                scene.write(1, &mut b, 1, 7);
                drop(b);
            },
        );
        assert_eq!(scene.mmu.space(0).dirty_pages(0), Ok(1));
        scene.settled();
    });
}

/// A hole is looked up, gets a slot, and is remembered: it must be remembered as what it was, not
/// as what it has become.
#[test]
fn a_hole_that_gets_a_slot() {
    explore("fault on a hole x slot", 2, || {
        let config = MmuConfig::default().with_mmio_caching(true);
        let scene = Scene::<Tiny>::new(2, 16, config);
        let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
        scene.mmu.space(0).delete_slot(0).unwrap();
        let beside = Arc::clone(&scene);
        both(
            move || {
                let outcome = beside.mmu.fault(&mut a, small(1, Access::Read));
                assert!(
                    matches!(outcome, FaultOutcome::NoSlot | FaultOutcome::Fixed { .. }),
                    "{outcome:?}"
                );
            },
            || {
                let slot = SlotSpec::new(0, Gfn(0), 4, Pfn(HOST));
                scene.mmu.create_slot(slot).unwrap();
                // The slot is there, so the guest's accesses are to memory.
                let access = scene.mmu.access(&mut b, Gfn(1), Access::Read);
                assert_ne!(access.err(), Some(WalkFault::Mmio));
            },
        );
        let access = scene.mmu.access(&mut b, Gfn(1), Access::Read);
        assert_ne!(access.err(), Some(WalkFault::Mmio));
        scene.touch(1, &mut b, small(1, Access::Read), |_| {});
        drop(b);
        scene.settled();
    });
}
