//! An MMU whose host and memory a test can see through.
//!
//! *Locking*: hooks are called without any lock of the rig's, so they may look at it; whether they
//! may call the MMU is the MMU's rule (`slat_mmu::Host`): not from the thread that is in it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, EntryCell, Fault, FaultOutcome, Flush, FlushCause, FlushRequest, Gfn, GfnRange,
    Header, Host, Level, MmuConfig, Pfn, SecondStage, SlotSpec, TableMemory, Vcpu,
};

/// Long enough for anything that happens at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Host frame behind the first page of [`Rig::slot`]'s slot; aligned to 1 GiB.
pub(crate) const HOST: u64 = 1 << 20;
/// Pages of a 2 MiB and a 1 GiB mapping.
pub(crate) const HUGE: u64 = 512;
pub(crate) const GIGA: u64 = 512 * 512;

/// What happened, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Flush(FlushRequest),
    /// A table's memory came back.
    Freed(Pfn),
}

type Hook<A> = Mutex<Option<Arc<dyn Fn(A) + Send + Sync>>>;

fn call<A>(hook: &Hook<A>, argument: A) {
    let hook = hook.lock().unwrap().clone();
    if let Some(hook) = hook {
        hook(argument);
    }
}

/// Host and memory in one.
#[derive(Default)]
pub(crate) struct World {
    events: Mutex<Vec<Event>>,
    flush: Hook<FlushRequest>,
    allocate: Hook<()>,
    /// Allocations until memory runs out.
    left: AtomicUsize,
}

pub(crate) struct Memory {
    pub(crate) arena: Arena,
    world: Arc<World>,
}

pub(crate) struct Outside(Arc<World>);

impl Host for Outside {
    fn flush(&self, request: &FlushRequest) {
        self.0.events.lock().unwrap().push(Event::Flush(*request));
        call(&self.0.flush, *request);
    }
}

/// In memory that is given out: no entry of any format, and one that points to a table on most.
const GARBAGE: u64 = 0x0000_0000_dead_b007;

// SAFETY: the arena's own promises; what is written on allocation is written before the frame is
// given out.
unsafe impl TableMemory for Memory {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        call(&self.world.allocate, ());
        let left = |left: usize| left.checked_sub(1);
        self.world.left.fetch_update(SeqCst, SeqCst, left).ok()?;
        let pfn = self.arena.allocate(bytes)?;
        for index in 0..bytes / size_of::<u64>() {
            // SAFETY: the frame is ours alone and `bytes` long.
            unsafe {
                self.arena
                    .entries(pfn)
                    .add(index)
                    .write(EntryCell::new(GARBAGE))
            };
        }
        Some(pfn)
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        self.world.events.lock().unwrap().push(Event::Freed(pfn));
        self.world.left.fetch_add(1, SeqCst);
        // SAFETY: the caller's promise.
        unsafe { self.arena.free(pfn, bytes) }
    }

    unsafe fn entries(&self, pfn: Pfn) -> std::ptr::NonNull<EntryCell> {
        // SAFETY: the caller's promise.
        unsafe { self.arena.entries(pfn) }
    }

    fn header(&self, pfn: Pfn) -> &Header {
        self.arena.header(pfn)
    }
}

/// One format of each way to keep Accessed, Dirty and the log.
const KINDS: [GuestStage; 5] = [
    GuestStage::Ept4,
    GuestStage::Ept4NoAd,
    GuestStage::Npt4,
    GuestStage::Sv39x4,
    GuestStage::Arm64Ipa40,
];

/// Every format.
#[cfg(not(few_formats))]
fn stages() -> impl Iterator<Item = GuestStage> {
    GuestStage::ALL.into_iter()
}

#[cfg(not(few_formats))]
fn build(
    stage: GuestStage,
    memory: Arc<Memory>,
    host: Outside,
    config: MmuConfig,
) -> Box<dyn SecondStage> {
    stage.build(memory, host, config)
}

/// `cargo xtask planted` compiles these tests many times.
#[cfg(few_formats)]
fn stages() -> impl Iterator<Item = GuestStage> {
    KINDS.into_iter()
}

