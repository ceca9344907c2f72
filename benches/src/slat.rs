//! Slat, the only file here that knows its API.
//!
//! The concrete `TdpMmu<Npt4, Arena>`: one slot from frame 0 on, leaves of 4 KiB unless said
//! otherwise, no vCPU to flush. NPT because its entries are those of the peers' x86-64 tables, and
//! because it logs writes by protection, which is the work that the peers can do too.

use std::hint::black_box;

use slat_arch::Npt4;
use slat_mmu::{
    Access, Arena, Around, Batch, ExternalTables, Fault, FaultOutcome, FlushRequest, Gfn, GfnRange,
    Host, Level, MmuConfig, NoTlb, Pfn, SecondStage as _, SlotFlags, SlotSpec, TdpMmu,
};

use crate::table::{HOST_BASE, Mapping, Table};

/// Where the tables are said to lie: beyond any guest memory.
const ARENA_BASE: Pfn = Pfn(1 << 30);
const SLOT: u16 = 0;

/// The MMU of one guest.
pub(crate) struct Slat {
    mmu: TdpMmu<Npt4, Arena>,
    pages: u64,
}

/// What one vCPU needs to fault.
pub(crate) type Vcpu = slat_mmu::Vcpu;

/// An owner of mirrored tables that has nothing to do.
struct Willing;

impl Host for Willing {
    fn flush(&self, _: &FlushRequest) {}

    fn external(&self) -> Option<&dyn ExternalTables> {
        Some(self)
    }
}

impl ExternalTables for Willing {
    fn apply(&self, batch: &mut Batch) {
        batch.answer(Ok(()));
    }
}

/// A mirror of one guest's tables.
pub(crate) struct Mirror {
    mmu: TdpMmu<Npt4, Arena>,
    vcpu: Vcpu,
    pages: u64,
}

impl Mirror {
    /// With a slot of `pages` pages, each of which was mapped once.
    pub(crate) fn new(pages: u64) -> Self {
        let arena = Arena::new(ARENA_BASE, frames_for(pages));
        let mmu = TdpMmu::new(arena, Willing, MmuConfig::default());
        mmu.create_slot(SlotSpec::new(SLOT, Gfn(0), pages, Pfn(HOST_BASE)))
            .expect("the first slot, within the format");
        let vcpu = mmu.vcpu();
        let mut mirror = Self { mmu, vcpu, pages };
        mirror.fault_batches(512);
        mirror
    }

    /// Faults the slot in, `batch` neighbours at a time.
    pub(crate) fn fault_batches(&mut self, batch: u64) {
        let mut mapped = 0;
        for first in (0..self.pages).step_by(batch as usize) {
            let fault = Fault::new(Gfn(first), Access::Read);
            let around = Around::new(GfnRange::new(Gfn(first), batch));
            mapped += self.mmu.fault_range(&mut self.vcpu, fault, around).mapped;
        }
        black_box(mapped);
    }

    /// Unmaps everything.
    pub(crate) fn unmap(&mut self) {
        let all = GfnRange::new(Gfn(0), self.pages);
        black_box(self.mmu.space(0).zap_mirror(all));
    }

    /// Pages that are mapped.
    pub(crate) fn mapped(&self) -> u64 {
        self.mmu.stats().pages_at(Level::SIZE_4K) as u64
    }
}

/// Frames of tables for a slot of `pages` pages, mapped by 4 KiB, and some to spare.
fn frames_for(pages: u64) -> usize {
    let leaves = pages.div_ceil(512) as usize;
    leaves + leaves.div_ceil(512) + leaves.div_ceil(512 * 512) + 64
}

impl Slat {
    /// An MMU with a slot of `pages` pages and memory for `frames` 4 KiB frames of tables.
    fn with_frames(pages: u64, frames: usize, max_level: Level) -> Self {
        // Splitting ahead would need tables for the whole slot where there are huge leaves.
        let config = MmuConfig::default()
            .with_max_level(max_level)
            .with_eager_split(max_level == Level::SIZE_4K);
        let mmu = TdpMmu::new(Arena::new(ARENA_BASE, frames), NoTlb, config);
        mmu.create_slot(SlotSpec::new(SLOT, Gfn(0), pages, Pfn(HOST_BASE)))
            .expect("the first slot, within the format");
        Self { mmu, pages }
    }

    /// With leaves of up to 1 GiB, and little memory for tables.
    pub(crate) fn huge(pages: u64) -> Self {
        Self::with_frames(pages, 64, Level::SIZE_1G)
    }

    fn range(&self) -> GfnRange {
        GfnRange::new(Gfn(0), self.pages)
    }

    /// A vCPU of this MMU.
    pub(crate) fn vcpu(&self) -> Vcpu {
        self.mmu.vcpu()
    }

    /// A write fault; whether it mapped or upgraded.
    #[inline]
    pub(crate) fn write(&self, vcpu: &mut Vcpu, frame: u64) -> bool {
        let outcome = self.mmu.fault(vcpu, Fault::new(Gfn(frame), Access::Write));
        matches!(outcome, FaultOutcome::Fixed { .. })
    }

