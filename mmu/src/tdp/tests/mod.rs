//! Tests of what only the inside can show.
//!
//! They use a format made for the purpose: a root four times as wide as its child, an empty value
//! that is not 0, two levels or four, MMIO entries with three bits of generation, the NX
//! mitigation.

mod bounds;
mod memory;
mod notes;
mod paths;
mod roots;
mod stock;
mod sweeps;
mod threads;

use alloc::{sync::Arc, vec, vec::Vec};
use std::sync::Mutex as StdMutex;

use super::{
    root::RootPage,
    session::{Mode, Session},
    sweep::{Sweep, Visit, sweep},
    *,
};
use crate::{
    Access, AdPolicy, Arena, DirtyLogPolicy, Entry, Fault, FaultOutcome, Flush, FlushCause,
    FlushPrimitive, FlushRequest, Format, Gfn, GfnRange, Host, Leaf, Level, MemoryType, NoTlb, Pfn,
    SlotFlags, SlotSpec, TableMemory, table::guard::Guard,
};

/// A format of `LEVELS` levels, two or four, that wants break before make or not.
#[derive(Clone, Copy)]
pub(super) struct Toy<const LEVELS: usize, const BREAK: bool = false>;

const PRESENT: u64 = 1;
const LEAF: u64 = 2;
const FLAGS: [u64; 6] = [4, 8, 16, 32, 64, 128];
const MMIO: u64 = 1 << 61;

// SAFETY: leaf, table, empty, MMIO and frozen differ in their two low and three high bits; the
// frame is kept in bits of its own.
#[expect(unsafe_code, reason = "a format vouches for its laws")]
unsafe impl<const LEVELS: usize, const BREAK: bool> Format for Toy<LEVELS, BREAK> {
    const NAME: &'static str = "toy";
    const INDEX_BITS: &'static [u32] = if LEVELS == 2 {
        &[9, 11]
    } else {
        &[9, 9, 9, 11]
    };
    const MAX_LEAF_LEVEL: Level = if LEVELS == 2 {
        Level::SIZE_2M
    } else {
        Level::SIZE_1G
    };
    const MAX_GFN: Gfn = Gfn(1 << (9 * LEVELS + 2));
    const MAX_PFN: Pfn = Pfn(1 << 40);
    const EMPTY: u64 = 1 << 63;
    const FROZEN: u64 = 1 << 62;
    const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = BREAK;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("none");
    const MMIO_GENERATION_BITS: u32 = 3;
    const NX_HUGE_PAGES: bool = true;

    fn decode(raw: u64, level: Level) -> Entry {
        let pfn = Pfn(raw << 8 >> 20);
        let flag = |i: usize| raw & FLAGS[i] != 0;
        match raw & (PRESENT | LEAF) {
            0 if raw == Self::FROZEN => Entry::Frozen,
            0 if raw & MMIO != 0 => Entry::Mmio {
                generation: (raw >> 4 & 7) as u32,
            },
            0 => Entry::NonPresent,
            PRESENT if level > Level::SIZE_4K => Entry::Table { pfn },
            3 if level <= Self::MAX_LEAF_LEVEL => Entry::Leaf(Leaf {
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

    fn make_mmio(_: Gfn, generation: u32) -> Option<u64> {
        Some(MMIO | u64::from(generation & 7) << 4)
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

pub(super) type Flat = Toy<2>;
pub(super) type Deep = Toy<4>;
pub(super) type Breaking = Toy<2, true>;
pub(super) type Mmu<F = Flat> = TdpMmu<F, Arc<Arena>>;

/// Remembers flushes.
#[derive(Debug, Default)]
pub(super) struct Log(StdMutex<Vec<(Flush, FlushCause)>>);

impl Log {
    pub(super) fn take(&self) -> Vec<(Flush, FlushCause)> {
        core::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Host for Log {
    fn flush(&self, request: &FlushRequest) {
        let mut log = self.0.lock().unwrap();
        log.push((request.flush, request.cause));
    }
}

pub(super) struct Rig<F: Format = Flat> {
    pub(super) arena: Arc<Arena>,
    pub(super) log: Arc<Log>,
    pub(super) vcpu: Vcpu,
    pub(super) mmu: Mmu<F>,
}

/// An MMU with one slot over 2^20 pages.
pub(super) fn rig<F: Format>(frames: usize, config: MmuConfig) -> Rig<F> {
    let arena = Arc::new(Arena::new(Pfn(0x400), frames));
    let log = Arc::new(Log::default());
    let mmu = Mmu::<F>::new(Arc::clone(&arena), Arc::clone(&log), config);
    mmu.create_slot(SlotSpec::new(0, Gfn(0), 1 << 20, Pfn(1 << 20)))
        .unwrap();
    let vcpu = mmu.vcpu();
    Rig {
        arena,
        log,
        vcpu,
        mmu,
    }
}

pub(super) fn small() -> Rig {
    rig(64, MmuConfig::default())
}

impl<F: Format> Rig<F> {
    pub(super) fn fault(&mut self, fault: Fault) -> FaultOutcome {
        self.mmu.fault(&mut self.vcpu, fault)
    }

    /// A write, at `level` or finer.
    pub(super) fn touch(&mut self, gfn: u64, level: Level) {
        let outcome = self.fault(Fault::new(Gfn(gfn), Access::Write).with_max_level(level));
        assert!(matches!(outcome, FaultOutcome::Fixed { .. }), "{outcome:?}");
    }

    pub(super) fn root(&self) -> crate::sync::Counted<RootPage> {
        self.mmu.valid_root(0, false).unwrap()
    }

    /// With the root's table in hand.
    pub(super) fn at_root<R>(&self, look: impl FnOnce(crate::table::node::Node<'_, F>) -> R) -> R {
        let (reader, root) = (self.mmu.participants.reader_slot(), self.root());
        let guard = Guard::new(&self.mmu.tables, self.mmu.participants.pin(&reader));
        look(guard.root(&root.table))
    }

    pub(super) fn flushed(&self) -> Vec<(Flush, FlushCause)> {
        self.log.take()
    }
}

pub(super) fn range(gfn: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn(gfn), pages)
}
