//! Tables built by the real MMU: the one file here that drives it.
//!
//! A guest with slots of every size all over its address space, taken through what an agent does to
//! a VM: faults of every kind at every level, dirty logging that takes write permission away, write
//! faults that give it back, splits, ageing, invalidation, moved and deleted slots. What remains in
//! the arena is what hardware has to make sense of.

use std::{cell::RefCell, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, Entry, Fault, FaultOutcome, Gfn, GfnRange, Level, MemoryType, MmuConfig, NoTlb,
    Pfn, SecondStage, SlotError, SlotFlags, SlotSpec, Vcpu, WalkFault,
};

use super::{
    format::Ops,
    image::Image,
    layout::{GUEST_SIZE, Layout, TABLE_FRAMES},
    query::Expected,
    rng::Rng,
};

const PAGE: u64 = slat_mmu::PAGE_SIZE;

/// What is built.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The format.
    pub ops: Ops,
    /// The machine's memory.
    pub layout: Layout,
    /// Guest physical addresses that the machine's guest can utter, in bits; the format may
    /// translate more.
    pub gpa_bits: u32,
    /// The machine has a level less than the format: it starts at the table below the root's first
    /// entry.
    pub below_root: bool,
    /// Whether the program runs a guest of its own, whose memory is mapped from guest physical
    /// address 0 on.
    pub own_guest: bool,
    /// The machine has memory types. Where they are an extension, it may lack them.
    pub memory_types: bool,
}

impl Plan {
    /// First frame that cannot be asked about.
    pub fn max_gfn(&self) -> Gfn {
        let uttered = 1 << (self.gpa_bits - slat_mmu::PAGE_SHIFT);
        self.ops.info.max_gfn.min(Gfn(uttered))
    }
}

/// An MMU and the memory its tables are in.
#[derive(Debug)]
pub struct Guest {
    plan: Plan,
    arena: Arc<Arena>,
    mmu: Box<dyn SecondStage>,
    vcpu: RefCell<Vcpu>,
    slots: Vec<SlotSpec>,
    devices: Vec<Gfn>,
}

impl Guest {
    /// Builds the tables.
    ///
    /// # Errors
    /// When the MMU refuses something that it should not.
    pub fn build(plan: Plan, rng: &mut Rng) -> anyhow::Result<Self> {
        let base = Pfn(plan.layout.tables() / PAGE);
        let arena = Arc::new(Arena::new(base, TABLE_FRAMES));
        ensure!(
            arena.base() == base,
            "the arena is not where the image will be"
        );
        let config = MmuConfig::default()
            .with_max_level(Level::SIZE_256T)
            .with_mmio_caching(true)
            .with_memory_types(plan.memory_types);
        let mmu = plan.ops.stage.build(Arc::clone(&arena), NoTlb, config);
        let mut guest = Self {
            plan,
            arena,
            vcpu: RefCell::new(mmu.vcpu()),
            mmu,
            slots: Vec::new(),
            devices: Vec::new(),
        };
        guest.own_memory()?;
        guest.add_slots(rng)?;
        guest.first_faults(rng)?;
        guest.live(rng)?;
        Ok(guest)
    }

    /// The tables as they are now.
    ///
    /// # Errors
    /// When there is no root.
    pub fn image(&self) -> anyhow::Result<Image> {
        let root = self.mmu.space(0).root().context("no root")?.pfn;
        let base = self.plan.layout.tables();
        let words = (0..TABLE_FRAMES as u64 * PAGE / 8).map(|word| {
            // SAFETY: the guest's tables are made by calls on it, and it is only one thread's.
            unsafe { self.arena.read(base + word * 8) }
        });
        let words: Option<Vec<u64>> = words.collect();
        let words = words.context("the arena is smaller than the image")?;
        Ok(Image::new(self.plan.ops, base, root, words))
    }

    /// What the machine's register for the root holds.
    ///
    /// # Errors
    /// When there is no root, or no table below it to start at.
    pub fn root_register(&self) -> anyhow::Result<u64> {
        if self.plan.below_root {
            let walk = self.image()?.walk(Gfn(0));
            let Some(Entry::Table { pfn }) = walk.first().map(|step| step.entry) else {
                bail!("the root's first entry is no table");
            };
            return Ok(GuestStage::Ept4.root_register(pfn, 0));
        }
        let root = self.mmu.space(0).root().context("no root")?.pfn;
        Ok(self.plan.ops.register(root))
    }

    /// The MMU's own answer.
    ///
    /// # Errors
    /// When it is none that hardware could give.
    pub fn access(&self, gfn: Gfn, access: Access) -> anyhow::Result<Expected> {
        Ok(
            match self.mmu.access(&mut self.vcpu.borrow_mut(), gfn, access) {
                Ok(translation) => Expected::Leads(translation.pfn.hpa()),
                Err(WalkFault::NotPresent) => Expected::NotPresent,
                Err(WalkFault::Permission) => Expected::Permission,
                Err(WalkFault::AccessedDirty) => Expected::AccessedDirty,
                Err(WalkFault::Malformed) => Expected::Malformed,
                Err(WalkFault::Mmio) => Expected::Mmio,
                Err(other) => bail!("the walk of {gfn} ended with {other:?}"),
            },
        )
    }

