//! The kernel's `dirty_log_test` in small: virtual CPUs with TLBs of their own write while their
//! dirty log is harvested and, in the second test, while their tables are torn down under them.
//!
//! Oracle, for every round: a page that is clean in this harvest *and* in a look at the log taken
//! after its memory was read holds what was last copied from it. At the end, with the CPUs stopped
//! and one more harvest, the copy is the memory: no write was lost.
//!
//! A CPU obeys flushes between two instructions only, or is marked as outside while it resolves a
//! fault; and whoever flushes waits until each has obeyed or is outside: the use of a TLB entry
//! that outlived its flush is an error that the oracle sees.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, DirtyLogPolicy, DirtyLogStart, Fault, FaultOutcome, Flush, FlushRequest, Gfn,
    GfnRange, Host, Level, MmuConfig, Pfn, SecondStage, SlotFlags, SlotSpec, Translation,
    WalkFault,
};

/// Not a multiple of 64, and more than one huge page.
const PAGES: u64 = 1024 + 16;
/// Aligned to 64 pages but not to a huge page's neighbours, so that words cross leaves.
const BASE: u64 = 512 * 3;
const HOST: u64 = 512 * 64;
const CPUS: usize = 2;
const ROUNDS: usize = 7;

/// Writes of all CPUs between two harvests.
const WRITES_A_ROUND: usize = 32;

/// The longest that a round waits for them.
const WRITES_BOUND: Duration = Duration::from_secs(60);

/// A CPU that uses no TLB entry: in the host, or ended.
const OUTSIDE: usize = usize::MAX;

/// The host's side of shoot-down.
#[derive(Default)]
struct Tlbs {
    flushes: Mutex<Vec<Flush>>,
    requested: AtomicUsize,
    obeyed: [AtomicUsize; CPUS],
}

impl Host for Tlbs {
    fn flush(&self, request: &FlushRequest) {
        let number = {
            let mut flushes = self.flushes.lock().unwrap();
            flushes.push(request.flush);
            self.requested.store(flushes.len(), SeqCst);
            flushes.len()
        };
        let behind = |obeyed: &AtomicUsize| obeyed.load(SeqCst) < number;
        while self.obeyed.iter().any(behind) {
            thread::yield_now();
        }
    }
}

struct Machine {
    mmu: Box<dyn SecondStage>,
    tlbs: Arc<Tlbs>,
    /// Whether hardware faults when a logged page is written.
    protects: bool,
    /// One word stands for a page's contents; indexed by host frame.
    memory: Vec<AtomicU64>,
    logging: AtomicBool,
    stop: AtomicBool,
    /// Writes of all CPUs.
    writes: AtomicUsize,
    ended: AtomicUsize,
}

/// Tells the others that a CPU has ended, also if it ended with a failed check.
struct Stopped<'a> {
    machine: &'a Machine,
    cpu: usize,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.machine.tlbs.obeyed[self.cpu].store(OUTSIDE, SeqCst);
        self.machine.ended.fetch_add(1, SeqCst);
    }
}

/// A CPU's TLB, and how far it has obeyed.
#[derive(Default)]
struct Tlb {
    entries: HashMap<u64, Translation>,
    done: usize,
}

impl Tlb {
    /// Obeys what was asked, and is inside from here on.
    fn obey(&mut self, tlbs: &Tlbs, cpu: usize) {
        loop {
            let flushes = tlbs.flushes.lock().unwrap();
            for flush in &flushes[self.done..] {
                self.entries.retain(|&gfn, _| !flush.covers(Gfn(gfn)));
            }
            self.done = flushes.len();
            drop(flushes);
            tlbs.obeyed[cpu].store(self.done, SeqCst);
            // A flush that was asked for before we were inside did not wait for us.
            if tlbs.requested.load(SeqCst) == self.done {
                return;
            }
        }
    }
}

