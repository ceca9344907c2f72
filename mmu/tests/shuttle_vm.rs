//! A whole VM under random schedules (shuttle), on every format: vCPUs with TLBs, a harvester, a
//! notifier, slots that come, move and go, fast zaps, ageing.
//!
//! A TLB is emptied by an acknowledged flush, and by the vCPU's own fault at the frame; nothing
//! else makes what it holds wrong or right. The host is slow to ask for a flush now and then, or
//! what is flushed too late would hardly ever be used.
//!
//! # What is checked
//!
//! - *Stale translations*: a vCPU uses its TLB between two looks at the flush requests, and whoever
//!   flushes waits until each vCPU in the guest has looked. So each use is checked against what the
//!   host has been promised: not a page that is being taken back, not a slot that is deleted, not
//!   the place from which a slot has moved.
//! - *The dirty log*: what a harvest reports is copied; when the vCPUs have stopped, after one more
//!   harvest the copy is the memory (the oracle of the kernel's `dirty_log_test`).
//! - *Progress*: shuttle fails a schedule that deadlocks or does not come to its end.
//! - *Counters*: no leaf and no table is left.
//!
//! # Repeating a failure
//!
//! Each run prints its seed. `SLAT_SHUTTLE_SEED` repeats the run, `SLAT_SHUTTLE_SCHEDULES` sets how
//! many schedules it has, and the schedule that failed, which shuttle prints, is repeated alone by
//! `SLAT_SHUTTLE_REPLAY`.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Instant,
};

use shuttle::{
    Config, MaxSteps, Runner,
    scheduler::{PctScheduler, RandomScheduler},
    thread,
};
use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, DirtyLogStart, Fault, FaultOutcome, Flush, FlushRequest, Gfn, GfnRange, Host,
    Level, MmuConfig, Pfn, SecondStage, SlotFlags, SlotSpec, Translation, Vcpu, WalkFault,
};

/// One huge page and a bit.
const PAGES: u64 = 512 + 8;
const HOST: u64 = 512 * 64;
/// The slot's two places.
const PLACES: [u64; 2] = [0, 2048];
/// Pages that are touched, by their place in the slot.
const TOUCHED: [u64; 4] = [0, 1, 511, 513];

/// The host and its guest. Ordinary atomics on purpose: shuttle's threads switch only at its own,
/// so what is written between two of those is one step, as the use of a translation is.
struct Machine {
    flushes: shuttle::sync::Mutex<Vec<Flush>>,
    requested: shuttle::sync::atomic::AtomicUsize,
    obeyed: Vec<shuttle::sync::atomic::AtomicUsize>,
    /// One word a page, by host frame.
    memory: Vec<AtomicU64>,
    /// Pages whose memory the host has taken back for now.
    revoked: Vec<AtomicBool>,
    /// Bit n: the slot may be at `PLACES[n]`.
    places: AtomicU64,
    /// The host does not move a slot while it takes the slot's memory back: an invalidation names
    /// guest frames, and would not cover the memory at its new place.
    layout: shuttle::sync::Mutex<()>,
}

/// The vCPU is outside the guest and obeys before it uses anything again.
const OUTSIDE: usize = usize::MAX;

#[derive(Clone)]
struct Receiver(Arc<Machine>);

impl Host for Receiver {
    fn flush(&self, request: &FlushRequest) {
        let machine = &self.0;
        // A host may be slow to ask its vCPUs: what they use until then must still be theirs.
        if random(4) == 0 {
            for _ in 0..random(48) {
                thread::yield_now();
            }
        }
        let number = {
            let mut flushes = machine.flushes.lock().unwrap();
            flushes.push(request.flush);
            flushes.len()
        };
        machine
            .requested
            .fetch_max(number, std::sync::atomic::Ordering::SeqCst);
        for obeyed in &machine.obeyed {
            while obeyed.load(SeqCst) < number {
                thread::yield_now();
            }
        }
    }
}

struct Vm {
    mmu: Box<dyn SecondStage>,
    machine: Arc<Machine>,
    arena: Arc<Arena>,
}

/// Small numbers for a schedule's actors; shuttle's own source, so that a schedule repeats them.
fn random(below: u64) -> u64 {
    use shuttle::rand::Rng as _;
    shuttle::rand::thread_rng().gen_range(0..below)
}

