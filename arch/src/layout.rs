//! Where the bits of an entry are: what an architecture says about its format.
//!
//! A [`Layout`] is constants: flags, fields, and the marks that tell one kind of entry from
//! another. [`Encoded`](super::Encoded) turns it into a [`Format`](slat_mmu::Format). What a
//! layout must keep is checked at compile time (`check`).

use slat_mmu::{AdPolicy, DirtyLogPolicy, FlushPrimitive, Gfn, Level, MemoryType};

/// Bits that mean yes with one value and no with its opposite.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    pub(crate) mask: u64,
    pub(crate) yes: u64,
}

impl Flag {
    /// Yes if the bits of `mask` are set.
    pub(crate) const fn set(mask: u64) -> Self {
        Self { mask, yes: mask }
    }

    /// Yes if the bits of `mask` are clear.
    pub(crate) const fn clear(mask: u64) -> Self {
        Self { mask, yes: 0 }
    }

    /// Always yes: the format has no bit for it.
    pub(crate) const ALWAYS: Self = Self { mask: 0, yes: 0 };

    /// The bits that say `on`.
    #[inline(always)]
    pub(crate) const fn bits(self, on: bool) -> u64 {
        if on { self.yes } else { self.mask ^ self.yes }
    }

    /// Whether `raw` says yes.
    #[inline(always)]
    pub(crate) const fn is_on(self, raw: u64) -> bool {
        raw & self.mask == self.yes
    }
}

/// A value of some bits, by which a kind of entry is told from all others.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    pub(crate) mask: u64,
    pub(crate) value: u64,
}

impl Mark {
    /// The bits of `mask` have exactly this value.
    pub(crate) const fn new(mask: u64, value: u64) -> Self {
        Self { mask, value }
    }

    /// All bits of `mask` are set.
    pub(crate) const fn set(mask: u64) -> Self {
        Self::new(mask, mask)
    }

    /// Whether `raw` has the mark.
    #[inline(always)]
    pub(crate) const fn is_on(self, raw: u64) -> bool {
        raw & self.mask == self.value
    }

    /// The mark, with the flag on.
    #[inline(always)]
    pub(crate) const fn and(self, flag: Flag) -> Self {
        Self::new(self.mask | flag.mask, self.value | flag.yes)
    }
}

/// The field that holds a frame number.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub(crate) shift: u32,
    pub(crate) bits: u32,
}

impl Frame {
    /// `bits` bits from bit `shift` on.
    pub(crate) const fn new(shift: u32, bits: u32) -> Self {
        Self { shift, bits }
    }

    /// The bits of the field.
    pub(crate) const fn mask(self) -> u64 {
        ((1 << self.bits) - 1) << self.shift
    }

    /// A frame number in its place. Bits that do not fit are dropped.
    #[inline(always)]
    pub(crate) const fn put(self, frame: u64) -> u64 {
        (frame << self.shift) & self.mask()
    }

    /// The frame number in `raw`.
    #[inline(always)]
    pub(crate) const fn get(self, raw: u64) -> u64 {
        (raw & self.mask()) >> self.shift
    }
}

/// The field that holds a memory type. Its other values are malformed.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub(crate) mask: u64,
    pub(crate) normal: u64,
    pub(crate) non_cacheable: u64,
    pub(crate) device: u64,
}

impl Memory {
    /// The bits of a type.
    #[inline(always)]
    pub(crate) const fn bits(self, memory: MemoryType) -> u64 {
        match memory {
            MemoryType::Normal => self.normal,
            MemoryType::NonCacheable => self.non_cacheable,
            MemoryType::Device => self.device,
        }
    }

    /// Whether the field has the value of a type.
    #[inline(always)]
    pub(crate) const fn knows(self, raw: u64) -> bool {
        let field = raw & self.mask;
        field == self.normal || field == self.non_cacheable || field == self.device
    }

    /// An unknown type reads as normal; [`knows`](Self::knows) tells.
    #[inline(always)]
    pub(crate) const fn of(self, raw: u64) -> MemoryType {
        match raw & self.mask {
            field if field == self.normal => MemoryType::Normal,
            field if field == self.non_cacheable => MemoryType::NonCacheable,
            field if field == self.device => MemoryType::Device,
            _ => MemoryType::Normal,
        }
    }
}

/// Where the bits of a format are. Implemented in this crate only.
///
/// The constants without a comment are those of [`Format`](slat_mmu::Format).
pub trait Layout: Copy + Send + Sync + 'static {
    const NAME: &'static str;
    const INDEX_BITS: &'static [u32];
    const MAX_LEAF_LEVEL: Level;
    const AD_POLICY: AdPolicy;
    const DIRTY_LOG: DirtyLogPolicy;
    const INSTALL_NEEDS_FENCE: bool;
    const BREAK_BEFORE_MAKE: bool;
    const FLUSH: FlushPrimitive;
    const MMIO_GENERATION_BITS: u32 = 0;
    const EXECUTE_ONLY: bool = false;
    const NX_HUGE_PAGES: bool = false;
    const OPTIONAL_MEMORY_TYPES: bool = false;
    const EMPTY: u64 = 0;
    /// Bits 5, 7 and 8 beside an empty entry: absent in every format so far.
    const FROZEN: u64 = Self::EMPTY | 0x1a0;

    /// The frame number of a leaf and of a pointer to a table.
    const FRAME: Frame;
    /// The bit by which the MMU tells what it means as present.
    const PRESENT: u64;
    /// The bits of which hardware takes any for presence.
    const HARDWARE_PRESENT: u64 = Self::PRESENT;
    /// A pointer to a table, but for the frame.
    const TABLE: u64;
    /// What tells a 4 KiB leaf from everything else at its level.
    const SMALL: Mark;
    /// The same of a coarser leaf.
    const HUGE: Mark;
    /// Further bits that are set in every leaf.
    const LEAF: u64 = 0;

    /// The guest may read.
    const READ: Flag;
    /// The guest may write.
    const WRITE: Flag;
    /// The guest may fetch instructions.
    const EXECUTE: Flag;
    /// Used since the bit was last cleared.
    const ACCESSED: Flag;
    /// Written since the bit was last cleared.
    const DIRTY: Flag;
    /// Software: the MMU may set W.
    const MMU_WRITABLE: Flag;
    /// Software: the host's backing may be written.
    const HOST_WRITABLE: Flag;
    /// Cacheability.
    const MEMORY: Memory;
    /// With [`AdPolicy::AccessTracking`]: how far up R and X of an unused leaf are saved, while
    /// R, W and X are clear. W is not saved, because a write must be seen anyway.
    const SAVED_SHIFT: u32 = 0;

    /// [`Format::make_mmio`](slat_mmu::Format::make_mmio).
    fn make_mmio(gfn: Gfn, generation: u32) -> Option<u64> {
        let _ = (gfn, generation);
        None
    }

    /// The generation in an MMIO entry; `None` for any other absent value.
    fn mmio_generation(raw: u64) -> Option<u32> {
        let _ = raw;
        None
    }
}