    /// The slots that there are, without those of the program's own guest.
    pub fn slots(&self) -> &[SlotSpec] {
        &self.slots
    }

    /// Where the slot over `gfn` has its memory, and whether it may be written. `None` without a
    /// slot.
    pub fn backing(&self, gfn: Gfn) -> Option<(u64, bool)> {
        let slot = self.slots.iter().find(|slot| slot.range().contains(gfn))?;
        let pfn = Pfn(slot.host_base_pfn.0 + (gfn.0 - slot.base_gfn.0));
        Some((pfn.hpa(), !slot.flags.contains(SlotFlags::READONLY)))
    }

    /// Frames that were accessed last and have, most of them, no slot.
    pub fn devices(&self) -> &[Gfn] {
        &self.devices
    }

    /// Whether `gfn` belongs to the program's own guest and must be left alone.
    pub fn is_own(&self, gfn: Gfn) -> bool {
        self.plan.own_guest && gfn.0 < GUEST_SIZE / PAGE
    }

    fn fault(&self, gfn: Gfn, access: Access, level: Level) -> anyhow::Result<()> {
        for _ in 0..8 {
            match self.mmu.fault(
                &mut self.vcpu.borrow_mut(),
                Fault::new(gfn, access).with_max_level(level),
            ) {
                FaultOutcome::Retry => {}
                FaultOutcome::Fixed { .. }
                | FaultOutcome::Spurious { .. }
                | FaultOutcome::ReadOnly
                | FaultOutcome::NoSlot => return Ok(()),
                other => bail!("{access:?} fault on {gfn}: {other:?}"),
            }
        }
        bail!("{access:?} fault on {gfn} is to be retried for ever")
    }

    /// The program's guest writes to its memory, so that none of its pages is ever short of a bit.
    fn own_memory(&mut self) -> anyhow::Result<()> {
        if self.plan.own_guest {
            let spec = SlotSpec::from_bytes(0, 0, GUEST_SIZE, self.plan.layout.guest())?;
            self.mmu.create_slot(spec)?;
            for gfn in 0..GUEST_SIZE / PAGE {
                self.fault(Gfn(gfn), Access::Write, Level::SIZE_4K)?;
            }
        }
        Ok(())
    }

    /// Memory of another type than normal, where the format has that as an extension, is created if
    /// the machine has the extension, and refused if not.
    fn memory(&self, spec: SlotSpec, rng: &mut Rng) -> anyhow::Result<SlotSpec> {
        if !self.plan.ops.info.optional_memory_types || !rng.chance(25) {
            return Ok(spec);
        }
        let types = [MemoryType::NonCacheable, MemoryType::Device];
        let memory = rng.pick(&types).copied().unwrap_or_default();
        let special = spec.with_memory(memory);
        if self.plan.memory_types {
            return Ok(special);
        }
        let created = self.mmu.create_slot(special);
        ensure!(
            matches!(created, Err(SlotError::MemoryType { .. })),
            "the machine has no memory type {memory:?}, and the MMU says {created:?}"
        );
        Ok(spec)
    }

    /// A frame anywhere, small ones as likely as large ones in the logarithm, aligned to `align`
    /// pages.
    fn somewhere(&self, rng: &mut Rng, align: u64) -> Gfn {
        let top = 63 - self.plan.max_gfn().0.leading_zeros();
        let bits = 12 + rng.below(u64::from(top) - 11);
        Gfn(rng.word() & ((1 << bits) - 1) & !(align - 1))
    }

    /// Adds a slot at the first place found for it. Where none is, the address space is too small
    /// for it.
    fn add(
        &mut self,
        rng: &mut Rng,
        pages: u64,
        host: Pfn,
        align: u64,
        flags: SlotFlags,
    ) -> anyhow::Result<bool> {
        for _ in 0..16 {
            let gfn = self.somewhere(rng, align);
            if gfn.0 + pages > self.plan.max_gfn().0 {
                continue;
            }
            let id = self.slots.len() as u16 + 1;
            let spec = SlotSpec::new(id, gfn, pages, host).with_flags(flags);
            let spec = self.memory(spec, rng)?;
            match self.mmu.create_slot(spec) {
                Ok(()) => {
                    self.slots.push(spec);
                    return Ok(true);
                }
                Err(SlotError::Overlaps { .. }) => {}
                Err(error) => return Err(error).context("creating a slot"),
            }
        }
        Ok(false)
    }