impl Vm {
    fn new(stage: GuestStage, cpus: usize) -> Arc<Self> {
        let machine = Arc::new(Machine {
            flushes: Default::default(),
            requested: shuttle::sync::atomic::AtomicUsize::new(0),
            obeyed: (0..cpus)
                .map(|_| shuttle::sync::atomic::AtomicUsize::new(OUTSIDE))
                .collect(),
            memory: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            revoked: (0..PAGES).map(|_| AtomicBool::new(false)).collect(),
            places: AtomicU64::new(1),
            layout: Default::default(),
        });
        let start = match random(2) {
            0 => DirtyLogStart::Protected,
            _ => DirtyLogStart::InitiallySet,
        };
        let config = MmuConfig::default().with_dirty_log_start(start);
        let arena = Arc::new(Arena::new(Pfn(0x1000), 96));
        let host = Receiver(Arc::clone(&machine));
        let mmu = stage.build(Arc::clone(&arena), host, config);
        mmu.create_slot(slot(PLACES[0])).unwrap();
        Arc::new(Self {
            mmu,
            machine,
            arena,
        })
    }

    /// One access, with the faults that it takes. False if the slot is not there.
    fn access(&self, cpu: usize, state: &mut Cpu, page: u64, access: Access, value: u64) -> bool {
        let machine = &*self.machine;
        for _ in 0..200 {
            let place = u64::from(machine.places.load(SeqCst) & 1 == 0);
            let gfn = Gfn(PLACES[place as usize] + page);
            // Into the guest: from here on flushes wait for us.
            machine.obeyed[cpu].store(state.done, SeqCst);
            let mut why = None;
            for _ in 0..2 {
                // Obey, and use, without a step between.
                if machine.requested.load(SeqCst) != state.done {
                    let flushes = machine.flushes.lock().unwrap();
                    for flush in &flushes[state.done..] {
                        state.tlb.retain(|&gfn, _| !flush.covers(Gfn(gfn)));
                    }
                    state.done = flushes.len();
                    drop(flushes);
                    machine.obeyed[cpu].store(state.done, SeqCst);
                    if machine.requested.load(SeqCst) != state.done {
                        continue;
                    }
                }
                if let Some(hit) = state.tlb.get(&gfn.0)
                    && (access != Access::Write || (hit.writable && hit.dirty))
                {
                    machine.used(gfn, *hit);
                    if access == Access::Write {
                        machine.memory[(hit.pfn.0 - HOST) as usize].store(value, SeqCst);
                    }
                    machine.obeyed[cpu].store(OUTSIDE, SeqCst);
                    return true;
                }
                match self.mmu.access(&mut state.vcpu, gfn, access) {
                    Ok(to) => {
                        state.tlb.insert(gfn.0, to);
                    }
                    Err(fault) => {
                        why = Some(fault);
                        break;
                    }
                }
            }
            machine.obeyed[cpu].store(OUTSIDE, SeqCst);
            let Some(why) = why else { continue };
            let mut fault = Fault::new(gfn, access).with_seq(self.mmu.invalidate_seq());
            fault.present = matches!(why, WalkFault::Permission | WalkFault::AccessedDirty);
            if random(4) == 0 {
                fault.max_level = Level::SIZE_4K;
            }
            match self.mmu.fault(&mut state.vcpu, fault) {
                FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => {
                    state.tlb.remove(&gfn.0);
                }
                FaultOutcome::Retry => thread::yield_now(),
                FaultOutcome::NoSlot => return false,
                other => panic!("{other:?} at {gfn}"),
            }
        }
        // The others may keep it busy for long; that it is not for ever is for shuttle's limit of
        // steps to say.
        false
    }

    fn run(&self, cpu: usize, accesses: usize) {
        let mut state = Cpu {
            vcpu: self.mmu.vcpu(),
            tlb: HashMap::new(),
            done: 0,
        };
        for n in 0..accesses {
            let page = TOUCHED[random(TOUCHED.len() as u64) as usize];
            let access = match random(4) {
                0 => Access::Read,
                _ => Access::Write,
            };
            let value = (n * 8 + cpu + 1) as u64;
            self.access(cpu, &mut state, page, access, value);
        }
    }

    fn place(&self) -> u64 {
        PLACES[usize::from(self.machine.places.load(SeqCst) & 1 == 0)]
    }

    /// Takes memory back and gives it again, as a host does under pressure.
    fn notify(&self) {
        let page = TOUCHED[random(TOUCHED.len() as u64) as usize];
        let machine = &self.machine;
        let layout = machine.layout.lock().unwrap();
        let gfn = Gfn(self.place() + page);
        let token = self
            .mmu
            .space(0)
            .invalidate_begin(GfnRange::new(gfn, 1), random(2) == 0);
        machine.revoked[page as usize].store(true, SeqCst);
        // Long enough for a vCPU to come back to the page.
        for _ in 0..4 {
            thread::yield_now();
        }
        machine.revoked[page as usize].store(false, SeqCst);
        self.mmu.invalidate_end(token).unwrap();
        drop(layout);
    }

