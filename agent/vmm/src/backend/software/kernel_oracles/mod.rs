//! The kernel's KVM selftests, as oracles over this backend's real vCPU threads: same walk, TLB,
//! faults, shoot-down and gate as memstress runs on, with little access programs in its place.
//!
//! Each file has the name of its selftest.
//!
//! | file | oracle |
//! |---|---|
//! | `dirty_log_test` | a set bit: the value is recent; a clear one: older, or set next time |
//! | `dirty_log_page_splitting_test` | mappings by size, before, in and after logging |
//! | `set_memory_region_test` | a slot that moves never shows the wrong place's memory |
//! | `memslot_modification_stress_test` | slots beside the guest's change: it notices nothing |
//! | `mmu_stress_test` | while memory is protected every write faults; after, none does |
//! | `demand_paging_test` | what the host took is served once, and never seen before |
//! | `access_tracking_perf_test` | exactly the pages used since the last ageing are young |
//! | `pre_fault_memory_test` | a range mapped in advance takes no fault, to where it ends |
//!
//! Each oracle returns an [`Outcome`], so that it is also run with the backend sabotaged, where it
//! must object. Each runs on one format of every *class*: who keeps Accessed and Dirty, how writes
//! are logged, break before make. Randomness comes from seeds, printed; `SLAT_ORACLE_SEED` sets
//! them. Waiting is for events, with a bound.

mod access_tracking_perf_test;
mod demand_paging_test;
mod dirty_log_page_splitting_test;
mod dirty_log_test;
mod memslot_modification_stress_test;
mod mmu_stress_test;
mod pre_fault_memory_test;
mod set_memory_region_test;

use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use slat_arch::GuestStage;
use slat_mmu::{
    Fault, Flush, Gfn, GfnRange, MmuConfig, PAGE_SIZE, Pfn, SecondStage, SlotFlags, SlotId,
    SlotSpec,
};

use super::{
    port::Port,
    shared::VmCore,
    tables::{Budget, TableHeap},
    vcpu::{AccessError, Vcpu},
};
use crate::{backend::GuestEvent, guest::memstress::GuestAccess, memory::Region};

/// A hang is an error.
const PATIENCE: Duration = Duration::from_secs(30);

/// `Err` says what the oracle objects to.
type Outcome = Result<(), String>;

/// What a test puts between a fault of a vCPU and the MMU: the host's memory management. `None`:
/// the host refuses (`EFAULT`).
type Pager = Box<dyn Fn(&dyn SecondStage, Fault) -> Option<Fault> + Send + Sync>;

/// A port through which tests do things to a VM.
#[derive(Default)]
pub(super) struct Hooks {
    /// vCPUs acknowledge flushes without carrying them out.
    pub(super) deaf: AtomicBool,
    /// Complete flushes are not noted, so the check of stale translations finds nothing: for tests
    /// that want the damage itself.
    blind: AtomicBool,
    pager: OnceLock<Pager>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("deaf", &self.deaf)
            .finish_non_exhaustive()
    }
}

impl Port for Hooks {
    fn page_in(&self, mmu: &dyn SecondStage, fault: Fault) -> Option<Fault> {
        match self.pager.get() {
            Some(pager) => pager(mmu, fault),
            None => Some(fault),
        }
    }

    fn dropped(&self, flush: Flush) -> Flush {
        if self.deaf.load(Relaxed) {
            Flush::None
        } else {
            flush
        }
    }

    fn follows_root(&self) -> bool {
        !self.deaf.load(Relaxed)
    }

    fn notes(&self) -> bool {
        !self.blind.load(Relaxed)
    }
}

/// What is wrong with the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    /// vCPUs do not flush, and the check of stale translations is switched off.
    Deaf,
    /// What only this oracle knows.
    Own,
}

/// One format of each class.
fn stages() -> Vec<GuestStage> {
    let mut found: Vec<GuestStage> = Vec::new();
    let class = |stage: GuestStage| {
        let info = stage.info();
        (info.ad_policy, info.dirty_log, info.break_before_make)
    };
    for stage in GuestStage::ALL {
        if found.iter().all(|other| class(*other) != class(stage)) {
            found.push(stage);
        }
    }
    found
}

