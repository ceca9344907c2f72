//! Batches of changes of a mirror beside each other, and beside all that takes mappings away.
//!
//! The owner checks each request against what it has: a frame that two batches had at once, or one
//! that was asked for in the wrong order, would be mapped twice, or unmapped when it is not there.
#![cfg(feature = "loom")]

mod loom_scene;

use std::sync::{Arc, atomic::Ordering::Relaxed};

use loom_scene::{Owner, Page, Scene, Tiny, both, explore, small};
use slat_mmu::{
    Access, Around, Fault, FaultOutcome, Gfn, GfnRange, MmuConfig, Pfn, SecondStage, SlotFlags,
    SlotSpec,
};

fn scene(vcpus: usize) -> Arc<Scene> {
    let owner = Some(Owner::default());
    let flags = SlotFlags::empty();
    Scene::<Tiny>::with(vcpus, 16, MmuConfig::default(), flags, owner)
}

fn fault(gfn: u64, access: Access) -> Fault {
    small(gfn, access).with_mirror()
}

fn range(gfns: std::ops::Range<u64>) -> GfnRange {
    GfnRange::new(Gfn(gfns.start), gfns.end - gfns.start)
}

fn owner(scene: &Scene) -> &Owner {
    scene.guest.owner.as_ref().unwrap()
}

/// The mirror and the owner say the same, and it is what is counted.
fn agreed(scene: &Scene) -> Vec<Page> {
    let listed = scene.mmu.space(0).mirror_leaves(range(0..u64::MAX));
    let listed = listed.map(|found| (found.gfn, found.leaf.pfn, found.leaf.writable));
    let listed: Vec<_> = listed.collect();
    assert_eq!(listed, owner(scene).mapped());
    assert_eq!(scene.mmu.stats().pages[0], listed.len() as i64);
    listed
}

/// Nothing is left of a scene whose vCPUs are gone. The owner keeps the mirror's tables until then.
fn gone(scene: Arc<Scene>) {
    let scene = Arc::into_inner(scene).expect("every thread has ended");
    let (frames, guest) = (Arc::clone(&scene.frames), Arc::clone(&scene.guest));
    drop(scene);
    assert_eq!(frames.live(), 0, "frames leaked");
    let owner = guest.owner.as_ref().unwrap();
    assert_eq!(owner.mapped(), []);
    assert_eq!(owner.tables.load(Relaxed), 0);
}

#[test]
fn a_fault_beside_an_unmapping() {
    explore("mirror fault x unmap", 2, || {
        let scene = scene(1);
        let mut a = scene.mmu.vcpu();
        scene.fault(&mut a, fault(0, Access::Read));
        let beside = Arc::clone(&scene);
        both(
            move || beside.fault_once(&mut a, fault(1, Access::Read)),
            || {
                scene.mmu.space(0).zap_gfn_range(range(0..2));
            },
        );
        assert!(agreed(&scene).len() <= 1);
        assert_eq!(owner(&scene).tables.load(Relaxed), 1);
        gone(scene);
    });
}

/// From the beginning of an invalidation to its end nothing is mapped, however the fault's batch
/// lies to it.
#[test]
fn a_fault_beside_an_invalidation() {
    explore("mirror fault x invalidate", 2, || {
        let scene = scene(1);
        let mut a = scene.mmu.vcpu();
        scene.fault(&mut a, fault(2, Access::Read));
        let beside = Arc::clone(&scene);
        both(
            move || beside.fault_once(&mut a, fault(3, Access::Write)),
            || {
                let token = scene.mmu.space(0).invalidate_begin(range(3..4), true);
                let mapped = owner(&scene).mapped();
                assert!(mapped.iter().all(|page| page.0 == Gfn(2)), "{mapped:?}");
                scene.mmu.invalidate_end(token).unwrap();
            },
        );
        agreed(&scene);
        gone(scene);
    });
}

/// Two vCPUs fault the same frame of a mirror, with the same neighbour: the owner is asked once for
/// each.
#[test]
fn a_fault_beside_a_fault() {
    explore("mirror fault x fault", 2, || {
        let scene = scene(2);
        let (mut a, mut b) = (scene.mmu.vcpu(), scene.mmu.vcpu());
        scene.fault(&mut a, fault(2, Access::Read));
        scene.fault(&mut b, fault(2, Access::Read));
        let around = Around::new(range(0..2));
        let beside = Arc::clone(&scene);
        both(
            move || {
                let _ = beside
                    .mmu
                    .fault_range(&mut a, fault(0, Access::Read), around);
            },
            || {
                let _ = scene
                    .mmu
                    .fault_range(&mut b, fault(1, Access::Read), around);
                drop(b);
            },
        );
        assert_eq!(agreed(&scene).len(), 3);
        gone(scene);
    });
}

