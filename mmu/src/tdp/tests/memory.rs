//! Memory for tables that runs out, and tables that readers hold.

use super::*;

/// Takes all but `left` frames.
fn hog(arena: &Arena, left: usize) -> Vec<Pfn> {
    let mut taken = vec![];
    while arena.frames() - arena.used_frames() > left {
        taken.push(arena.allocate(4096).unwrap());
    }
    taken
}

fn give_back(arena: &Arena, taken: Vec<Pfn>) {
    for pfn in taken {
        #[expect(unsafe_code, reason = "gives back what the test took")]
        // SAFETY: allocated by `hog` with this size and never used.
        unsafe {
            arena.free(pfn, 4096);
        }
    }
}

#[test]
fn running_out_of_memory_loses_nothing() {
    let mut rig = small();
    rig.touch(0, Level::SIZE_4K);
    rig.touch(512, Level::SIZE_2M);
    let taken = hog(&rig.arena, 0);
    // What the vCPU has in its cache it may use up.
    rig.vcpu
        .cache
        .drain(..)
        .for_each(|blank| rig.mmu.tables.free_blank(blank));
    let more = hog(&rig.arena, 0);
    let fault = Fault::new(Gfn(1024), Access::Write).with_max_level(Level::SIZE_4K);
    assert_eq!(rig.fault(fault), FaultOutcome::OutOfMemory);
    assert_eq!(
        rig.mmu
            .prefault(&mut rig.vcpu, range(1024, 4), Level::SIZE_4K),
        Err(PrefaultError::OutOfMemory {
            gfn: Gfn(1024),
            done: 0
        })
    );
    assert!(rig.mmu.space(0).translate(Gfn(0)).is_some());
    let space = rig.mmu.space(0);
    assert_eq!(space.split_huge_pages(range(512, 1), Level::SIZE_4K), 1);
    // Logging cannot split either, so it protects the whole leaf.
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::LOG_DIRTY)
        .unwrap();
    assert!(!rig.mmu.space(0).translate(Gfn(600)).unwrap().writable);
    let write = Fault::new(Gfn(512), Access::Write);
    assert_eq!(rig.fault(write), FaultOutcome::OutOfMemory);
    assert_eq!(rig.mmu.stats().faults_failed, 2);
    give_back(&rig.arena, taken);
    give_back(&rig.arena, more);
    rig.touch(512, Level::SIZE_4K);
    assert!(!rig.mmu.space(0).translate(Gfn(513)).unwrap().writable);
    assert!(rig.mmu.space(0).translate(Gfn(512)).unwrap().writable);
}

#[test]
fn there_may_be_no_memory_for_a_root() {
    let mut rig = small();
    let taken: Vec<Pfn> = core::iter::from_fn(|| rig.arena.allocate(16384)).collect();
    assert_eq!(rig.mmu.space(0).root(), None);
    let outcome = rig.fault(Fault::new(Gfn(0), Access::Read));
    assert_eq!(outcome, FaultOutcome::OutOfMemory);
    assert_eq!(rig.mmu.space(0).translate(Gfn(0)), None);
    for pfn in taken {
        #[expect(unsafe_code, reason = "gives back what the test took")]
        // SAFETY: allocated above with this size and never used.
        unsafe {
            rig.arena.free(pfn, 16384);
        }
    }
    rig.touch(0, Level::SIZE_4K);
}

#[test]
fn without_memory_to_split_the_whole_leaf_is_protected_and_flushed() {
    let config = MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet);
    let mut rig = rig::<Flat>(64, config);
    rig.touch(0, Level::SIZE_2M);
    rig.flushed();
    rig.mmu
        .space(0)
        .set_slot_flags(0, SlotFlags::LOG_DIRTY)
        .unwrap();
    assert_eq!(rig.flushed(), []);
    let taken = hog(&rig.arena, 0);
    assert!(rig.mmu.space(0).translate(Gfn(300)).unwrap().writable);
    assert_eq!(rig.mmu.space(0).clear_dirty_log(0, 64, 64, &[1]), Ok(1));
    assert_eq!(
        rig.flushed(),
        [(Flush::range(range(0, 512)), FlushCause::DirtyLog)]
    );
    assert!(!rig.mmu.space(0).translate(Gfn(300)).unwrap().writable);
    assert_eq!(rig.mmu.space(0).dirty_pages(0), Ok((1 << 20) - 1));
    give_back(&rig.arena, taken);
}