fn check(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what()) }
}

/// xorshift64*.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A slot with its memory.
#[derive(Debug)]
struct Plug {
    id: SlotId,
    base: u64,
    frames: u64,
    memory: Region,
}

impl Plug {
    fn range(&self) -> GfnRange {
        GfnRange::new(Gfn(self.base), self.memory.guest().pages())
    }

    /// The first word of a page, as the host sees it.
    fn value(&self, page: u64) -> u64 {
        self.memory.host().load((page * PAGE_SIZE) as usize)
    }

    fn set(&self, page: u64, value: u64) {
        self.memory.host().store((page * PAGE_SIZE) as usize, value);
    }
}

/// A vCPU with a program. The first word of a page is what programs read and write.
struct Cpu<'v> {
    vcpu: &'v mut Vcpu,
    number: u64,
    random: &'v mut Random,
}

impl Cpu<'_> {
    fn read(&mut self, gfn: u64) -> Result<u64, AccessError> {
        self.vcpu.read_u64(gfn * PAGE_SIZE)
    }

    fn write(&mut self, gfn: u64, value: u64) -> Result<(), AccessError> {
        self.vcpu.write_u64(gfn * PAGE_SIZE, value)
    }

    /// Lets others go first.
    fn idle(&mut self) {
        self.outside(|_| thread::yield_now());
    }

    /// Does something outside the guest.
    fn outside<R>(&mut self, act: impl FnOnce(&mut Vcpu) -> R) -> R {
        self.vcpu.leave();
        let result = act(self.vcpu);
        self.vcpu.enter();
        result
    }
}

/// Whether an access failed because there is no slot: a device's place.
fn is_mmio<T>(result: &Result<T, AccessError>) -> bool {
    matches!(result, Err(AccessError::NoSlot { .. }))
}

/// A VM without a guest.
struct OracleVm {
    vm: Arc<VmCore>,
    hooks: Arc<Hooks>,
    vcpus: u32,
    seed: u64,
    events: Arc<Mutex<Vec<GuestEvent>>>,
}

impl OracleVm {
    fn new(name: &str, stage: GuestStage, vcpus: u32, config: MmuConfig) -> Self {
        let seed = std::env::var("SLAT_ORACLE_SEED").ok();
        let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(0x51a7);
        println!("{name} on {stage}: SLAT_ORACLE_SEED={seed}");
        let budget = Arc::new(Budget::default());
        budget.limit_to(1 << 16);
        let tables = TableHeap::new(budget).unwrap();
        let events: Arc<Mutex<Vec<GuestEvent>>> = Arc::default();
        let sink = Arc::clone(&events);
        let sink = Arc::new(move |event| sink.lock().unwrap().push(event));
        let hooks = Arc::new(Hooks::default());
        let port = Arc::clone(&hooks) as Arc<dyn Port>;
        Self {
            vm: VmCore::new(stage, vcpus, config, tables, sink, port),
            hooks,
            vcpus,
            seed,
            events,
        }
    }

    /// To be called before anything was flushed.
    fn prepare(self, sabotage: Option<Sabotage>) -> Self {
        let blind = sabotage == Some(Sabotage::Deaf);
        self.hooks.blind.store(blind, Relaxed);
        self
    }

    fn sabotage(&self, sabotage: Option<Sabotage>) {
        let deaf = sabotage == Some(Sabotage::Deaf);
        self.hooks.deaf.store(deaf, Relaxed);
    }

    fn mmu(&self) -> &dyn SecondStage {
        &*self.vm.mmu
    }

    fn random(&self, stream: u64) -> Random {
        // Never 0, where the generator would stay.
        let mixed = self
            .seed
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Random((mixed ^ (stream + 1) << 32) | 1)
    }

    /// Plugs in memory of zeroes.
    fn plug(&self, id: SlotId, base: u64, pages: u64) -> Plug {
        self.plug_in(id, base, Region::new("oracle", pages).unwrap())
    }