impl Machine {
    fn new(stage: GuestStage, start: DirtyLogStart) -> Self {
        let config = MmuConfig::default().with_dirty_log_start(start);
        let tlbs = Arc::new(Tlbs::default());
        let mmu = stage.build(Arena::new(Pfn(0x1000), 1024), Arc::clone(&tlbs), config);
        mmu.create_slot(SlotSpec::new(0, Gfn(BASE), PAGES, Pfn(HOST)))
            .unwrap();
        Self {
            mmu,
            tlbs,
            protects: stage.info().dirty_log == DirtyLogPolicy::WriteProtect,
            memory: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            logging: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            writes: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        }
    }

    fn run_cpu(&self, cpu: usize, mut seed: u64) {
        let _stopped = Stopped { machine: self, cpu };
        let mut vcpu = self.mmu.vcpu();
        let mut tlb = Tlb::default();
        let mut value = cpu as u64;
        let mut random = || {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            seed >> 33
        };
        while !self.stop.load(SeqCst) {
            let gfn = Gfn(BASE + random() % PAGES);
            let write = !random().is_multiple_of(4);
            let access = if write { Access::Write } else { Access::Read };
            value += CPUS as u64;
            loop {
                if self.tlbs.requested.load(SeqCst) != tlb.done {
                    tlb.obey(&self.tlbs, cpu);
                }
                let usable =
                    |hit: &&Translation| !write || hit.writable && (self.protects || hit.dirty);
                if let Some(hit) = tlb.entries.get(&gfn.0).filter(usable) {
                    assert_eq!(
                        hit.pfn.0,
                        HOST + gfn.0 - BASE,
                        "a translation to the wrong frame"
                    );
                    if write {
                        self.memory[(hit.pfn.0 - HOST) as usize].store(value, SeqCst);
                        self.writes.fetch_add(1, SeqCst);
                    }
                    break;
                }
                tlb.entries.remove(&gfn.0);
                match self.mmu.access(&mut vcpu, gfn, access) {
                    Ok(hit) => {
                        tlb.entries.insert(gfn.0, hit);
                    }
                    Err(walk) => {
                        self.tlbs.obeyed[cpu].store(OUTSIDE, SeqCst);
                        let mut fault = Fault::new(gfn, access);
                        fault.present =
                            matches!(walk, WalkFault::Permission | WalkFault::AccessedDirty);
                        match self.mmu.fault(&mut vcpu, fault) {
                            FaultOutcome::Fixed { .. }
                            | FaultOutcome::Spurious { .. }
                            | FaultOutcome::Retry => {}
                            other => panic!("{other:?} at {gfn}"),
                        }
                        tlb.obey(&self.tlbs, cpu);
                    }
                }
            }
        }
    }

    /// One harvest, complete with its flush; `manual` gets first and clears what it got.
    fn harvest(&self, manual: bool) -> Vec<u64> {
        let mut dirty = vec![0; PAGES.div_ceil(64) as usize];
        if manual {
            self.mmu.space(0).get_dirty_log(0, &mut dirty).unwrap();
            self.mmu
                .space(0)
                .clear_dirty_log(0, 0, PAGES, &dirty)
                .unwrap();
        } else {
            self.mmu.space(0).harvest_dirty_log(0, &mut dirty).unwrap();
        }
        dirty
    }

    /// Waits until the CPUs wrote some more: on a busy machine all rounds could otherwise be over
    /// before a CPU's thread first ran.
    fn await_writes(&self) {
        let enough = self.writes.load(SeqCst) + WRITES_A_ROUND;
        let until = Instant::now() + WRITES_BOUND;
        // A CPU that ended early has failed, and its scope says so.
        while self.writes.load(SeqCst) < enough && self.ended.load(SeqCst) == 0 {
            assert!(
                Instant::now() < until,
                "the CPUs stand still for {WRITES_BOUND:?}"
            );
            thread::yield_now();
        }
    }