    /// Maps a range in advance.
    fn prefault(&self, vcpu: &mut Vcpu, first: u64, pages: u64) {
        let range = GfnRange::new(Gfn(first), pages);
        let mapped = self.mmu.prefault(vcpu, range, Level::SIZE_4K);
        assert_eq!(mapped, Ok(pages), "a slot, and memory for tables");
    }

    /// Write faults on all pages of the slot, one for each leaf at most.
    pub(crate) fn write_all(&self) {
        let mut vcpu = self.vcpu();
        for frame in 0..self.pages {
            black_box(self.write(&mut vcpu, frame));
        }
    }

    /// Turns dirty logging on, which write-protects, or off.
    pub(crate) fn log_dirty(&self, on: bool) {
        let flags = if on {
            SlotFlags::LOG_DIRTY
        } else {
            SlotFlags::empty()
        };
        let done = self.mmu.space(0).set_slot_flags(SLOT, flags);
        black_box(done).expect("the slot exists");
    }

    /// Clears the dirty bits in `bitmap` and protects their pages.
    pub(crate) fn clear_dirty(&self, bitmap: &[u64]) {
        let done = self
            .mmu
            .space(0)
            .clear_dirty_log(SLOT, 0, self.pages, bitmap);
        black_box(done).expect("the slot logs");
    }

    /// Takes all dirty bits into `bitmap` and protects their pages.
    pub(crate) fn harvest(&self, bitmap: &mut [u64]) {
        let done = self.mmu.space(0).harvest_dirty_log(SLOT, bitmap);
        black_box(done).expect("the slot logs");
    }

    /// Pages whose dirty bit is set.
    pub(crate) fn dirty_pages(&self) -> u64 {
        self.mmu.space(0).dirty_pages(SLOT).expect("the slot logs")
    }

    /// Maps one leaf of 1 GiB after the other.
    pub(crate) fn populate_huge(&self) {
        let mut vcpu = self.vcpu();
        for frame in (0..self.pages).step_by(1 << 18) {
            assert!(self.write(&mut vcpu, frame), "frame {frame} is not mapped");
        }
    }

    /// Leaves of 4 KiB and of 1 GiB, and tables, as the MMU counts them.
    pub(crate) fn counts(&self) -> (i64, i64, u64) {
        let stats = self.mmu.stats();
        (
            stats.pages_at(Level::SIZE_4K),
            stats.pages_at(Level::SIZE_1G),
            stats.tables,
        )
    }

    /// Bytes of the arena that no table uses.
    pub(crate) fn unused_table_bytes(&self) -> usize {
        let arena = self.mmu.memory();
        (arena.frames() - arena.used_frames()) * 4096
    }

    /// As [`Table::translate`], each frame under a guard of its own.
    pub(crate) fn translate_each(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut sum = 0;
        for frame in frames {
            if let Some(translation) = self.mmu.space(0).translate(Gfn(frame)) {
                sum += translation.pfn.0;
            }
        }
        sum
    }

    /// As [`Table::translate`], each frame as one vCPU's read that missed its TLB: rights,
    /// Accessed, a guard of its own.
    pub(crate) fn access_each(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut vcpu = self.vcpu();
        let mut sum = 0;
        for frame in frames {
            if let Ok(translation) = self.mmu.access(&mut vcpu, Gfn(frame), Access::Read) {
                sum += translation.pfn.0;
            }
        }
        sum
    }

    /// Unmaps everything, for a fresh start.
    pub(crate) fn reset(&self) {
        self.mmu.zap_all();
    }
}

impl Table for Slat {
    const NAME: &'static str = "slat";

    fn new(pages: u64) -> Self {
        let mut slat = Self::with_frames(pages, frames_for(pages), Level::SIZE_4K);
        // Every frame of the arena was written once, as the peers' frames were.
        slat.populate(0, pages);
        slat.reset();
        slat
    }

    fn populate(&mut self, first: u64, pages: u64) {
        self.prefault(&mut self.vcpu(), first, pages);
    }

    fn fault_batches(&mut self, pages: u64, batch: u64) {
        let mut vcpu = self.vcpu();
        for first in (0..pages).step_by(batch as usize) {
            self.prefault(&mut vcpu, first, batch);
        }
    }

    fn fault(&mut self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut vcpu = self.vcpu();
        let mut mapped = 0;
        for frame in frames {
            mapped += u64::from(self.write(&mut vcpu, frame));
        }
        mapped
    }

    fn protect(&mut self) {
        self.log_dirty(true);
    }

    fn unprotect(&mut self) {
        // A prefetch does not upgrade, so begin anew.
        self.log_dirty(false);
        self.reset();
        self.populate(0, self.pages);
    }

    fn unmap(&mut self) {
        black_box(self.mmu.space(0).zap_gfn_range(self.range()));
    }

    fn zap_all(&mut self) {
        self.mmu.zap_all();
    }

    fn renew(&mut self) {}

    fn translate(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut walker = self.mmu.walker();
        let mut walker = walker.enter();
        let mut sum = 0;
        for frame in frames {
            if let Some(translation) = walker.translate(Gfn(frame)) {
                sum += translation.pfn.0;
            }
        }
        sum
    }

    fn mapping(&self, frame: u64) -> Option<Mapping> {
        let translation = self.mmu.space(0).translate(Gfn(frame))?;
        Some(Mapping {
            pfn: translation.pfn.0,
            writable: translation.writable,
        })
    }
}
