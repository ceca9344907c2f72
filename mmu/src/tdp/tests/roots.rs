//! Roots and headers.

use core::sync::atomic::Ordering::Relaxed;

use super::*;

#[test]
fn headers_describe_the_tree() {
    let mut rig = rig::<Deep>(64, MmuConfig::default());
    for gfn in [0, 513, (1 << 18) + 5] {
        rig.touch(gfn, Level::SIZE_4K);
    }
    let root = rig.mmu.space(0).root().unwrap().pfn;
    for frame in 0..4 {
        let header = rig.mmu.page_header(Pfn(root.0 + frame)).unwrap();
        assert_eq!((header.pfn, header.parent), (root, None), "frame {frame}");
        assert_eq!(header.role.level, Level::SIZE_512G);
    }
    let mut linked = 0;
    for frame in 0x400..0x440 {
        let Some(header) = rig.mmu.page_header(Pfn(frame)) else {
            continue;
        };
        let Some((parent, index)) = header.parent else {
            continue;
        };
        linked += 1;
        let parent = rig.mmu.page_header(parent).unwrap();
        assert_eq!(header.role.level.parent(), Some(parent.role.level));
        assert_eq!(Deep::index(header.gfn, parent.role.level), index);
        assert_eq!(Deep::align_down(header.gfn, parent.role.level), header.gfn);
        assert!(!header.role.invalid && !header.role.mirror && header.role.as_id == 0);
    }
    // One of 1 GiB entries, two of 2 MiB entries, three of pages.
    assert_eq!(linked, 6);
    assert_eq!(rig.mmu.page_header(Pfn(0)), None, "not table memory");
    rig.mmu.zap_all();
    // The vCPU holds the root until it loads another.
    assert!(rig.mmu.page_header(root).unwrap().role.invalid);
    rig.touch(0, Level::SIZE_4K);
    rig.mmu.reclaim();
    let headers = (0..4).filter_map(|frame| rig.mmu.page_header(Pfn(root.0 + frame)));
    assert!(headers.into_iter().all(|header| !header.role.invalid));
}

#[test]
fn the_mmu_keeps_a_valid_root_and_a_vcpu_a_withdrawn_one() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    let first = rig.root();
    assert_eq!(first.references.load(Relaxed), 2);
    let mut other = rig.mmu.vcpu();
    assert!(rig.mmu.load_root(&mut other, false));
    assert_eq!(first.references.load(Relaxed), 3);
    drop(other);
    rig.mmu.reclaim();
    assert_eq!(first.references.load(Relaxed), 2);
    assert_eq!(
        rig.mmu.space(0).root().unwrap(),
        first.root(),
        "seen, not kept"
    );
    assert_eq!(first.references.load(Relaxed), 2);
    rig.mmu.zap_all();
    assert_eq!(first.references.load(Relaxed), 1, "the vCPU's");
    assert_eq!((rig.mmu.stats().roots, rig.mmu.stats().pages[0]), (1, 0));
    drop(first);
    rig.touch(3, Level::SIZE_4K);
    rig.mmu.reclaim();
    let stats = rig.mmu.stats();
    assert_eq!((stats.roots, stats.tables_retired), (1, 0));
}

#[test]
fn a_fault_under_a_withdrawn_root_maps_nothing_there() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    let old = rig.root();
    rig.mmu.invalidate_roots();
    rig.touch(4, Level::SIZE_4K);
    assert!(!crate::sync::Counted::ptr_eq(&rig.root(), &old));
    assert_eq!(rig.mmu.stats().pages[0], 2, "one under either");
    rig.mmu.zap_invalidated_roots();
    assert_eq!(rig.mmu.stats().pages[0], 1);
}

#[test]
fn a_withdrawn_root_is_still_unmapped_from_and_owes_no_flush() {
    let mut rig = small();
    rig.touch(3, Level::SIZE_4K);
    let first = rig.mmu.space(0).root().unwrap();
    rig.flushed();
    rig.mmu.invalidate_roots();
    assert_eq!(rig.flushed(), [(Flush::All, FlushCause::Roots)]);
    assert!(rig.mmu.page_header(first.pfn).unwrap().role.invalid);
    assert_eq!(rig.mmu.stats().pages[0], 1);
    assert!(!rig.mmu.space(0).zap_gfn_range(range(3, 1)));
    assert_eq!((rig.mmu.stats().pages[0], rig.flushed()), (0, vec![]));
    let second = rig.mmu.space(0).root().unwrap();
    assert!(second.generation > first.generation && second.pfn != first.pfn);
    rig.mmu.zap_invalidated_roots();
    assert_eq!(rig.flushed(), []);
}

#[test]
fn a_root_is_zapped_level_by_level_and_to_the_last_table() {
    let mut rig = rig::<Deep>(128, MmuConfig::default());
    for gfn in [0, 513, 1 << 18, (1 << 19) + 7] {
        rig.touch(gfn, Level::SIZE_4K);
    }
    rig.touch(2048, Level::SIZE_2M);
    rig.mmu.withdraw_for_test();
    let root = rig.mmu.roots.lock()[0].clone();
    let tables = || rig.mmu.stats().tables - rig.mmu.stats().tables_retired;
    let before = tables();
    let zapper = rig.mmu.participants.reader_slot();
    let reader = rig.mmu.participants.reader_slot();
    let _inside = rig.mmu.participants.pin(&reader);
    let mut gone = vec![];
    for level in [Level::SIZE_1G, Level::SIZE_512G] {
        let session = Session::begin(&rig.mmu, &zapper, Mode::Shared, FlushCause::Roots, 0);
        rig.mmu.cut_tables(session, &root, level).finish();
        gone.push(before - tables());
    }
    // The four tables of pages with the three above; then the one below the root.
    assert_eq!(gone, [7, 8]);
}

#[test]
fn dropping_the_mmu_gives_everything_back() {
    let mut rig = small();
    rig.touch(0, Level::SIZE_4K);
    rig.mmu.invalidate_roots();
    rig.touch(700, Level::SIZE_4K);
    let Rig {
        arena, vcpu, mmu, ..
    } = rig;
    assert!(arena.used_frames() > 10);
    drop(vcpu);
    drop(mmu);
    assert_eq!(arena.used_frames(), 0);
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    fn withdraw_for_test(&self) {
        self.do_invalidate_roots();
    }
}
