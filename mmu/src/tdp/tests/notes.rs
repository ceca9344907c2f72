//! The notes of the NX mitigation: made before the table can be seen, gone with it.

use alloc::sync::Weak;
use std::sync::OnceLock;

use super::*;
use crate::tdp::split::Split;

fn nx() -> MmuConfig {
    MmuConfig::default().with_nx_huge_pages(true)
}

fn fetch(gfn: u64) -> Fault {
    Fault::new(Gfn(gfn), Access::Execute)
}

impl<F: Format> Rig<F> {
    /// The table that maps `gfn`, if it hangs on the root.
    fn table(&self, gfn: u64) -> Option<Pfn> {
        let index = F::index(Gfn(gfn), Level::SIZE_2M);
        self.at_root(|root| F::as_table(root.load(index), Level::SIZE_2M))
    }

    fn is_marked(&self, pfn: Pfn) -> bool {
        let header = self.mmu.page_header(pfn).unwrap();
        header.nx_huge_page_disallowed
    }
}

/// What is noted at each flush.
#[derive(Default)]
struct Looker {
    mmu: OnceLock<Weak<TdpMmu<Breaking, Arc<Arena>>>>,
    noted: StdMutex<Vec<usize>>,
}

impl Host for Looker {
    fn flush(&self, _: &FlushRequest) {
        let mmu = self.mmu.get().unwrap().upgrade().unwrap();
        self.noted.lock().unwrap().push(mmu.nx_tables.all().len());
    }
}

/// The flush of break before make comes before the table is linked, so it shows what whoever
/// unlinks the table will see.
#[test]
fn a_fetch_notes_the_table_before_it_can_be_unlinked() {
    let arena = Arc::new(Arena::new(Pfn(0x400), 64));
    let looker = Arc::new(Looker::default());
    let mmu = Arc::new(TdpMmu::<Breaking, _>::new(arena, Arc::clone(&looker), nx()));
    looker.mmu.set(Arc::downgrade(&mmu)).unwrap();
    mmu.create_slot(SlotSpec::new(0, Gfn(0), 1024, Pfn(1 << 20)))
        .unwrap();
    let mut vcpu = mmu.vcpu();
    let huge = FaultOutcome::Fixed {
        level: Level::SIZE_2M,
    };
    assert_eq!(
        mmu.fault(&mut vcpu, Fault::new(Gfn(7), Access::Write)),
        huge
    );
    assert_eq!(mmu.stats().nx_splits, 0);
    // The pages of a split huge page are executable: nothing is left to fix.
    assert_eq!(
        mmu.fault(&mut vcpu, fetch(7)),
        FaultOutcome::Spurious {
            level: Level::SIZE_4K
        }
    );
    assert_eq!(*looker.noted.lock().unwrap(), [1], "noted too late");
    assert_eq!((mmu.stats().nx_splits, mmu.stats().splits), (1, 1));
    // Other reasons to split note nothing.
    assert_eq!(
        mmu.fault(&mut vcpu, Fault::new(Gfn(513), Access::Write)),
        huge
    );
    let space = mmu.space(0);
    assert_eq!(space.split_huge_pages(range(512, 512), Level::SIZE_4K), 0);
    assert_eq!(*looker.noted.lock().unwrap(), [1, 1]);
    assert_eq!((mmu.stats().nx_splits, mmu.stats().splits), (1, 2));
}

fn a_split_that_is_lost<F: Format>() {
    let mut rig = rig::<F>(64, nx());
    rig.touch(7, Level::SIZE_2M);
    let (before, used) = (rig.mmu.stats(), rig.arena.used_frames());
    let reader = rig.mmu.participants.reader_slot();
    rig.at_root(|root| {
        let raw = root.load(0);
        // As if another vCPU had set a bit since.
        let stale = F::with_accessed(raw, false);
        assert_ne!(stale, raw);
        let blank = rig.mmu.tables.blank().unwrap();
        let Split::Lost(blank) = rig.mmu.split(root, 0, stale, blank, &reader, true) else {
            panic!("split what is not there");
        };
        rig.mmu.tables.free_blank(blank);
        assert_eq!(root.load(0), raw);
    });
    assert_eq!(rig.mmu.nx_tables.all(), [], "{}", F::NAME);
    let after = rig.mmu.stats();
    assert_eq!(
        (after.nx_splits, after.pages),
        (before.nx_splits, before.pages)
    );
    assert_eq!(rig.arena.used_frames(), used);
}

#[test]
fn a_split_that_is_lost_leaves_no_note() {
    a_split_that_is_lost::<Flat>();
    a_split_that_is_lost::<Breaking>();
}

#[test]
fn a_noted_table_is_noted_once_and_forgotten_when_it_is_recovered() {
    let mut rig = rig::<Flat>(64, nx());
    rig.touch(7, Level::SIZE_2M);
    let level = Level::SIZE_4K;
    assert_eq!(rig.fault(fetch(7)), FaultOutcome::Spurious { level });
    let table = rig.table(7).unwrap();
    assert_eq!(rig.mmu.nx_tables.all(), [table]);
    assert!(rig.is_marked(table));
    assert_eq!(rig.fault(fetch(8)), FaultOutcome::Spurious { level });
    assert_eq!((rig.mmu.stats().nx_splits, rig.mmu.stats().splits), (1, 1));
    assert_eq!(rig.mmu.recover_nx_huge_pages(1), 1);
    assert_eq!(rig.mmu.nx_tables.all(), []);
    assert_eq!(rig.table(7), None);
}

/// The mark in the header goes when the next table in the same memory is described; the note must
/// not stay behind.
#[test]
fn a_note_goes_though_the_mark_is_gone() {
    let mut rig = rig::<Flat>(64, nx());
    rig.touch(7, Level::SIZE_4K);
    let table = rig.table(7).unwrap();
    rig.mmu.zap_all();
    // A note that comes when its table has gone.
    rig.mmu.note_nx_table(table);
    // Until a table is in that memory again.
    let mut linked = 0;
    loop {
        rig.touch(linked * 512, Level::SIZE_4K);
        if rig.table(linked * 512) == Some(table) {
            break;
        }
        linked += 1;
    }
    assert!(!rig.is_marked(table), "it is another table now");
    rig.mmu.zap_all();
    assert_eq!(rig.mmu.nx_tables.all(), []);
    // Which any table there from now on would pay for.
    for number in 0..=linked {
        rig.touch(number * 512, Level::SIZE_4K);
    }
    assert_eq!(rig.mmu.recover_nx_huge_pages(usize::MAX), 0);
}
