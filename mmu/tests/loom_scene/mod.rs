//! What the loom models share: a format with two entries a table, table memory that notices a use
//! after free, and a guest.
//!
//! *Table memory.* A frame is never given out twice. Freeing one writes to each of its entries
//! without synchronisation, so loom fails the model unless every use of the table, by whomever,
//! happens before: a grace period that is too short, or an ordering that is too weak for it, cannot
//! hide.
//!
//! *The guest.* A vCPU translates and uses the translation while it holds its own lock, "in the
//! guest"; a flush takes each vCPU's lock once, as a shoot-down waits for each acknowledgement. So
//! there is no TLB, and what a flush has to achieve is still modelled: when it returns, no access
//! that was translated before it is under way.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each model file uses a part"
)]

use std::{
    ptr::NonNull,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use loom::cell::UnsafeCell;
use slat_mmu::{
    Access, AdPolicy, Batch, ChangeKind, DirtyLogPolicy, Entry, EntryCell, ExternalTables, Fault,
    FaultOutcome, FlushPrimitive, FlushRequest, Format, Gfn, Header, Host, Leaf, Level, MemoryType,
    MmuConfig, Pfn, Refused, SecondStage, SlotFlags, SlotSpec, TableMemory, TdpMmu, Vcpu,
    WalkFault,
};

/// Who keeps A and D, and how writes are logged.
pub const SOFTWARE: u8 = 0;
pub const HARDWARE: u8 = 1;
pub const DIRTY_BIT: u8 = 2;

/// `LEVELS` levels of two entries each.
#[derive(Clone, Copy, Debug)]
pub struct Tiny<const LEVELS: usize = 2, const BREAK: bool = false, const AD: u8 = SOFTWARE>;

const VALID: u64 = 1 << 0;
const LEAF: u64 = 1 << 2;
const WRITE: u64 = 1 << 3;
const EXECUTE: u64 = 1 << 4;
const MMU_WRITE: u64 = 1 << 5;
const HOST_WRITE: u64 = 1 << 6;
const ACCESSED: u64 = 1 << 7;
const DIRTY: u64 = 1 << 8;
/// A hole; the generation of slots is above.
const MMIO: u64 = 1 << 9;
const MMIO_SHIFT: u32 = 12;
const ALL: u64 = VALID | LEAF | WRITE | EXECUTE | MMU_WRITE | HOST_WRITE | ACCESSED | DIRTY;

const fn bit(on: bool, mask: u64) -> u64 {
    if on { mask } else { 0 }
}

// SAFETY: `decode` accepts exactly what the makers make: tables have VALID alone, leaves LEAF too,
// holes MMIO and not VALID, and FROZEN is a bit of its own.
unsafe impl<const LEVELS: usize, const BREAK: bool, const AD: u8> Format
    for Tiny<LEVELS, BREAK, AD>
{
    const NAME: &'static str = "tiny";
    const INDEX_BITS: &'static [u32] = match LEVELS {
        2 => &[1, 1],
        _ => &[1, 1, 1],
    };
    const MAX_LEAF_LEVEL: Level = Level::SIZE_2M;
    const MAX_GFN: Gfn = Gfn(1 << LEVELS);
    const MAX_PFN: Pfn = Pfn(1 << 20);
    const EMPTY: u64 = 0;
    const FROZEN: u64 = 1 << 1;
    const AD_POLICY: AdPolicy = if AD == SOFTWARE {
        AdPolicy::SetAtInstall
    } else {
        AdPolicy::Hardware
    };
    const DIRTY_LOG: DirtyLogPolicy = if AD == DIRTY_BIT {
        DirtyLogPolicy::DirtyBit
    } else {
        DirtyLogPolicy::WriteProtect
    };
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = BREAK;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("none");
    const MMIO_GENERATION_BITS: u32 = 4;

    fn decode(raw: u64, level: Level) -> Entry {
        if raw == Self::FROZEN {
            return Entry::Frozen;
        }
        if raw & VALID == 0 {
            let generation = (raw >> MMIO_SHIFT) as u32;
            return if raw & MMIO == 0 {
                Entry::NonPresent
            } else {
                Entry::Mmio { generation }
            };
        }
        let pfn = Pfn(raw >> 12);
        if raw & 0xfff == VALID && level > Level::SIZE_4K {
            return Entry::Table { pfn };
        }
        if raw & LEAF == 0
            || raw & 0xfff & !ALL != 0
            || level > Self::MAX_LEAF_LEVEL
            || !pfn.0.is_multiple_of(Self::span(level))
        {
            return Entry::Malformed;
        }
        Entry::Leaf(Leaf {
            pfn,
            readable: true,
            writable: raw & WRITE != 0,
            executable: raw & EXECUTE != 0,
            mmu_writable: raw & MMU_WRITE != 0,
            host_writable: raw & HOST_WRITE != 0,
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
            memory: MemoryType::Normal,
        })
    }

    fn make_leaf(leaf: &Leaf, level: Level) -> u64 {
        (leaf.pfn.0 & !(Self::span(level) - 1)) << 12
            | VALID
            | LEAF
            | bit(leaf.writable, WRITE)
            | bit(leaf.executable, EXECUTE)
            | bit(leaf.mmu_writable, MMU_WRITE)
            | bit(leaf.host_writable, HOST_WRITE)
            | bit(leaf.accessed, ACCESSED)
            | bit(leaf.dirty, DIRTY)
    }

    fn make_table(pfn: Pfn) -> u64 {
        pfn.0 << 12 | VALID
    }

    fn make_mmio(_: Gfn, generation: u32) -> Option<u64> {
        Some(u64::from(generation & 0xf) << MMIO_SHIFT | MMIO)
    }

    fn with_writable(raw: u64, on: bool) -> u64 {
        raw & !WRITE | bit(on, WRITE)
    }

    fn clear_mmu_writable(raw: u64) -> u64 {
        raw & !(WRITE | MMU_WRITE)
    }

    fn with_accessed(raw: u64, on: bool) -> u64 {
        raw & !ACCESSED | bit(on, ACCESSED)
    }

    fn with_dirty(raw: u64, on: bool) -> u64 {
        raw & !DIRTY | bit(on, DIRTY)
    }

    fn with_executable(raw: u64, on: bool) -> u64 {
        raw & !EXECUTE | bit(on, EXECUTE)
    }
}

