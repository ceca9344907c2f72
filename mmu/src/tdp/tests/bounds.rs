//! How long locks are held: counted, never timed.

use core::ptr::NonNull;
use std::{
    boxed::Box,
    collections::BTreeMap,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{EntryCell, Header, sync::steps, table::tables::Held};

/// Table memory that calls back at each look at a table or its header while `armed`, and remembers
/// under which step of the MMU each table was freed.
struct Watched {
    arena: Arena,
    armed: AtomicBool,
    at_look: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Tables freed, by the steps that the freeing thread had made, the arena's own left out.
    freed: StdMutex<BTreeMap<u64, usize>>,
    arenas: AtomicU64,
}

impl Watched {
    fn new(frames: usize) -> Arc<Self> {
        Arc::new(Self {
            arena: Arena::new(Pfn(0x400), frames),
            armed: AtomicBool::new(false),
            at_look: OnceLock::new(),
            freed: StdMutex::new(BTreeMap::new()),
            arenas: AtomicU64::new(0),
        })
    }

    fn in_arena<R>(&self, call: impl FnOnce(&Arena) -> R) -> R {
        let before = steps::so_far();
        let result = call(&self.arena);
        self.arenas.fetch_add(steps::so_far() - before, SeqCst);
        result
    }

    fn look(&self) {
        if self.armed.load(SeqCst)
            && let Some(call) = self.at_look.get()
        {
            call();
        }
    }
}

// SAFETY: everything is the arena's.
#[expect(unsafe_code, reason = "table memory that is watched")]
unsafe impl TableMemory for Watched {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        self.in_arena(|arena| arena.allocate(bytes))
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        let step = steps::so_far().wrapping_sub(self.arenas.load(SeqCst));
        *self.freed.lock().unwrap().entry(step).or_default() += 1;
        // SAFETY: the caller's promise is the arena's condition.
        self.in_arena(|arena| unsafe { arena.free(pfn, bytes) });
    }

    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        self.look();
        // SAFETY: the caller's promise is the arena's condition.
        unsafe { self.arena.entries(pfn) }
    }

    fn header(&self, pfn: Pfn) -> &Header {
        self.look();
        self.arena.header(pfn)
    }
}

type WatchedMmu<F> = TdpMmu<F, Arc<Watched>>;

fn watched<F: Format>(frames: usize, config: MmuConfig) -> (Arc<Watched>, Arc<WatchedMmu<F>>) {
    let memory = Watched::new(frames);
    let mmu = WatchedMmu::<F>::new(Arc::clone(&memory), NoTlb, config);
    mmu.create_slot(SlotSpec::new(0, Gfn(0), 1 << 20, Pfn(1 << 20)))
        .unwrap();
    (memory, Arc::new(mmu))
}

/// At each look of this thread at a table, from now on, `at_most` times, another thread waits for
/// the MMU lock.
fn contend<F: Format>(
    memory: &Watched,
    mmu: &Arc<WatchedMmu<F>>,
    is_contended: fn(&WatchedMmu<F>) -> bool,
    at_most: u64,
) {
    let (ask, asked) = mpsc::channel::<()>();
    let (weak, wants) = (Arc::downgrade(mmu), Arc::downgrade(mmu));
    let left = AtomicU64::new(at_most);
    let me = thread::current().id();
    let call = move || {
        let mmu = weak.upgrade().unwrap();
        if thread::current().id() != me || is_contended(&mmu) || left.load(SeqCst) == 0 {
            return;
        }
        left.fetch_sub(1, SeqCst);
        ask.send(()).unwrap();
        let patience = Instant::now();
        while !is_contended(&mmu) {
            assert!(patience.elapsed() < Duration::from_secs(30), "nobody came");
            thread::yield_now();
        }
    };
    assert!(memory.at_look.set(Box::new(call)).is_ok());
    // It ends when the MMU goes, and with it `ask`.
    thread::spawn(move || {
        while let (Ok(()), Some(mmu)) = (asked.recv(), wants.upgrade()) {
            drop(mmu.lock.exclusive());
        }
    });
}

/// It may have to look at all tables that are noted, however few it is asked for.
#[test]
fn nx_recovery_offers_the_lock_before_each_table_that_it_skips() {
    const NOTED: u64 = 5;
    let (memory, mmu) = watched::<Flat>(64, MmuConfig::default().with_nx_huge_pages(true));
    let mut vcpu = mmu.vcpu();
    for table in 0..NOTED {
        let fetch = Fault::new(Gfn(table * 512), Access::Execute);
        assert!(matches!(
            mmu.fault(&mut vcpu, fetch),
            FaultOutcome::Fixed { .. }
        ));
    }
    assert_eq!(mmu.nx_tables.all().len() as u64, NOTED);
    // Tables of a slot that logs are skipped.
    let space = mmu.space(0);
    space.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
    mmu.reclaim();
    let before = mmu.stats().yields;
    contend(&memory, &mmu, |mmu| mmu.lock.shared_is_contended(), NOTED);
    memory.armed.store(true, SeqCst);
    assert_eq!(mmu.recover_nx_huge_pages(1), 0);
    memory.armed.store(false, SeqCst);
    assert_eq!(mmu.stats().yields - before, NOTED - 1);
}