#[cfg(few_formats)]
fn build(
    stage: GuestStage,
    memory: Arc<Memory>,
    host: Outside,
    config: MmuConfig,
) -> Box<dyn SecondStage> {
    use slat_mmu::TdpMmu;
    match stage {
        GuestStage::Ept4 => Box::new(TdpMmu::<slat_arch::Ept4, _>::new(memory, host, config)),
        GuestStage::Ept4NoAd => {
            Box::new(TdpMmu::<slat_arch::Ept4NoAd, _>::new(memory, host, config))
        }
        GuestStage::Npt4 => Box::new(TdpMmu::<slat_arch::Npt4, _>::new(memory, host, config)),
        GuestStage::Sv39x4 => Box::new(TdpMmu::<slat_arch::Sv39x4, _>::new(memory, host, config)),
        GuestStage::Arm64Ipa40 => Box::new(TdpMmu::<slat_arch::Arm64Ipa40, _>::new(
            memory, host, config,
        )),
        other => panic!("{other} is not among the few"),
    }
}

/// See the module.
pub(crate) struct Rig {
    pub(crate) stage: GuestStage,
    pub(crate) memory: Arc<Memory>,
    pub(crate) mmu: Box<dyn SecondStage>,
}

impl Rig {
    pub(crate) fn new(stage: GuestStage, config: MmuConfig) -> Self {
        let world = Arc::new(World::default());
        world.left.store(usize::MAX / 2, SeqCst);
        let memory = Arc::new(Memory {
            arena: Arena::new(Pfn(0x1000), 2048),
            world: Arc::clone(&world),
        });
        let mmu = build(stage, Arc::clone(&memory), Outside(world), config);
        Self { stage, memory, mmu }
    }

    /// Slot `id` over `pages` from `gfn` on, whose host frames run alike: frame `HOST + gfn` behind
    /// frame `gfn`, as far as host frames reach.
    pub(crate) fn slot(&self, id: u16, gfn: u64, pages: u64) {
        let host = Pfn(HOST + gfn % (1 << 26));
        let spec = SlotSpec::new(id, Gfn(gfn), pages, host);
        self.mmu.create_slot(spec).unwrap();
    }

    pub(crate) fn on_flush(&self, hook: impl Fn(FlushRequest) + Send + Sync + 'static) {
        *self.memory.world.flush.lock().unwrap() = Some(Arc::new(hook));
    }

    pub(crate) fn on_allocate(&self, hook: impl Fn(()) + Send + Sync + 'static) {
        *self.memory.world.allocate.lock().unwrap() = Some(Arc::new(hook));
    }

    pub(crate) fn no_hooks(&self) {
        *self.memory.world.flush.lock().unwrap() = None;
        *self.memory.world.allocate.lock().unwrap() = None;
    }

    pub(crate) fn allocations_left(&self, left: usize) {
        self.memory.world.left.store(left, SeqCst);
    }