/// First frame of table memory, and of the guest's.
const TABLES: u64 = 0x100;
pub const HOST: u64 = 0x1000;

struct Frame {
    entries: [EntryCell; 2],
    header: Header,
    live: UnsafeCell<bool>,
}

/// See the module. Its own lock is the real one: it is never held across a step of a model, and
/// gives no order that a real allocator would not.
pub struct Frames {
    #[expect(clippy::vec_box, reason = "a frame stays where it is when others come")]
    frames: Mutex<Vec<Box<std::cell::UnsafeCell<Frame>>>>,
    limit: usize,
    live: AtomicUsize,
    nowhere: Header,
}

// SAFETY: a frame is written through `&mut` only by `free`, which the MMU promises not to race
// with; whether it keeps the promise is what loom checks.
unsafe impl Send for Frames {}
// SAFETY: as above.
unsafe impl Sync for Frames {}

impl Frames {
    fn new(limit: usize) -> Self {
        Self {
            frames: Mutex::default(),
            limit,
            live: AtomicUsize::new(0),
            nowhere: Header::default(),
        }
    }

    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    fn frame(&self, pfn: Pfn) -> Option<*mut Frame> {
        let frames = self.frames.lock().unwrap();
        let frame = frames.get(usize::try_from(pfn.0.checked_sub(TABLES)?).ok()?)?;
        Some(frame.get())
    }
}