    fn add_slots(&mut self, rng: &mut Rng) -> anyhow::Result<()> {
        let layout = self.plan.layout;
        let gib = 1 << 18;
        let flags = |rng: &mut Rng| match rng.below(10) {
            0 | 1 => SlotFlags::READONLY,
            2 | 3 => SlotFlags::LOG_DIRTY,
            _ => SlotFlags::empty(),
        };
        // The last page that can be asked about.
        let top = Gfn(self.plan.max_gfn().0 - 64);
        let spec = SlotSpec::new(1, top, 64, layout.window_pfn(0));
        self.mmu.create_slot(spec)?;
        self.slots.push(spec);
        if self.plan.ops.info.max_leaf_level >= Level::SIZE_512G {
            for _ in 0..2 {
                self.add(rng, 512 * gib, Pfn(0), 512 * gib, SlotFlags::empty())?;
            }
        }
        for side in [0, 1, 0, 1, 0] {
            let host = Pfn(layout.base / PAGE + side * gib);
            self.add(rng, gib, host, gib, SlotFlags::empty())?;
        }
        for _ in 0..40 {
            let pages = 512 * (1 + rng.below(8));
            let host = layout.window_pfn(0).0 + 512 * rng.below(24);
            // One in four is not congruent with its host memory and gets no huge page.
            let (align, host) = if rng.chance(25) {
                (1, host + 1 + rng.below(511))
            } else {
                (512, host)
            };
            let flags = flags(rng);
            self.add(rng, pages, Pfn(host), align, flags)?;
        }
        for _ in 0..120 {
            let pages = 1 + rng.below(128);
            let (window, size) = if rng.chance(20) {
                (1, 1024)
            } else {
                (0, 16384)
            };
            let host = layout.window_pfn(window).0 + rng.below(size - pages);
            let flags = flags(rng);
            self.add(rng, pages, Pfn(host), 1, flags)?;
        }
        Ok(())
    }

    fn page_of(rng: &mut Rng, slot: &SlotSpec) -> Gfn {
        Gfn(slot.base_gfn.0 + rng.below(slot.npages))
    }

    fn first_faults(&self, rng: &mut Rng) -> anyhow::Result<()> {
        for slot in &self.slots {
            // A few slots are never used, so that there are roots' entries without a table.
            let times = if rng.chance(5) { 0 } else { 6 + rng.below(24) };
            for _ in 0..times {
                let access = *rng
                    .pick(&[Access::Read, Access::Write, Access::Execute])
                    .unwrap_or(&Access::Read);
                let level = match rng.below(10) {
                    0..=5 => Level::SIZE_256T,
                    6 | 7 => Level::SIZE_2M,
                    _ => Level::SIZE_4K,
                };
                self.fault(Self::page_of(rng, slot), access, level)?;
            }
        }
        Ok(())
    }

    /// What happens to a VM later.
    fn live(&mut self, rng: &mut Rng) -> anyhow::Result<()> {
        let logged = |slot: &SlotSpec| slot.flags.contains(SlotFlags::LOG_DIRTY);
        for slot in self.slots.clone() {
            let small = slot.npages <= 4096;
            if logged(&slot) {
                let mut bitmap = vec![0; slot.npages.div_ceil(64) as usize];
                self.mmu.space(0).harvest_dirty_log(slot.id, &mut bitmap)?;
                for _ in 0..4 {
                    self.fault(Self::page_of(rng, &slot), Access::Write, Level::SIZE_256T)?;
                }
            } else if small && !slot.flags.contains(SlotFlags::READONLY) && rng.chance(30) {
                self.mmu
                    .space(0)
                    .set_slot_flags(slot.id, SlotFlags::LOG_DIRTY)?;
                for _ in 0..3 {
                    self.fault(Self::page_of(rng, &slot), Access::Write, Level::SIZE_256T)?;
                }
            } else if small && rng.chance(10) {
                let _all = self
                    .mmu
                    .space(0)
                    .split_huge_pages(slot.range(), Level::SIZE_4K);
            }
            if rng.chance(15) {
                let part = GfnRange::new(Self::page_of(rng, &slot), 1 + rng.below(64));
                let _young = self.mmu.space(0).age(part);
            }
            if rng.chance(15) {
                let part = GfnRange::new(Self::page_of(rng, &slot), 1 + rng.below(32));
                let invalidation = self.mmu.space(0).invalidate_begin(part, true);
                self.mmu.invalidate_end(invalidation)?;
            }
            if small && rng.chance(5) {
                self.mmu.space(0).delete_slot(slot.id)?;
            }
        }
        // Accesses to devices leave MMIO entries where the format has them.
        for _ in 0..32 {
            let gfn = self.somewhere(rng, 1);
            self.fault(gfn, Access::Read, Level::SIZE_4K)?;
            self.devices.push(gfn);
        }
        self.mmu.reclaim();
        self.slots = self.mmu.slots();
        self.slots
            .retain(|slot| !(self.plan.own_guest && slot.id == 0));
        Ok(())
    }
}
