//! Tests of what only the inside can show: the iterator, headers, frozen entries, memory that runs out, reclamation.
//!
//! They use a format made for the purpose: two levels, a root four times as wide as its child, and an empty value that
//! is not 0.

use alloc::{sync::Arc, vec, vec::Vec};

use super::*;
use crate::{
    Access, AdPolicy, Arena, Entry, Fault, FaultOutcome, FlushPrimitive, Leaf, MemoryType, Pfn,
    table::node::Absent,
};

#[derive(Clone, Copy)]
struct Toy;

const PRESENT: u64 = 1;
const LEAF: u64 = 2;
const FLAGS: [u64; 6] = [4, 8, 16, 32, 64, 128];

// SAFETY: leaf, table, empty and frozen differ in their two low bits; the frame is kept in bits of its own.
#[expect(unsafe_code, reason = "a format vouches for its laws")]
unsafe impl Format for Toy {
    const NAME: &'static str = "toy";
    const INDEX_BITS: &'static [u32] = &[9, 11];
    const MAX_LEAF_LEVEL: Level = Level::SIZE_2M;
    const MAX_GFN: Gfn = Gfn(1 << 20);
    const MAX_PFN: Pfn = Pfn(1 << 40);
    const EMPTY: u64 = 1 << 63;
    const FROZEN: u64 = 1 << 62;
    const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = false;
    const FLUSH: FlushPrimitive = FlushPrimitive::Invept;

    fn decode(raw: u64, level: Level) -> Entry {
        let pfn = Pfn(raw >> 12);
        let flag = |i: usize| raw & FLAGS[i] != 0;
        match raw & (PRESENT | LEAF) {
            0 if raw == Self::FROZEN => Entry::Frozen,
            0 => Entry::NonPresent,
            PRESENT if level > Level::SIZE_4K => Entry::Table { pfn },
            3 => Entry::Leaf(Leaf {
                readable: true,
                pfn,
                writable: flag(0),
                executable: flag(1),
                mmu_writable: flag(2),
                host_writable: flag(3),
                accessed: flag(4),
                dirty: flag(5),
                memory: MemoryType::Normal,
            }),
            _ => Entry::Malformed,
        }
    }

    fn make_leaf(leaf: &Leaf, _: Level) -> u64 {
        let flags = [
            leaf.writable,
            leaf.executable,
            leaf.mmu_writable,
            leaf.host_writable,
            leaf.accessed,
            leaf.dirty,
        ];
        let flags: u64 = flags
            .iter()
            .zip(FLAGS)
            .map(|(&on, bit)| if on { bit } else { 0 })
            .sum();
        leaf.pfn.0 << 12 | PRESENT | LEAF | flags
    }

    fn make_table(pfn: Pfn) -> u64 {
        pfn.0 << 12 | PRESENT
    }

    fn with_writable(raw: u64, on: bool) -> u64 {
        if on { raw | FLAGS[0] } else { raw & !FLAGS[0] }
    }

    fn clear_mmu_writable(raw: u64) -> u64 {
        raw & !(FLAGS[0] | FLAGS[2])
    }

    fn with_accessed(raw: u64, on: bool) -> u64 {
        if on { raw | FLAGS[4] } else { raw & !FLAGS[4] }
    }

    fn with_executable(raw: u64, on: bool) -> u64 {
        if on { raw | FLAGS[1] } else { raw & !FLAGS[1] }
    }

    fn with_dirty(raw: u64, on: bool) -> u64 {
        if on { raw | FLAGS[5] } else { raw & !FLAGS[5] }
    }
}

type Mmu = TdpMmu<Toy, Arc<Arena>>;

fn mmu_with_frames(frames: usize) -> (Mmu, Arc<Arena>) {
    let arena = Arc::new(Arena::new(Pfn(0x400), frames));
    let mmu = Mmu::new(arena.clone(), MmuConfig::default());
    mmu.create_slot(SlotSpec::new(0, Gfn(0), 1 << 20, Pfn(1 << 20)))
        .unwrap();
    (mmu, arena)
}

fn touch(mmu: &Mmu, gfn: u64, level: Level) {
    let outcome = mmu.fault(Fault::new(Gfn(gfn), Access::Write).with_max_level(level));
    assert!(matches!(outcome, FaultOutcome::Fixed { .. }), "{outcome:?}");
}

fn visits(mmu: &Mmu, range: GfnRange, min_level: Level) -> Vec<(u8, u64)> {
    mmu.locked(|_, guard| {
        let mut iter = mmu.iter(guard, range, min_level).unwrap();
        let mut seen = vec![];
        while iter.advance() {
            seen.push((iter.level().get(), iter.gfn().0));
        }
        seen
    })
}