/// A write fault and protection of the same page.
#[test]
fn a_write_beside_protection() {
    explore("mirror write x protect", 2, || {
        let scene = scene(1);
        let mut a = scene.mmu.vcpu();
        scene.fault(&mut a, fault(0, Access::Read).read_only());
        let beside = Arc::clone(&scene);
        both(
            move || {
                beside.fault_once(&mut a, fault(0, Access::Write));
                beside.fault_once(&mut a, fault(1, Access::Write));
            },
            || {
                let change = scene.mmu.space(0).write_protect_mirror(range(0..2));
                assert_eq!(change.kept, 0);
            },
        );
        assert_eq!(agreed(&scene).len(), 2);
        gone(scene);
    });
}

/// The mirror is withdrawn, and its tables given back, while a batch is under way. The batch
/// touches none of them, and does nothing to what came after.
#[test]
fn a_fault_beside_a_withdrawal() {
    explore("mirror fault x withdraw", 2, || {
        let scene = scene(1);
        let mut a = scene.mmu.vcpu();
        scene.fault(&mut a, fault(0, Access::Read));
        let beside = Arc::clone(&scene);
        both(
            move || {
                beside.fault_once(&mut a, fault(1, Access::Write));
                // The last to have the old root loaded lets go of it here.
                drop(a);
                beside.mmu.reclaim();
            },
            || {
                let since = scene.mmu.space(0).withdraw_mirrors();
                owner(&scene).since.store(since, Relaxed);
                scene.mmu.zap_invalidated_roots();
            },
        );
        // What is mapped was mapped in the new view, for the new root.
        assert!(agreed(&scene).len() <= 1);
        scene.mmu.reclaim();
        let stats = scene.mmu.stats();
        assert!(stats.roots <= 1, "{stats:?}");
        assert_eq!(stats.tables_retired, 0);
        let (frames, guest) = (Arc::clone(&scene.frames), Arc::clone(&scene.guest));
        drop(scene);
        assert_eq!(frames.live(), 0, "frames leaked");
        assert_eq!(guest.owner.as_ref().unwrap().mapped(), []);
    });
}

/// When a slot is deleted nothing of it is mapped, and what comes in its place is mapped right.
#[test]
fn a_fault_beside_a_deletion() {
    explore("mirror fault x delete", 2, || {
        let scene = scene(1);
        let mut a = scene.mmu.vcpu();
        scene.fault(&mut a, fault(0, Access::Read));
        let beside = Arc::clone(&scene);
        both(
            move || beside.fault_once(&mut a, fault(1, Access::Write)),
            || {
                scene.mmu.space(0).delete_slot(0).unwrap();
                let mapped = owner(&scene).mapped();
                assert_eq!(mapped, [], "a deleted slot's");
                let spec = SlotSpec::new(0, Gfn(0), 4, Pfn(0x2000));
                scene.mmu.create_slot(spec).unwrap();
            },
        );
        for (gfn, pfn, _) in agreed(&scene) {
            assert_eq!(pfn, Pfn(0x2000 + gfn.0));
        }
        gone(scene);
    });
}

/// A vCPU that is told to try again gets its page in the end, whoever has its entry.
#[test]
fn a_fault_ends() {
    explore("mirror fault until it ends x unmap", 2, || {
        let scene = scene(1);
        let mut a = scene.mmu.vcpu();
        scene.fault(&mut a, fault(0, Access::Read));
        let beside = Arc::clone(&scene);
        both(
            move || {
                loop {
                    let outcome = beside.mmu.fault(&mut a, fault(0, Access::Write));
                    match outcome {
                        FaultOutcome::Retry => loom::thread::yield_now(),
                        FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => break,
                        other => panic!("{other:?}"),
                    }
                }
            },
            || {
                scene.mmu.space(0).zap_mirror(range(0..1));
            },
        );
        agreed(&scene);
        gone(scene);
    });
}