    /// Everything else that takes mappings away or changes their size.
    fn churn(&self, rounds: usize) {
        let range = GfnRange::new(Gfn(0), 4096);
        for _ in 0..rounds {
            match random(4) {
                0 => self.mmu.zap_all(),
                1 => {
                    self.mmu.invalidate_roots();
                    thread::yield_now();
                    self.mmu.zap_invalidated_roots();
                }
                2 => {
                    self.mmu.space(0).age(range);
                    self.mmu.reclaim();
                }
                _ => {
                    self.mmu.space(0).split_huge_pages(range, Level::SIZE_4K);
                }
            }
        }
    }

    fn finish(self: Arc<Self>) {
        let vm = Arc::into_inner(self).expect("every thread has ended");
        vm.mmu.zap_all();
        vm.mmu.reclaim();
        let stats = vm.mmu.stats();
        assert_eq!(stats.pages, [0; 5], "{stats:?}");
        assert_eq!((stats.tables, stats.tables_retired, stats.roots), (0, 0, 0));
        assert_eq!(vm.arena.used_frames(), 0);
    }
}

impl Machine {
    /// A translation is used now: is that what the host was promised?
    fn used(&self, gfn: Gfn, to: Translation) {
        let page = to.pfn.0.wrapping_sub(HOST);
        let places = self.places.load(SeqCst);
        let wrong = if page >= PAGES {
            Some("memory that is no slot's")
        } else if !PLACES
            .iter()
            .enumerate()
            .any(|(n, place)| places >> n & 1 == 1 && gfn.0 == place + page)
        {
            Some("a place where the slot is not")
        } else if self.revoked[page as usize].load(SeqCst) {
            Some("memory that was taken back")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            panic!("stale translation: {gfn} leads to {wrong}");
        }
    }
}

struct Cpu {
    vcpu: Vcpu,
    tlb: HashMap<u64, Translation>,
    done: usize,
}

fn slot(place: u64) -> SlotSpec {
    SlotSpec::new(0, Gfn(place), PAGES, Pfn(HOST))
}

fn spawn(vm: &Arc<Vm>, body: impl FnOnce(&Vm) + Send + 'static) -> thread::JoinHandle<()> {
    let vm = Arc::clone(vm);
    thread::spawn(move || body(&vm))
}

/// Dirty logging goes on, is harvested and goes off and on again, beside writers and everything
/// that takes mappings away.
fn dirty_log(stage: GuestStage) {
    let vm = Vm::new(stage, 2);
    let cpus: Vec<_> = (0..2)
        .map(|cpu| spawn(&vm, move |vm| vm.run(cpu, 8)))
        .collect();
    let churn = spawn(&vm, |vm| vm.churn(3));
    let notifier = spawn(&vm, |vm| (0..2).for_each(|_| vm.notify()));
    let contents = |page: usize| vm.machine.memory[page].load(SeqCst);
    let mut copy = vec![0; PAGES as usize];
    let harvest = |copy: &mut Vec<u64>, manual: bool| {
        let mut bitmap = [0; PAGES.div_ceil(64) as usize];
        if manual {
            vm.mmu.space(0).get_dirty_log(0, &mut bitmap).unwrap();
            vm.mmu
                .space(0)
                .clear_dirty_log(0, 0, PAGES, &bitmap)
                .unwrap();
        } else {
            vm.mmu.space(0).harvest_dirty_log(0, &mut bitmap).unwrap();
        }
        for (page, copied) in copy.iter_mut().enumerate() {
            if bitmap[page / 64] >> (page % 64) & 1 == 1 {
                *copied = contents(page);
            }
        }
    };
    for log in 0..2 {
        vm.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        for (page, copied) in copy.iter_mut().enumerate() {
            *copied = contents(page);
        }
        harvest(&mut copy, random(2) == 0);
        if log == 0 && random(2) == 0 {
            vm.mmu
                .space(0)
                .set_slot_flags(0, SlotFlags::empty())
                .unwrap();
        } else {
            break;
        }
    }
    if vm.mmu.slots()[0].flags.is_empty() {
        vm.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        for (page, copied) in copy.iter_mut().enumerate() {
            *copied = contents(page);
        }
    }
    for cpu in cpus {
        cpu.join().unwrap();
    }
    churn.join().unwrap();
    notifier.join().unwrap();
    harvest(&mut copy, false);
    for (page, copied) in copy.iter().enumerate() {
        assert_eq!(
            *copied,
            contents(page),
            "page {page} was written and never reported"
        );
    }
    vm.finish();
}