#[test]
fn an_entry_is_visited_before_what_it_points_to() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 513, Level::SIZE_4K);
    let seen = visits(&mmu, GfnRange::new(Gfn(510), 5), Level::SIZE_4K);
    assert_eq!(seen, [(2, 0), (2, 512), (1, 512), (1, 513), (1, 514)]);
    let seen = visits(&mmu, GfnRange::new(Gfn(513), 600), Level::SIZE_2M);
    assert_eq!(seen, [(2, 512), (2, 1024)]);
}

#[test]
fn a_wide_root_is_walked_to_its_last_entry_and_no_further() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, (1 << 20) - 1, Level::SIZE_4K);
    let seen = visits(&mmu, GfnRange::new(Gfn(0), u64::MAX), Level::SIZE_4K);
    assert_eq!(seen.len(), 2048 + 512);
    assert_eq!(seen.last(), Some(&(1, (1 << 20) - 1)));
    assert!(visits(&mmu, GfnRange::new(Gfn(1 << 20), 5), Level::SIZE_4K).is_empty());
    assert!(visits(&mmu, GfnRange::new(Gfn(3), 0), Level::SIZE_4K).is_empty());
}

#[test]
fn yielding_skips_nothing_and_always_ends() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 513, Level::SIZE_4K);
    let range = GfnRange::new(Gfn(500), 30);
    let plain = visits(&mmu, range, Level::SIZE_4K);
    mmu.locked(|_, guard| {
        let mut iter = mmu.iter(guard, range, Level::SIZE_4K).unwrap();
        let mut seen = vec![];
        while iter.advance() {
            if iter.yielded() {
                continue;
            }
            seen.push((iter.level().get(), iter.gfn().0));
        }
        // After a restart the path is visited anew, so upper entries come more often; leaves do not.
        seen.dedup();
        let leaves = |seen: &[(u8, u64)]| {
            seen.iter()
                .filter(|(level, _)| *level == 1)
                .copied()
                .collect::<Vec<_>>()
        };
        assert_eq!(leaves(&seen), leaves(&plain));
    });
}

#[test]
fn a_table_linked_during_the_visit_is_entered() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 5, Level::SIZE_2M);
    mmu.locked(|state, guard| {
        let mut iter = mmu
            .iter(guard, GfnRange::new(Gfn(5), 1), Level::SIZE_4K)
            .unwrap();
        assert!(iter.advance());
        mmu.split(state, &mut iter).unwrap();
        assert!(iter.advance());
        assert_eq!((iter.level(), iter.gfn()), (Level::SIZE_4K, Gfn(5)));
    });
    assert_eq!(
        (
            mmu.stats().pages[0],
            mmu.stats().pages[1],
            mmu.stats().splits
        ),
        (512, 0, 1)
    );
}

#[test]
fn headers_describe_the_tree() {
    let (mmu, _) = mmu_with_frames(64);
    for gfn in [0, 513, 5000] {
        touch(&mmu, gfn, Level::SIZE_4K);
    }
    let root = mmu.root().unwrap().pfn;
    let state = mmu.state.lock();
    assert_eq!(state.headers.iter().count(), 4);
    for header in state.headers.iter().filter(|header| header.pfn != root) {
        let (parent, index) = header.parent.unwrap();
        let parent = state.headers.of_frame(parent).unwrap();
        assert_eq!(header.role.level.parent(), Some(parent.role.level));
        assert_eq!(Toy::index(header.gfn, parent.role.level), index);
        assert_eq!(Toy::align_down(header.gfn, parent.role.level), header.gfn);
    }
    drop(state);
    assert_eq!(mmu.page_header(Pfn(root.0 + 3)).unwrap().pfn, root);
    let _flush = mmu.zap_all();
    assert_eq!(mmu.page_header(root), None);
}

#[test]
fn a_frozen_entry_is_left_to_its_owner() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 0, Level::SIZE_4K);
    let tables = mmu.stats().tables;
    mmu.locked(|_, guard| {
        guard.root().unwrap().take(1, Absent::Frozen);
    });
    assert_eq!(
        mmu.fault(Fault::new(Gfn(512), Access::Read)),
        FaultOutcome::Retry
    );
    assert_eq!(mmu.stats().tables, tables, "nothing was allocated for it");
    assert!(mmu.translate(Gfn(512)).is_none());
    let _flush = mmu.zap_gfn_range(GfnRange::new(Gfn(0), 1 << 20));
    assert_eq!(
        mmu.fault(Fault::new(Gfn(512), Access::Read)),
        FaultOutcome::Retry,
        "a zap leaves it too"
    );
}

#[test]
fn an_entry_of_unknown_make_is_reported_and_not_followed() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 0, Level::SIZE_4K);
    mmu.locked(|_, guard| guard.root().unwrap().replace(1, Toy::EMPTY, LEAF).unwrap());
    let bad = FaultOutcome::BadEntry {
        level: Level::SIZE_2M,
    };
    assert_eq!(mmu.fault(Fault::new(Gfn(512), Access::Read)), bad);
    assert_eq!(
        mmu.access(Gfn(512), Access::Read),
        Err(WalkFault::Malformed)
    );
}

