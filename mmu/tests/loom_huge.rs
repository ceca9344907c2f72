//! Huge leaves split and recovered beside faults, walks and each other.
#![cfg(feature = "loom")]

mod loom_scene;

use std::sync::Arc;

use loom_scene::{HARDWARE, SOFTWARE, Scene, Tiny, both, explore};
use slat_mmu::{Access, Fault, Gfn, GfnRange, Level, MmuConfig, SecondStage, SlotFlags};

fn huge<const BREAK: bool, const AD: u8>() -> (Arc<Scene<Tiny<2, BREAK, AD>>>, slat_mmu::Vcpu) {
    let scene = Scene::new(2, 24, MmuConfig::default());
    let mut vcpu = scene.vcpu();
    scene.fault(&mut vcpu, Fault::new(Gfn(0), Access::Write));
    let to = scene.mmu.space(0).translate(Gfn(1)).unwrap();
    assert_eq!(to.level, Level::SIZE_2M);
    (scene, vcpu)
}

fn split<const BREAK: bool>() {
    let (scene, mut a) = huge::<BREAK, SOFTWARE>();
    let beside = Arc::clone(&scene);
    both(
        move || {
            // Translates to the same frame before, during and after; a moment without a mapping is
            // for formats that break.
            beside.touch(0, &mut a, Fault::new(Gfn(1), Access::Write), |_| {});
            if !BREAK {
                assert!(beside.mmu.space(0).translate(Gfn(0)).is_some());
            }
        },
        || {
            let range = GfnRange::new(Gfn(0), 2);
            assert_eq!(
                scene.mmu.space(0).split_huge_pages(range, Level::SIZE_4K),
                0
            );
        },
    );
    scene.settled();
}

#[test]
fn fault_beside_a_split() {
    explore("fault x split", 3, split::<false>);
    explore("fault x split, break before make", 3, split::<true>);
}

fn two_splits<const BREAK: bool>() {
    let (scene, a) = huge::<BREAK, SOFTWARE>();
    drop(a);
    let beside = Arc::clone(&scene);
    both(
        move || {
            beside
                .mmu
                .space(0)
                .write_protect_gfn(Gfn(0), Level::SIZE_2M);
        },
        || {
            let range = GfnRange::new(Gfn(0), 2);
            scene.mmu.space(0).split_huge_pages(range, Level::SIZE_4K);
        },
    );
    scene.settled();
}

#[test]
fn write_protection_beside_a_split() {
    explore("write-protect x split", 3, two_splits::<false>);
    explore(
        "write-protect x split, break before make",
        3,
        two_splits::<true>,
    );
}

/// Logging goes off and huge pages come back while a vCPU faults in the tables that go.
fn recover<const BREAK: bool>() {
    let config = MmuConfig::default();
    let scene = Scene::<Tiny<2, BREAK, SOFTWARE>>::logging(1, 16, config);
    let mut a = scene.vcpu();
    scene.map(&mut a, 0, Access::Write);
    let beside = Arc::clone(&scene);
    both(
        move || beside.write(0, &mut a, 1, 5),
        || {
            scene
                .mmu
                .space(0)
                .set_slot_flags(0, SlotFlags::empty())
                .unwrap();
        },
    );
    let to = scene.mmu.space(0).translate(Gfn(1)).unwrap();
    assert!(to.writable && to.level == Level::SIZE_2M, "{to:?}");
    scene.settled();
}

#[test]
fn fault_beside_a_recovery() {
    explore("fault x recover", 2, recover::<false>);
    explore("fault x recover, break before make", 2, recover::<true>);
}

/// The frozen entry of a break-before-make split lies in a table that a recovery a level up would
/// tear down; here the invalidation of the range comes in between.
#[test]
fn invalidation_beside_a_split() {
    explore("invalidate x split, break before make", 3, || {
        let (scene, a) = huge::<true, HARDWARE>();
        drop(a);
        let beside = Arc::clone(&scene);
        both(
            move || {
                let range = GfnRange::new(Gfn(0), 2);
                beside.mmu.space(0).split_huge_pages(range, Level::SIZE_4K);
            },
            || {
                scene.mmu.space(0).zap_gfn_range(GfnRange::new(Gfn(1), 1));
                assert!(scene.mmu.space(0).translate(Gfn(1)).is_none());
            },
        );
        scene.settled();
    });
}