    /// What happened since the last time.
    pub(crate) fn events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.memory.world.events.lock().unwrap())
    }

    /// Flushes since the last time, without what break-before-make adds.
    pub(crate) fn flushes(&self) -> Vec<(Flush, FlushCause)> {
        let flush = |event: Event| match event {
            Event::Flush(request) if request.cause != FlushCause::BreakBeforeMake => {
                Some((request.flush, request.cause))
            }
            _ => None,
        };
        self.events().into_iter().filter_map(flush).collect()
    }

    /// One fault as a TLB miss raises it: whether the walk found a mapping is said.
    pub(crate) fn fault(&self, vcpu: &mut Vcpu, gfn: u64, access: Access) -> FaultOutcome {
        self.mmu.fault(vcpu, Fault::new(Gfn(gfn), access))
    }

    /// Maps at `level` or finer.
    pub(crate) fn map(&self, vcpu: &mut Vcpu, gfn: u64, access: Access, level: Level) {
        let fault = Fault::new(Gfn(gfn), access).with_max_level(level);
        let outcome = self.mmu.fault(vcpu, fault);
        assert_eq!(
            outcome,
            FaultOutcome::Fixed { level },
            "{} at {gfn:#x}",
            self.stage
        );
    }

    /// The guest uses a page, faulting as often as it must.
    pub(crate) fn touch(&self, vcpu: &mut Vcpu, gfn: u64, access: Access) {
        for _ in 0..16 {
            if self.mmu.access(vcpu, Gfn(gfn), access).is_ok() {
                return;
            }
            match self.fault(vcpu, gfn, access) {
                FaultOutcome::Fixed { .. }
                | FaultOutcome::Spurious { .. }
                | FaultOutcome::Retry => {}
                other => panic!("{}: {other:?} at {gfn:#x}", self.stage),
            }
        }
        panic!("{}: {gfn:#x} faults for ever", self.stage);
    }

    /// The guest writes a page that is mapped at 4 KiB.
    pub(crate) fn touch_small(&self, vcpu: &mut Vcpu, gfn: u64) {
        for _ in 0..1000 {
            let fault = Fault::new(Gfn(gfn), Access::Write).with_max_level(Level::SIZE_4K);
            match self.mmu.fault(vcpu, fault) {
                FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => return,
                FaultOutcome::Retry => {}
                other => panic!("{}: {other:?} at {gfn:#x}", self.stage),
            }
        }
        panic!("{}: {gfn:#x} faults for ever", self.stage);
    }

    /// The entry that ends the walk.
    pub(crate) fn raw(&self, gfn: u64) -> u64 {
        self.mmu
            .space(0)
            .walk(Gfn(gfn))
            .last()
            .expect("there is a root")
            .raw
    }

    pub(crate) fn dirty(&self, id: u16, pages: u64) -> Vec<u64> {
        let mut bitmap = vec![0; pages.div_ceil(64) as usize];
        self.mmu.space(0).get_dirty_log(id, &mut bitmap).unwrap();
        bitmap
    }

    /// Nothing is mapped and no table in use; vCPUs must be gone.
    pub(crate) fn settled(&self) {
        self.mmu.zap_all();
        self.mmu.reclaim();
        let stats = self.mmu.stats();
        assert_eq!(stats.pages, [0; 5], "{}: {stats:?}", self.stage);
        assert_eq!((stats.tables, stats.roots), (0, 0), "{}", self.stage);
        assert_eq!(self.memory.arena.used_frames(), 0, "{}", self.stage);
    }
}

/// Runs `test` on every format with a slot of 2 GiB at frame 0.
pub(crate) fn each(test: impl Fn(&Rig)) {
    each_with(MmuConfig::default(), test);
}

/// On one format of each kind: for what waits for threads to meet, and is not the formats'.
pub(crate) fn each_kind(test: impl Fn(&Rig)) {
    for stage in KINDS {
        let rig = Rig::new(stage, MmuConfig::default());
        rig.slot(0, 0, 2 * GIGA);
        test(&rig);
    }
}

pub(crate) fn each_with(config: MmuConfig, test: impl Fn(&Rig)) {
    for stage in stages() {
        let rig = Rig::new(stage, config);
        rig.slot(0, 0, 2 * GIGA);
        test(&rig);
    }
}

pub(crate) fn range(gfn: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn(gfn), pages)
}

/// Runs `main` while two threads have the exclusive lock taken again and again, by unmapping frames
/// that no slot covers. `main` is told how often they had it.
pub(crate) fn contended(rig: &Rig, main: impl FnOnce(&AtomicU64)) {
    let (stop, times) = (AtomicBool::new(false), AtomicU64::new(0));
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    rig.mmu.space(0).zap_gfn_range(range(100 * GIGA, 1));
                    times.fetch_add(1, SeqCst);
                }
            });
        }
        // Also when a check fails.
        let _stop = Stop(&stop);
        main(&times);
    });
}

/// Waits for `done`; false if it takes too long.
pub(crate) fn until(bound: Duration, done: impl Fn() -> bool) -> bool {
    let begin = Instant::now();
    while !done() {
        if begin.elapsed() > bound {
            return false;
        }
        thread::yield_now();
    }
    true
}