#[test]
fn a_table_entry_cannot_be_stored_as_a_value() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 0, Level::SIZE_4K);
    mmu.locked(|_, guard| {
        let root = guard.root().unwrap();
        assert!(
            root.replace(1, Toy::EMPTY, Toy::make_table(Pfn(7)))
                .is_err()
        );
        assert_eq!(root.load(1), Toy::EMPTY);
        let wrong = mmu.tables.allocate(Level::SIZE_2M).unwrap();
        let wrong = root.link(1, Toy::EMPTY, wrong).unwrap_err();
        mmu.tables.free_unlinked(wrong);
    });
}

#[test]
fn running_out_of_memory_loses_nothing() {
    // Room for the root and one table.
    let (mmu, arena) = mmu_with_frames(8);
    let hog: Vec<Pfn> = (0..3).map(|_| arena.allocate(4096).unwrap()).collect();
    touch(&mmu, 0, Level::SIZE_4K);
    let fault = Fault::new(Gfn(512), Access::Write).with_max_level(Level::SIZE_4K);
    assert_eq!(mmu.fault(fault), FaultOutcome::OutOfMemory);
    assert!(mmu.translate(Gfn(0)).is_some());
    touch(&mmu, 512, Level::SIZE_2M);
    assert!(!mmu.split_huge_pages(GfnRange::new(Gfn(512), 1), Level::SIZE_4K));
    // Logging cannot split either, so it protects the whole leaf, and says so in the flush.
    let _flush = mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
    assert_eq!(mmu.fault(fault), FaultOutcome::OutOfMemory);
    #[expect(unsafe_code, reason = "gives back what the test took")]
    for pfn in hog {
        // SAFETY: allocated above with this size and never used.
        unsafe { arena.free(pfn, 4096) };
    }
    touch(&mmu, 512, Level::SIZE_4K);
    assert!(!mmu.translate(Gfn(513)).unwrap().writable);
}

#[test]
fn without_memory_to_split_the_whole_leaf_is_protected() {
    let arena = Arc::new(Arena::new(Pfn(0x400), 4));
    let mmu = Mmu::new(
        arena,
        MmuConfig::default().with_dirty_log_start(DirtyLogStart::InitiallySet),
    );
    mmu.create_slot(SlotSpec::new(0, Gfn(0), 1024, Pfn(1 << 20)))
        .unwrap();
    touch(&mmu, 0, Level::SIZE_2M);
    assert!(
        mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap()
            .is_none()
    );
    assert!(mmu.translate(Gfn(300)).unwrap().writable);
    let flush = mmu.clear_dirty_log(0, 64, 64, &[1]).unwrap();
    assert_eq!(
        flush,
        Flush::Range {
            gfn: Gfn(0),
            pages: 512
        }
    );
    assert!(!mmu.translate(Gfn(300)).unwrap().writable);
    assert_eq!(mmu.dirty_pages(0).unwrap(), 1023);
}

#[test]
fn a_reader_keeps_removed_tables_in_memory() {
    let (mmu, arena) = mmu_with_frames(64);
    touch(&mmu, 0, Level::SIZE_4K);
    let guard = mmu.pin();
    let _flush = mmu.zap_all();
    assert_eq!(mmu.stats().tables_retired, 2);
    assert_eq!(arena.used_frames(), 5);
    drop(guard);
    mmu.reclaim();
    assert_eq!((mmu.stats().tables, arena.used_frames()), (0, 0));
}

#[test]
fn dropping_the_mmu_gives_everything_back() {
    let (mmu, arena) = mmu_with_frames(64);
    touch(&mmu, 0, Level::SIZE_4K);
    let _flush = mmu.invalidate_roots();
    touch(&mmu, 700, Level::SIZE_4K);
    core::mem::forget(mmu.pin());
    assert_eq!(arena.used_frames(), 10);
    drop(mmu);
    assert_eq!(arena.used_frames(), 0);
}

#[test]
fn a_withdrawn_root_is_still_unmapped_from() {
    let (mmu, _) = mmu_with_frames(64);
    touch(&mmu, 3, Level::SIZE_4K);
    let first = mmu.root().unwrap();
    assert_eq!(mmu.invalidate_roots(), Flush::All);
    assert!(mmu.page_header(first.pfn).unwrap().role.invalid);
    assert_eq!(
        mmu.stats().pages[0],
        1,
        "a vCPU may run on it until it has flushed"
    );
    let _flush = mmu.zap_gfn_range(GfnRange::new(Gfn(3), 1));
    assert_eq!(mmu.stats().pages[0], 0);
    let second = mmu.root().unwrap();
    assert_ne!(second.generation, first.generation);
    assert_ne!(second.pfn, first.pfn);
    mmu.zap_invalidated_roots();
    assert_eq!(mmu.stats().tables, 1);
}