/// The slot is deleted, made again and moved under running vCPUs.
fn slots(stage: GuestStage) {
    let vm = Vm::new(stage, 2);
    let cpus: Vec<_> = (0..2)
        .map(|cpu| spawn(&vm, move |vm| vm.run(cpu, 8)))
        .collect();
    let churn = spawn(&vm, |vm| vm.churn(3));
    let notifier = spawn(&vm, |vm| (0..2).for_each(|_| vm.notify()));
    let places = &vm.machine.places;
    for _ in 0..3 {
        let _layout = vm.machine.layout.lock().unwrap();
        match random(3) {
            0 => {
                vm.mmu.space(0).delete_slot(0).unwrap();
                let place = places.swap(0, SeqCst);
                thread::yield_now();
                places.store(place, SeqCst);
                let at = PLACES[usize::from(place & 1 == 0)];
                vm.mmu.create_slot(slot(at)).unwrap();
            }
            1 => {
                let to = usize::from(places.load(SeqCst) & 1 == 1);
                places.store(0b11, SeqCst);
                vm.mmu.space(0).move_slot(0, Gfn(PLACES[to])).unwrap();
                places.store(1 << to, SeqCst);
            }
            _ => {
                vm.mmu
                    .space(0)
                    .set_slot_flags(0, SlotFlags::LOG_DIRTY)
                    .unwrap();
                vm.mmu
                    .space(0)
                    .set_slot_flags(0, SlotFlags::empty())
                    .unwrap();
            }
        }
    }
    for cpu in cpus {
        cpu.join().unwrap();
    }
    churn.join().unwrap();
    notifier.join().unwrap();
    vm.finish();
}

/// Memory is taken back while roots are withdrawn: unmapping flushes nothing under a withdrawn
/// root, because the flush of the withdrawal was in the same section.
fn revocations(stage: GuestStage) {
    let vm = Vm::new(stage, 2);
    let cpus: Vec<_> = (0..2)
        .map(|cpu| spawn(&vm, move |vm| vm.run(cpu, 6)))
        .collect();
    let withdrawals = spawn(&vm, |vm| {
        for _ in 0..3 {
            vm.mmu.invalidate_roots();
            thread::yield_now();
            vm.mmu.zap_invalidated_roots();
        }
    });
    for _ in 0..4 {
        vm.notify();
    }
    for cpu in cpus {
        cpu.join().unwrap();
    }
    withdrawals.join().unwrap();
    vm.finish();
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {value}")),
    )
}

/// How many schedules have begun; says so if one fails.
struct Begun<'a>(&'a str, Arc<AtomicU64>);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}: schedule {} failed", self.0, self.1.load(SeqCst));
        }
    }
}

/// Runs `scene` under random and under priority schedules, on every format in turn.
fn schedules(name: &str, share: usize, scene: fn(GuestStage)) {
    let seed =
        number("SLAT_SHUTTLE_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let total = number("SLAT_SHUTTLE_SCHEDULES").map_or(share, |count| count as usize);
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(2_000_000);
    config.silence_warnings = true;
    config.stack_size = 1 << 17;
    println!("{name}: SLAT_SHUTTLE_SEED={seed}");
    let begin = Instant::now();
    let begun = Begun(name, Arc::default());
    for stage in GuestStage::ALL {
        if let Ok(schedule) = std::env::var("SLAT_SHUTTLE_REPLAY") {
            shuttle::replay(move || scene(stage), &schedule);
            continue;
        }
        let each = total.div_ceil(2 * GuestStage::ALL.len());
        println!("{name}: {stage}");
        let counted = |number: &Arc<AtomicU64>| {
            let number = Arc::clone(number);
            move || {
                number.fetch_add(1, SeqCst);
                scene(stage);
            }
        };
        let random = RandomScheduler::new_from_seed(seed, each);
        Runner::new(random, config.clone()).run(counted(&begun.1));
        let priorities = PctScheduler::new_from_seed(seed, 3, each);
        Runner::new(priorities, config.clone()).run(counted(&begun.1));
    }
    println!(
        "{name}: {} schedules, every second one by priorities, {:.1} s",
        begun.1.load(SeqCst),
        begin.elapsed().as_secs_f64()
    );
}

#[test]
fn no_write_is_lost() {
    schedules("dirty log", 5_000, dirty_log);
}

#[test]
fn no_translation_outlives_its_slot() {
    schedules("slots", 5_000, slots);
}

#[test]
fn no_translation_outlives_its_memory() {
    schedules("revocations", 5_000, revocations);
}