/// However soon the next one wants the lock: so a sweep ends.
#[test]
fn each_burst_of_a_sweep_visits_something_before_it_yields() {
    const TABLES: u64 = 6;
    let (memory, mmu) = watched::<Flat>(64, MmuConfig::default());
    let mut vcpu = mmu.vcpu();
    for table in 0..TABLES {
        let fault = Fault::new(Gfn(table * 512), Access::Write).with_max_level(Level::SIZE_4K);
        let outcome = mmu.fault(&mut vcpu, fault);
        assert!(matches!(outcome, FaultOutcome::Fixed { .. }), "{outcome:?}");
    }
    let before = mmu.stats().yields;
    // A sweep that yields at once would do so for ever.
    let enough = 20 * TABLES;
    contend(
        &memory,
        &mmu,
        |mmu| mmu.lock.exclusive_is_contended(),
        enough,
    );
    memory.armed.store(true, SeqCst);
    assert!(mmu.space(0).zap_gfn_range(range(0, TABLES * 512)));
    memory.armed.store(false, SeqCst);
    assert_eq!(mmu.stats().yields - before, TABLES - 1);
    assert_eq!(mmu.stats().pages[..2], [0, 0]);
}

#[test]
fn limbo_is_held_for_a_batch_of_tables() {
    const TABLES: u64 = 1500;
    let (memory, mmu) = watched::<Flat>(2000, MmuConfig::default());
    let mut vcpu = mmu.vcpu();
    for table in 0..TABLES {
        let fault = Fault::new(Gfn(table * 512), Access::Write).with_max_level(Level::SIZE_4K);
        let outcome = mmu.fault(&mut vcpu, fault);
        assert!(matches!(outcome, FaultOutcome::Fixed { .. }), "{outcome:?}");
    }
    let mut walker = mmu.walker();
    let inside = walker.enter();
    mmu.zap_all();
    assert_eq!(mmu.stats().tables_retired, TABLES);
    drop(inside);
    memory.freed.lock().unwrap().clear();
    mmu.reclaim();
    let freed = memory.freed.lock().unwrap();
    assert_eq!(freed.values().sum::<usize>() as u64, TABLES);
    let most = freed.values().max();
    assert!(most <= Some(&512), "{freed:?}");
}

/// Two reclaimers at once, each with a root that someone holds.
#[test]
fn roots_that_are_put_back_are_freed_when_nobody_holds_them() {
    let (memory, mmu) = watched::<Flat>(64, MmuConfig::default());
    let tables = &mmu.tables;
    let mut held = vec![];
    let mut batches = vec![];
    for _ in 0..3 {
        let root = tables.root(0, false).unwrap();
        tables.retire_root(crate::sync::Counted::clone(&root));
        held.push(root);
        let mut batch = Held::default();
        assert!(!tables.reclaim_batch(&mut batch));
        batches.push(batch);
    }
    for batch in [1, 0, 0] {
        tables.put_back(batches.remove(batch));
    }
    assert_eq!(tables.retired(), 3);
    drop(held);
    tables.reclaim();
    assert_eq!((tables.retired(), memory.arena.used_frames()), (0, 0));
}

#[test]
fn forbidding_huge_pages_takes_as_many_steps_for_many_places_as_for_one() {
    let steps_of = |pages: u64, slots: u16| {
        let mut rig = rig::<Deep>(64, MmuConfig::default());
        for slot in 1..slots {
            let base = Gfn(u64::from(slot) << 20);
            rig.mmu
                .create_slot(SlotSpec::new(slot, base, 1 << 20, Pfn(base.0)))
                .unwrap();
        }
        rig.touch(0, Level::SIZE_2M);
        let space = rig.mmu.space(0);
        let before = steps::so_far();
        space
            .forbid_huge_pages(range(0, pages), Level::SIZE_2M)
            .unwrap();
        let between = steps::so_far();
        space
            .allow_huge_pages(range(0, pages), Level::SIZE_2M)
            .unwrap();
        (between - before, steps::so_far() - between)
    };
    let one = steps_of(512, 1);
    assert_eq!(steps_of(1 << 20, 1), one, "the whole slot");
    assert_eq!(steps_of(1 << 23, 1), one, "and beyond it");
    // A step for each slot.
    let three = steps_of(1 << 23, 3);
    assert_eq!((three.0 - one.0, three.1 - one.1), (2, 2));
}