    fn plug_in(&self, id: SlotId, base: u64, memory: Region) -> Plug {
        let view = memory.guest();
        let frames = self.vm.frames.add(view, base).unwrap();
        let spec = SlotSpec::new(id, Gfn(base), view.pages(), Pfn(frames));
        self.mmu().create_slot(spec).unwrap();
        Plug {
            id,
            base,
            frames,
            memory,
        }
    }

    fn unplug(&self, plug: &Plug) {
        self.mmu().space(0).delete_slot(plug.id).unwrap();
        self.vm.frames.remove(plug.frames);
    }

    fn log(&self, plug: &Plug, on: bool) {
        let mut flags = SlotFlags::empty();
        flags.set(SlotFlags::LOG_DIRTY, on);
        self.mmu().space(0).set_slot_flags(plug.id, flags).unwrap();
    }

    fn run(&self) -> Outcome {
        self.vm.gate.run().map_err(|error| error.to_string())
    }

    /// Returns when no vCPU runs.
    fn pause(&self) -> Outcome {
        self.vm.gate.pause().map_err(|error| error.to_string())?;
        self.failure()
    }

    fn failure(&self) -> Outcome {
        match self.events.lock().unwrap().first() {
            Some(GuestEvent::Failed(failure)) => Err(failure.to_string()),
            Some(event) => Err(format!("{event:?}")),
            None => Ok(()),
        }
    }

    fn until(&self, mut done: impl FnMut() -> bool) -> Outcome {
        let until = Instant::now() + PATIENCE;
        while !done() {
            self.failure()?;
            if Instant::now() > until {
                return Err(format!("nothing moves for {PATIENCE:?}"));
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// Has vCPUs repeat `program` while `owner` does its work; ends them all. The vCPUs begin
    /// stopped. What a program objects to stops them, and is the verdict.
    fn with_vcpus(
        &self,
        program: impl Fn(&mut Cpu<'_>) -> Outcome + Sync,
        owner: impl FnOnce() -> Outcome,
    ) -> Outcome {
        let ended = thread::scope(|scope| {
            for number in 0..self.vcpus {
                let vcpu = Vcpu::new(Arc::clone(&self.vm), number);
                let mut random = self.random(u64::from(number));
                let program = &program;
                scope.spawn(move || {
                    vcpu.live_by(|vcpu| {
                        vcpu.enter();
                        while self.vm.gate.running() {
                            program(&mut Cpu {
                                vcpu,
                                number: u64::from(number),
                                random: &mut random,
                            })?;
                        }
                        Ok::<(), String>(())
                    });
                });
            }
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(owner));
            self.vm.gate.end();
            ended
        });
        // What a vCPU objected to comes first: the owner may have failed for it.
        self.failure()?;
        match ended {
            Ok(verdict) => verdict,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// One vCPU on this thread, inside the guest: what flushes is to be done
    /// [outside](Cpu::outside), or waits for ever.
    fn alone<R>(&self, act: impl FnOnce(&mut Cpu<'_>) -> R) -> R {
        let mut vcpu = Vcpu::new(Arc::clone(&self.vm), 0);
        vcpu.enter();
        let result = act(&mut Cpu {
            vcpu: &mut vcpu,
            number: 0,
            random: &mut self.random(0),
        });
        vcpu.leave();
        result
    }
}

/// What one place means now, for readers that cannot stop the owner: an even version for as long as
/// nothing changes.
#[derive(Debug, Default)]
struct Version(AtomicU64);

impl Version {
    fn now(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Runs a change; during it the version is odd.
    fn change<R>(&self, act: impl FnOnce() -> R) -> R {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let result = act();
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        result
    }
}

/// An oracle accepts the backend as it is.
fn accepts(verdict: Outcome) {
    if let Err(objection) = verdict {
        panic!("{objection}");
    }
}

/// An oracle objects to a backend that was broken.
fn objects(verdict: Outcome, because: &str) {
    match verdict {
        Ok(()) => panic!("the oracle did not notice"),
        Err(objection) => {
            println!("noticed: {objection}");
            assert!(objection.contains(because), "{objection}");
        }
    }
}