// SAFETY: frames are boxed, never given out twice and never moved; an entry is written by nobody
// but the MMU while it is live.
unsafe impl TableMemory for Frames {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        assert_eq!(bytes, 16, "two entries");
        let mut frames = self.frames.lock().unwrap();
        if self.live() >= self.limit {
            return None;
        }
        self.live.fetch_add(1, Ordering::Relaxed);
        frames.push(Box::new(std::cell::UnsafeCell::new(Frame {
            entries: [EntryCell::new(0), EntryCell::new(0)],
            header: Header::default(),
            live: UnsafeCell::new(true),
        })));
        Some(Pfn(TABLES + frames.len() as u64 - 1))
    }

    unsafe fn free(&self, pfn: Pfn, _: usize) {
        let frame = self.frame(pfn).expect("a frame of ours");
        // SAFETY: the caller promises that nobody uses the frame; loom fails the model if that is
        // not so.
        let (live, entries) = unsafe { (&mut (*frame).live, &mut (*frame).entries) };
        live.with_mut(|live| {
            // SAFETY: loom lets nobody else in meanwhile.
            let live = unsafe { &mut *live };
            assert!(*live, "{pfn} freed twice");
            *live = false;
        });
        entries.iter_mut().for_each(EntryCell::poison);
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    unsafe fn entries(&self, pfn: Pfn) -> NonNull<EntryCell> {
        let frame = self.frame(pfn).expect("an entry led outside table memory");
        // SAFETY: boxed and never dropped before `self`.
        let frame = unsafe { &*frame };
        // SAFETY: loom fails the model if someone writes meanwhile.
        frame
            .live
            .with(|live| assert!(unsafe { *live }, "{pfn} used after it was freed"));
        NonNull::from(&frame.entries).cast()
    }

    fn header(&self, pfn: Pfn) -> &Header {
        self.frame(pfn)
            // SAFETY: as above.
            .map_or(&self.nowhere, |frame| unsafe { &(*frame).header })
    }
}

/// A page of the owner's: guest frame, host frame, whether it may be written.
pub type Page = (Gfn, Pfn, bool);

/// An owner of external tables that does what it is asked for, and checks that it can be done. Each
/// mirror root has a view of its own.
#[derive(Debug, Default)]
pub struct Owner {
    /// Mapped pages, with the generation of their view.
    pages: Mutex<Vec<(u64, Page)>>,
    pub tables: AtomicUsize,
    /// The generation from which views are not out of date.
    pub since: AtomicU64,
}

impl Owner {
    /// What is mapped in the view that is not out of date, by frame.
    pub fn mapped(&self) -> Vec<Page> {
        let since = self.since.load(Ordering::Relaxed);
        let pages = self.pages.lock().unwrap();
        let pages = pages.iter().filter(|(generation, _)| *generation >= since);
        let mut pages: Vec<_> = pages.map(|(_, page)| *page).collect();
        pages.sort();
        pages
    }
}

impl ExternalTables for Owner {
    fn apply(&self, batch: &mut Batch) {
        // It takes its time.
        loom::thread::yield_now();
        let view = batch.generation();
        let mut pages = self.pages.lock().unwrap();
        for change in batch.changes_mut() {
            for n in 0..change.gfns().pages() {
                let gfn = Gfn(change.gfns().start.0 + n);
                let pfn = Pfn(change.pfn().0 + n);
                let is = |(of, page): &(u64, Page)| *of == view && page.0 == gfn;
                let at = pages.iter().position(is);
                let old = at.map(|at| pages.swap_remove(at).1);
                match change.kind() {
                    ChangeKind::Map { writable, .. } => {
                        assert_eq!(old, None, "{gfn} mapped over a mapping");
                        pages.push((view, (gfn, pfn, writable)));
                    }
                    ChangeKind::Protect { writable } => {
                        assert_eq!(old, Some((gfn, pfn, !writable)), "protected so");
                        pages.push((view, (gfn, pfn, writable)));
                    }
                    ChangeKind::Unmap => {
                        assert_eq!(old.map(|old| old.1), Some(pfn), "unmapped so");
                    }
                }
            }
            change.accept();
        }
    }