#[test]
fn a_reader_keeps_removed_tables_in_memory() {
    let mut rig = small();
    rig.touch(0, Level::SIZE_4K);
    let mut reader = rig.mmu.walker();
    let mut walker = reader.enter();
    assert!(walker.translate(Gfn(0)).is_some());
    drop(std::mem::replace(&mut rig.vcpu, rig.mmu.vcpu()));
    rig.mmu.zap_all();
    assert_eq!(rig.mmu.stats().tables_retired, 2);
    assert_eq!(rig.arena.used_frames(), 5);
    assert!(
        walker.translate(Gfn(0)).is_none(),
        "it walks a root that was emptied"
    );
    drop(walker);
    drop(reader);
    rig.mmu.reclaim();
    assert_eq!((rig.mmu.stats().tables, rig.arena.used_frames()), (0, 0));
}

#[test]
fn a_vcpu_may_come_and_go_without_a_trace() {
    let rig = rig::<Flat>(256, MmuConfig::default());
    for _ in 0..3 {
        let mut vcpu = rig.mmu.vcpu();
        let fault = Fault::new(Gfn(9), Access::Read);
        assert!(!matches!(
            rig.mmu.fault(&mut vcpu, fault),
            FaultOutcome::Retry
        ));
        let mut copy = rig.mmu.vcpu();
        copy.set_as_id(3);
        assert_eq!(rig.mmu.fault(&mut copy, fault), FaultOutcome::NoRoot);
    }
    rig.mmu.zap_all();
    assert_eq!(rig.arena.used_frames(), 0);
}

/// More than a batch of them, and a root that a vCPU still has loaded.
#[test]
fn reclaiming_frees_all_but_what_is_held() {
    let mut rig = rig::<Flat>(1100, MmuConfig::default());
    let tables = 1000;
    for table in 0..tables {
        rig.touch(table * 512, Level::SIZE_4K);
    }
    let mut walker = rig.mmu.walker();
    let inside = walker.enter();
    rig.mmu.zap_all();
    // The vCPU's root is not retired before the vCPU gives it up.
    assert_eq!(rig.mmu.stats().tables_retired, tables);
    drop(std::mem::replace(&mut rig.vcpu, rig.mmu.vcpu()));
    rig.mmu.reclaim();
    assert_eq!(rig.mmu.stats().tables_retired, tables + 1);
    drop(inside);
    rig.mmu.reclaim();
    let stats = rig.mmu.stats();
    assert_eq!((stats.tables_retired, stats.tables), (0, 0));
    assert_eq!(rig.arena.used_frames(), 0);
}

#[test]
fn forbidding_huge_pages_everywhere_is_no_step_for_each_place() {
    let mut rig = rig::<Deep>(64, MmuConfig::default());
    rig.touch(0, Level::SIZE_2M);
    // 2^29 places of 2 MiB: as steps, they would take minutes.
    let everywhere = range(0, u64::MAX);
    let space = rig.mmu.space(0);
    space.forbid_huge_pages(everywhere, Level::SIZE_2M).unwrap();
    assert_eq!(space.translate(Gfn(5)).unwrap().level, Level::SIZE_4K);
    rig.touch(512, Level::SIZE_2M);
    let space = rig.mmu.space(0);
    assert_eq!(space.translate(Gfn(512)).unwrap().level, Level::SIZE_4K);
    // An empty range is no reason, and takes none back.
    space.allow_huge_pages(range(5, 0), Level::SIZE_2M).unwrap();
    rig.touch(1024, Level::SIZE_2M);
    let space = rig.mmu.space(0);
    assert_eq!(space.translate(Gfn(1024)).unwrap().level, Level::SIZE_4K);
    space.allow_huge_pages(everywhere, Level::SIZE_2M).unwrap();
    rig.touch(2048, Level::SIZE_2M);
    let space = rig.mmu.space(0);
    assert_eq!(space.translate(Gfn(2048)).unwrap().level, Level::SIZE_2M);
}

/// More tables than one read section looks at.
#[test]
fn ageing_reaches_the_end_of_a_long_range() {
    let mut rig = rig::<Flat>(300, MmuConfig::default());
    for table in 0..200 {
        rig.touch(table * 512 + 7, Level::SIZE_4K);
    }
    let space = rig.mmu.space(0);
    let last = range(199 * 512 + 7, 1);
    assert!(space.age(range(3, 1 << 20)));
    assert!(!space.test_age(last) && !space.age(range(0, u64::MAX)));
    rig.touch(700 * 512, Level::SIZE_2M);
    assert!(rig.mmu.space(0).test_age(range(0, u64::MAX)));
}
