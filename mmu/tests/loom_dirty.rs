//! The dirty log beside writers: no write is lost.
//!
//! The oracle is that of a migration: what a harvest reports is copied after it; when the writer
//! has stopped and a last harvest is copied too, the copy is the memory.
#![cfg(feature = "loom")]

mod loom_scene;

use std::sync::Arc;

use loom_scene::{DIRTY_BIT, HARDWARE, SOFTWARE, Scene, Tiny, both, explore, small};
use slat_mmu::{
    Access, DirtyLogStart, Fault, Format, Gfn, GfnRange, Level, MmuConfig, SecondStage, SlotFlags,
};

/// One page is written once while a harvest runs. `before` prepares the page.
fn harvest<F: Format>(start: DirtyLogStart, before: fn(&Scene<F>, &mut slat_mmu::Vcpu)) {
    let config = MmuConfig::default().with_dirty_log_start(start);
    let scene = Scene::<F>::logging(1, 16, config);
    let mut a = scene.vcpu();
    before(&scene, &mut a);
    let beside = Arc::clone(&scene);
    let mut copy = 0;
    both(
        move || {
            beside.write(0, &mut a, 1, 7);
        },
        || {
            if scene.harvest() & 2 != 0 {
                copy = scene.contents(1);
            }
        },
    );
    let last = scene.harvest();
    if last & 2 != 0 {
        copy = scene.contents(1);
    }
    assert_eq!(scene.contents(1), 7);
    assert_eq!(copy, 7, "written and never reported");
    scene.settled();
}

#[test]
fn a_write_that_faults() {
    let scene = || harvest::<Tiny>(DirtyLogStart::Protected, |_, _| {});
    explore("harvest x write, slow fault", 3, scene);
}

#[test]
fn a_write_to_a_page_whose_bit_is_set() {
    // The bit is there before the write, so the writer has nothing to set unless the harvest takes
    // it first.
    let scene = || {
        harvest::<Tiny>(DirtyLogStart::InitiallySet, |scene, vcpu| {
            scene.map(vcpu, 1, Access::Read);
        });
    };
    explore("harvest x write, fast fault, bit set", 3, scene);
}

#[test]
fn a_write_through_the_fast_path() {
    let scene = || {
        harvest::<Tiny>(DirtyLogStart::Protected, |scene, vcpu| {
            scene.write(0, vcpu, 1, 3);
            assert_eq!(scene.harvest(), 2);
        });
    };
    explore("harvest x write, fast fault", 3, scene);
}

#[test]
fn a_write_to_a_writable_page() {
    let scene = || {
        harvest::<Tiny>(DirtyLogStart::Protected, |scene, vcpu| {
            scene.write(0, vcpu, 1, 3);
        });
    };
    explore("harvest x write, writable page", 3, scene);
}

#[test]
fn hardware_sets_dirty() {
    let scene = || {
        harvest::<Tiny<2, false, DIRTY_BIT>>(DirtyLogStart::Protected, |scene, vcpu| {
            scene.write(0, vcpu, 1, 3);
            assert_eq!(scene.harvest(), 2);
        });
    };
    explore("harvest x write, hardware D", 3, scene);
    let scene = || {
        harvest::<Tiny<2, false, DIRTY_BIT>>(DirtyLogStart::InitiallySet, |scene, vcpu| {
            scene.map(vcpu, 1, Access::Read);
        });
    };
    explore("harvest x write, hardware D, bit set", 3, scene);
}

#[test]
fn a_write_through_hardware_walks() {
    let scene = || {
        harvest::<Tiny<2, false, HARDWARE>>(DirtyLogStart::InitiallySet, |scene, vcpu| {
            scene.write(0, vcpu, 1, 3);
        });
    };
    explore("harvest x write, hardware A/D", 3, scene);
}

/// Two vCPUs share a page: one's fault makes it writable, the other writes without one.
#[test]
fn a_write_beside_another_ones_fault() {
    explore("harvest x two writers", 2, || {
        let scene = Scene::<Tiny>::logging(2, 16, MmuConfig::default());
        let (mut a, mut b) = (scene.vcpu(), scene.vcpu());
        scene.write(0, &mut a, 1, 1);
        assert_eq!(scene.harvest(), 2);
        let (one, two) = (Arc::clone(&scene), Arc::clone(&scene));
        let one =
            loom::thread::spawn(move || one.fault(&mut a, small(1, Access::Write).with_present()));
        let two = loom::thread::spawn(move || two.write(1, &mut b, 1, 7));
        let mut copy = 0;
        if scene.harvest() & 2 != 0 {
            copy = scene.contents(1);
        }
        one.join().unwrap();
        two.join().unwrap();
        if scene.harvest() & 2 != 0 {
            copy = scene.contents(1);
        }
        assert_eq!(copy, 7, "written and never reported");
        scene.settled();
    });
}

/// Logging goes on while a page is written; the first copy is of everything, after it is on.
fn enable<F: Format>(huge: bool) {
    let scene = Scene::<F>::new(1, 16, MmuConfig::default());
    let mut a = scene.vcpu();
    let mut first = small(1, Access::Write);
    if huge {
        first = first.with_max_level(Level::SIZE_2M);
    }
    scene.fault(&mut a, first);
    let beside = Arc::clone(&scene);
    let mut copy = 0;
    both(
        move || {
            beside.touch(0, &mut a, first, |guest| {
                guest.memory[1].store(7, std::sync::atomic::Ordering::Relaxed)
            })
        },
        || {
            scene
                .mmu
                .space(0)
                .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                .unwrap();
            copy = scene.contents(1);
        },
    );
    if scene.harvest() & 2 != 0 {
        copy = scene.contents(1);
    }
    assert_eq!(copy, 7, "written and never reported");
    scene.settled();
}

#[test]
fn logging_goes_on() {
    explore("enable x write", 2, || enable::<Tiny>(false));
    explore("enable x write, huge page", 2, || enable::<Tiny>(true));
    explore("enable x write, huge page, hardware D", 2, || {
        enable::<Tiny<2, false, DIRTY_BIT>>(true);
    });
    explore("enable x write, huge page, break before make", 2, || {
        enable::<Tiny<2, true, SOFTWARE>>(true);
    });
}

/// Ageing changes entries without a lock beside the plain stores of the sweep that protects.
#[test]
fn ageing_beside_protection() {
    explore("age x protect", 3, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.map(&mut a, 0, Access::Write);
        drop(a);
        let beside = Arc::clone(&scene);
        both(
            move || {
                beside.mmu.space(0).age(GfnRange::new(Gfn(0), 4));
            },
            || {
                scene
                    .mmu
                    .space(0)
                    .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                    .unwrap();
            },
        );
        let to = scene.mmu.space(0).translate(Gfn(0)).unwrap();
        assert!(!to.writable, "protected and writable");
        scene.settled();
    });
}

/// The sweep that protects under the shared lock, beside the zap of the roots that it found valid.
#[test]
fn protection_beside_a_fast_zap() {
    explore("protect x fast zap", 2, || {
        let scene = Scene::<Tiny>::new(1, 16, MmuConfig::default());
        let mut a = scene.vcpu();
        scene.fault(
            &mut a,
            Fault::new(Gfn(0), Access::Write).with_max_level(Level::SIZE_4K),
        );
        drop(a);
        let beside = Arc::clone(&scene);
        both(
            move || beside.mmu.zap_all(),
            || {
                scene
                    .mmu
                    .space(0)
                    .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                    .unwrap();
            },
        );
        scene.settled();
    });
}