    fn link_table(&self, _: Gfn, _: Level, _: Pfn) -> Result<(), Refused> {
        loom::thread::yield_now();
        self.tables.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn free_table(&self, _: Gfn, _: Level, _: Pfn) -> Result<(), Refused> {
        self.tables.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The guest: its vCPUs' locks and its memory, one word a page.
pub struct Guest {
    inside: Vec<loom::sync::Mutex<()>>,
    pub memory: Vec<loom::sync::atomic::AtomicU64>,
    pub owner: Option<Owner>,
}

impl Guest {
    /// The vCPU is in the guest for as long as it holds this.
    pub fn enter(&self, vcpu: usize) -> loom::sync::MutexGuard<'_, ()> {
        self.inside[vcpu].lock().unwrap()
    }
}

#[derive(Clone)]
pub struct Receiver(Arc<Guest>);

impl Host for Receiver {
    fn flush(&self, _: &FlushRequest) {
        for vcpu in &self.0.inside {
            drop(vcpu.lock().unwrap());
        }
    }

    fn external(&self) -> Option<&dyn ExternalTables> {
        self.0.owner.as_ref().map(|owner| owner as _)
    }
}

/// An MMU with one slot over all frames of the format, and its guest.
pub struct Scene<F: Format = Tiny> {
    pub mmu: TdpMmu<F, Arc<Frames>>,
    pub frames: Arc<Frames>,
    pub guest: Arc<Guest>,
}

impl<F: Format> Scene<F> {
    pub fn new(vcpus: usize, frames: usize, config: MmuConfig) -> Arc<Self> {
        Self::with(vcpus, frames, config, SlotFlags::empty(), None)
    }

    pub fn logging(vcpus: usize, frames: usize, config: MmuConfig) -> Arc<Self> {
        Self::with(vcpus, frames, config, SlotFlags::LOG_DIRTY, None)
    }

    pub fn with(
        vcpus: usize,
        frames: usize,
        config: MmuConfig,
        flags: SlotFlags,
        owner: Option<Owner>,
    ) -> Arc<Self> {
        let frames = Arc::new(Frames::new(frames));
        let guest = Arc::new(Guest {
            inside: (0..vcpus).map(|_| loom::sync::Mutex::new(())).collect(),
            memory: (0..F::MAX_GFN.0)
                .map(|_| loom::sync::atomic::AtomicU64::new(0))
                .collect(),
            owner,
        });
        let mmu = TdpMmu::new(Arc::clone(&frames), Receiver(Arc::clone(&guest)), config);
        let spec = SlotSpec::new(0, Gfn(0), F::MAX_GFN.0, Pfn(HOST));
        mmu.create_slot(spec.with_flags(flags)).unwrap();
        Arc::new(Self { mmu, frames, guest })
    }

    /// A vCPU that has a root and tables at hand, so that its next fault does only what the model
    /// is about.
    pub fn vcpu(&self) -> Vcpu {
        let mut vcpu = self.mmu.vcpu();
        assert!(self.mmu.load_root(&mut vcpu).is_some());
        let outcome = self.mmu.fault(
            &mut vcpu,
            Fault::new(Gfn(0), Access::Read).with_seq(u64::MAX),
        );
        assert_eq!(
            outcome,
            FaultOutcome::Retry,
            "only the cache was to be filled"
        );
        vcpu
    }

    /// Faults until something came of it.
    pub fn fault(&self, vcpu: &mut Vcpu, fault: Fault) {
        loop {
            match self.mmu.fault(vcpu, fault) {
                FaultOutcome::Retry => loom::thread::yield_now(),
                FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => return,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Faults once; what came of it does not matter.
    pub fn fault_once(&self, vcpu: &mut Vcpu, fault: Fault) {
        let _ = self.mmu.fault(vcpu, fault);
    }

    pub fn map(&self, vcpu: &mut Vcpu, gfn: u64, access: Access) {
        self.fault(vcpu, small(gfn, access));
    }

    /// The guest's access, with the faults that it takes; `used` runs in the guest.
    pub fn touch(&self, number: usize, vcpu: &mut Vcpu, fault: Fault, used: impl FnOnce(&Guest)) {
        loop {
            let inside = self.guest.inside[number].lock().unwrap();
            let why = match self.mmu.access(vcpu, fault.gfn, fault.access) {
                Ok(to) => {
                    assert_eq!(to.pfn, Pfn(HOST + fault.gfn.0), "{:?}", fault.gfn);
                    used(&self.guest);
                    return;
                }
                Err(why) => why,
            };
            drop(inside);
            let present = matches!(why, WalkFault::Permission | WalkFault::AccessedDirty);
            let mut again = fault;
            again.present = present;
            self.fault(vcpu, again);
        }
    }

    /// The guest writes `value` to `gfn`.
    pub fn write(&self, number: usize, vcpu: &mut Vcpu, gfn: u64, value: u64) {
        self.touch(number, vcpu, small(gfn, Access::Write), |guest| {
            guest.memory[gfn as usize].store(value, Ordering::Relaxed);
        });
    }

    pub fn harvest(&self) -> u64 {
        let mut bitmap = [0];
        self.mmu.space(0).harvest_dirty_log(0, &mut bitmap).unwrap();
        bitmap[0]
    }

    pub fn contents(&self, gfn: u64) -> u64 {
        self.guest.memory[gfn as usize].load(Ordering::Relaxed)
    }

    /// Leaves that the tables hold, counted by looking.
    fn leaves(&self) -> [i64; 5] {
        let mut leaves = [0; 5];
        let mut gfn = 0;
        while gfn < F::MAX_GFN.0 {
            gfn += match self.mmu.space(0).translate(Gfn(gfn)) {
                Some(to) => {
                    assert_eq!(to.pfn, Pfn(HOST + gfn), "{gfn}");
                    leaves[to.level.get() as usize - 1] += 1;
                    F::span(to.level)
                }
                None => 1,
            };
        }
        leaves
    }

    /// The counts are right now and nothing is left when all is taken away. All vCPUs are gone.
    pub fn settled(&self) {
        self.mmu.zap_invalidated_roots();
        assert_eq!(
            self.mmu.stats().pages,
            self.leaves(),
            "leaves counted and leaves there"
        );
        self.mmu.zap_all();
        self.mmu.reclaim();
        let stats = self.mmu.stats();
        assert_eq!(stats.pages, [0; 5]);
        assert_eq!((stats.tables, stats.tables_retired, stats.roots), (0, 0, 0));
        assert_eq!(self.frames.live(), 0, "frames leaked");
    }
}

/// A fault that maps 4 KiB.
pub fn small(gfn: u64, access: Access) -> Fault {
    Fault::new(Gfn(gfn), access).with_max_level(Level::SIZE_4K)
}

/// Runs `scene` in every interleaving with at most `preemptions` preemptions, and says how many
/// there were.
pub fn explore(name: &str, preemptions: usize, scene: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 50_000;
    let begin = Instant::now();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        scene();
    });
    println!(
        "{name}: {} interleavings with up to {preemptions} preemptions, {:.1} s",
        count.load(Ordering::Relaxed),
        begin.elapsed().as_secs_f64()
    );
}

/// Two threads, the second of which is the model's own.
pub fn both(first: impl FnOnce() + Send + 'static, second: impl FnOnce()) {
    let first = loom::thread::spawn(first);
    second();
    first.join().unwrap();
}