    /// Harvests, copies and checks until the rounds are over, then stops the CPUs and checks the
    /// copy.
    fn migrate(&self, manual: bool) {
        let is_set = |bitmap: &[u64], page: usize| bitmap[page / 64] >> (page % 64) & 1 == 1;
        self.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        self.logging.store(true, SeqCst);
        // The first copy is of everything.
        let mut copy: Vec<u64> = self.memory.iter().map(|page| page.load(SeqCst)).collect();
        let mut seen_dirty = 0;
        for _ in 0..ROUNDS {
            self.await_writes();
            let dirty = self.harvest(manual);
            let now: Vec<u64> = self.memory.iter().map(|page| page.load(SeqCst)).collect();
            let mut later = vec![0; dirty.len()];
            self.mmu.space(0).get_dirty_log(0, &mut later).unwrap();
            for page in 0..PAGES as usize {
                if is_set(&dirty, page) {
                    copy[page] = now[page];
                    seen_dirty += 1;
                } else if !is_set(&later, page) {
                    assert_eq!(
                        copy[page], now[page],
                        "page {page} was written and is clean"
                    );
                }
            }
        }
        self.stop.store(true, SeqCst);
        while self.ended.load(SeqCst) < CPUS {
            thread::yield_now();
        }
        let last = self.harvest(manual);
        for (page, copied) in copy.iter_mut().enumerate() {
            let now = self.memory[page].load(SeqCst);
            if is_set(&last, page) {
                *copied = now;
            }
            assert_eq!(*copied, now, "page {page} was written and never reported");
        }
        assert!(seen_dirty > 0, "the CPUs wrote nothing");
    }

    /// Unmaps, splits, ages and throws roots away.
    fn churn(&self) {
        let mut n = 0u64;
        while !self.logging.load(SeqCst) && !self.stop.load(SeqCst) {
            thread::yield_now();
        }
        while !self.stop.load(SeqCst) {
            n += 1;
            let range = GfnRange::new(Gfn(BASE + n * 37 % PAGES), n % 100 + 1);
            match n % 7 {
                0 => self.mmu.zap_all(),
                1 => {
                    self.mmu.invalidate_roots();
                    self.mmu.zap_invalidated_roots();
                }
                2 => {
                    let token = self.mmu.space(0).invalidate_begin(range, true);
                    self.mmu.invalidate_end(token).unwrap();
                }
                3 => assert_eq!(self.mmu.space(0).split_huge_pages(range, Level::SIZE_4K), 0),
                4 => {
                    self.mmu
                        .space(0)
                        .write_protect_gfn(range.start, Level::SIZE_4K);
                }
                5 => {
                    self.mmu.space(0).age(range);
                }
                _ => {
                    self.mmu.space(0).zap_gfn_range(range);
                }
            }
            thread::yield_now();
        }
    }
}

fn run(stage: GuestStage, start: DirtyLogStart, manual: bool, churn: bool) {
    let machine = Machine::new(stage, start);
    thread::scope(|scope| {
        for cpu in 0..CPUS {
            let machine = &machine;
            scope.spawn(move || machine.run_cpu(cpu, 0x5eed + cpu as u64));
        }
        if churn {
            scope.spawn(|| machine.churn());
        }
        // A failed check must not leave the others running.
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| machine.migrate(manual)));
        machine.stop.store(true, SeqCst);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    machine.mmu.zap_all();
    machine.mmu.reclaim();
    let stats = machine.mmu.stats();
    assert_eq!((stats.tables, stats.roots, stats.pages), (0, 0, [0; 5]));
}

#[test]
fn no_write_is_lost() {
    for stage in GuestStage::ALL {
        run(stage, DirtyLogStart::Protected, false, false);
        run(stage, DirtyLogStart::Protected, true, false);
        run(stage, DirtyLogStart::InitiallySet, true, false);
    }
}

#[test]
fn no_write_is_lost_while_tables_are_torn_down() {
    for stage in GuestStage::ALL {
        run(stage, DirtyLogStart::Protected, true, true);
        run(stage, DirtyLogStart::InitiallySet, false, true);
    }
}
