//! What an architecture provides: the layout of one page-table entry.
//!
//! [`Format`] is the whole border between the Common MMU and an architecture, as the hooks of the
//! kernel's common header are. A format is a zero-sized type; every function is pure and total, so
//! any 64-bit value read from a table can be judged without a panic.
//!
//! # The neutral entry
//!
//! [`Format::decode`] turns a raw value into an [`Entry`]. What this MMU could not have written —
//! reserved bits, permissions that a second stage of ours never uses — is [`Entry::Malformed`], so
//! that encoding what was decoded always gives the same bits back.
//!
//! # Writable three times
//!
//! A leaf is writable on three grounds, each implied by the one before it: *host-writable*, the
//! backing may be written; *MMU-writable*, the MMU allows it; *writable*, the hardware's W bit,
//! which dirty logging takes away and a write fault gives back.

use crate::addr::{Gfn, Level, Pfn};

/// A decoded page-table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Maps nothing.
    NonPresent,
    /// Maps nothing and belongs to another thread, which alone may change it.
    Frozen,
    /// Points to a table one level down.
    Table {
        /// First frame of the table.
        pfn: Pfn,
    },
    /// Maps memory.
    Leaf(Leaf),
    /// Maps nothing, and remembers that there is no slot: the access is the device model's (`MMIO
    /// SPTE`). Believed only while `generation` is the current one.
    Mmio {
        /// The slots' generation when the entry was made, in as many bits as the format keeps.
        generation: u32,
    },
    /// Not a value this MMU writes; hardware may fault on it.
    Malformed,
}

/// A mapping of `1 << shift(level)` pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First host frame, aligned to the level.
    pub pfn: Pfn,
    /// The guest may read. False in an execute-only mapping.
    pub readable: bool,
    /// The hardware lets the guest write.
    pub writable: bool,
    /// The hardware lets the guest fetch instructions.
    pub executable: bool,
    /// The MMU may set `writable` without asking the host.
    pub mmu_writable: bool,
    /// The host's backing may be written.
    pub host_writable: bool,
    /// Used since the bit was last cleared.
    pub accessed: bool,
    /// Written since the bit was last cleared.
    pub dirty: bool,
    /// Cacheability.
    pub memory: MemoryType,
}

/// Cacheability of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryType {
    /// Ordinary memory (EPT WB, RISC-V PMA).
    #[default]
    Normal,
    /// Not cached, weakly ordered, without side effects (EPT WC, RISC-V NC).
    NonCacheable,
    /// Not cached, strongly ordered (EPT UC, RISC-V IO).
    Device,
}

/// Who maintains Accessed and Dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdPolicy {
    /// Hardware sets both.
    Hardware,
    /// Hardware may fault instead of setting them (RISC-V Svade), so leaves are made with both set,
    /// and a fault on a leaf that allows the access sets what is missing.
    SetAtInstall,
    /// Hardware knows no Accessed bit. A leaf that has not been used is kept without any hardware
    /// permission and with its real ones saved in software bits (KVM's *access-tracked* form), so
    /// the next use faults. Dirty is a software bit.
    AccessTracking,
}

/// How a write to a page of a dirty-logged slot is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLogPolicy {
    /// The leaf loses its W bit and the write faults.
    WriteProtect,
    /// The leaf loses its D bit and hardware logs the address when it sets it (Intel PML). The MMU
    /// does not look for D bits: a write that hardware made and that nobody reported is in no
    /// harvest. So the MMU's owner has the log on for as long as a slot logs, and drains it into
    /// [`mark_dirty`](crate::AddressSpace::mark_dirty) before each harvest. Who cannot, uses a
    /// format that logs by [`WriteProtect`](Self::WriteProtect).
    DirtyBit,
}

/// The instruction that carries out a [`Flush`](crate::Flush) on this architecture, by the name
/// that its manual gives it. The MMU only hands it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlushPrimitive(&'static str);

impl FlushPrimitive {
    /// For example `INVEPT`.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// The manual's name.
    pub const fn name(self) -> &'static str {
        self.0
    }
}

/// A second-stage page-table format.
///
/// # Safety
///
/// The MMU follows pointers that it decodes, so a format must keep these laws (`arch` tests each on
/// every format):
///
/// 1. *Round trip*: for a pfn below [`MAX_PFN`](Self::MAX_PFN) that is aligned to the level,
///    `decode(make_leaf(l, n), n)` is `Leaf(l)` if the format [`holds`](Self::holds) the leaf; if
///    not, it is the leaf without W if that is held, and `NonPresent` otherwise.
///    `decode(make_table(p), n)` is `Table { p }` for every level above 4 KiB.
/// 2. *Exactness*: if `decode(raw, n)` is a leaf or a table, making it again gives `raw`.
/// 3. *Absence*: 0 and [`EMPTY`](Self::EMPTY) decode to `NonPresent` at each level;
///    [`FROZEN`](Self::FROZEN), and no other value, to `Frozen`.
/// 4. *No table at 4 KiB*: `decode(_, 4K)` is never a table; above
///    [`MAX_LEAF_LEVEL`](Self::MAX_LEAF_LEVEL) never a leaf.
/// 5. *Mutators* change the one property of a leaf that they name, provided that the format holds
///    the result. Three change two: `clear_mmu_writable` also clears the W bit; and under
///    [`AdPolicy::AccessTracking`], where a page whose use must fault cannot be writable, clearing
///    Accessed clears W and setting W sets Accessed. No mutator, and no bit that hardware sets by
///    itself, turns a leaf or an absent entry into a table or changes a pfn.
/// 6. *Geometry*: `1 << (shift(root) + INDEX_BITS[root])` is at least `MAX_GFN`, and a table's size
///    is a multiple of 4 KiB (formats for model checking may have smaller ones).
/// 7. *Shortcuts*: [`as_table`](Self::as_table) agrees with `decode` on every value, and
///    [`table_hpa`](Self::table_hpa) with that; the `is_…` predicates and [`leaf`](Self::leaf)
///    agree with it on every value that does not decode to `Malformed`.
///    [`leaf_step`](Self::leaf_step) is the difference between the entries of two leaves whose
///    frames are neighbours at that level.
/// 8. *MMIO*: `decode(make_mmio(g, n), level)` is `Mmio` with the low
///    [`MMIO_GENERATION_BITS`](Self::MMIO_GENERATION_BITS) bits of `n` at every level that may hold
///    a leaf, and never present.
#[expect(
    unsafe_code,
    reason = "the laws are what makes following a decoded pointer sound"
)]
pub unsafe trait Format: Copy + Send + Sync + 'static {
    /// The name in configuration and statistics, for example `sv48x4`.
    const NAME: &'static str;
    /// Index bits of each level, finest first; its length is the number of levels.
    const INDEX_BITS: &'static [u32];
    /// The coarsest level that may hold a leaf.
    const MAX_LEAF_LEVEL: Level;
    /// First guest frame beyond what the format can translate.
    const MAX_GFN: Gfn;
    /// First host frame that does not fit into an entry.
    const MAX_PFN: Pfn;
    /// What a new table is filled with. Not always 0.
    const EMPTY: u64;
    /// The one value that means "owned by another thread".
    const FROZEN: u64;
    /// Who maintains Accessed and Dirty.
    const AD_POLICY: AdPolicy;
    /// How writes are logged.
    const DIRTY_LOG: DirtyLogPolicy;
    /// Whether hardware may remember that an entry was not present, so that the vCPU that faulted
    /// needs a fence after the entry is installed:
    /// [`install_fence`](crate::SecondStage::install_fence) says which. Other vCPUs tolerate one
    /// spurious fault, and fence then.
    const INSTALL_NEEDS_FENCE: bool;
    /// Whether a present entry must be made non-present and flushed before it becomes a different
    /// present entry.
    const BREAK_BEFORE_MAKE: bool;
    /// The flush instruction.
    const FLUSH: FlushPrimitive;
    /// Bits of the slots' generation that an MMIO entry holds; 0 if the format has no MMIO entries.
    const MMIO_GENERATION_BITS: u32 = 0;
    /// Whether a leaf may allow instruction fetches and nothing else.
    const EXECUTE_ONLY: bool = false;
    /// Whether the machine may need the NX-huge-page mitigation (iTLB multihit): huge leaves
    /// without execute permission.
    const NX_HUGE_PAGES: bool = false;
    /// Whether a memory type other than [`Normal`](MemoryType::Normal) needs an extension that not
    /// every processor has (RISC-V: Svpbmt). Without it the type's bits are reserved, and each
    /// access to such a page faults for ever. So slots with such a type are refused unless
    /// [`MmuConfig::memory_types`](crate::MmuConfig::memory_types) says that it is there.
    const OPTIONAL_MEMORY_TYPES: bool = false;

    /// Judges a raw entry of a table at `level`.
    fn decode(raw: u64, level: Level) -> Entry;
    /// A leaf entry. Of a leaf that the format does not [hold](Self::holds) it grants less: all but
    /// W, or nothing ([`EMPTY`](Self::EMPTY)). Bits of the pfn that do not fit or are not aligned
    /// to the level are dropped.
    fn make_leaf(leaf: &Leaf, level: Level) -> u64;
    /// An entry that points to a table with every permission. Bits of the pfn that do not fit are
    /// dropped.
    fn make_table(pfn: Pfn) -> u64;

    /// Sets or clears a leaf's W bit. Set only where [`is_mmu_writable`](Self::is_mmu_writable).
    fn with_writable(raw: u64, on: bool) -> u64;
    /// Takes away the MMU's leave to write, and the W bit with it.
    fn clear_mmu_writable(raw: u64) -> u64;
    /// Sets or clears a leaf's Accessed bit.
    fn with_accessed(raw: u64, on: bool) -> u64;
    /// Sets or clears a leaf's Dirty bit.
    fn with_dirty(raw: u64, on: bool) -> u64;
    /// Sets or clears a leaf's execute permission.
    fn with_executable(raw: u64, on: bool) -> u64;
    /// An entry that remembers that `gfn` has no slot, or `None` if the format has none such.
    fn make_mmio(gfn: Gfn, generation: u32) -> Option<u64> {
        let _ = (gfn, generation);
        None
    }

    /// Whether the format has an entry for a leaf with these permissions. A leaf is readable, or,
    /// with [`EXECUTE_ONLY`](Self::EXECUTE_ONLY), executable and on no ground writable, so that
    /// giving W back is always safe; and under [`AdPolicy::AccessTracking`] one that has not been
    /// accessed is not writable.
    #[inline(always)]
    fn holds(leaf: &Leaf) -> bool {
        let execute_only =
            Self::EXECUTE_ONLY && leaf.executable && !leaf.writable && !leaf.mmu_writable;
        let tracked_writable =
            matches!(Self::AD_POLICY, AdPolicy::AccessTracking) && leaf.writable && !leaf.accessed;
        (leaf.readable || execute_only) && !tracked_writable
    }

    /// The level of the root.
    const ROOT_LEVEL: Level = match Level::new(Self::INDEX_BITS.len() as u8) {
        Some(level) => level,
        None => panic!("a format has 1 to 5 levels"),
    };

    /// Index bits of `level`; 0 above the root.
    fn index_bits(level: Level) -> u32 {
        Self::INDEX_BITS.get(level.index()).copied().unwrap_or(0)
    }

    /// Entries in a table at `level`.
    fn entries(level: Level) -> usize {
        1 << Self::index_bits(level)
    }

    /// Bytes of a table at `level`, which are also its alignment.
    fn node_size(level: Level) -> usize {
        Self::entries(level) * size_of::<u64>()
    }

    /// log2 of the pages that one entry at `level` spans.
    fn shift(level: Level) -> u32 {
        Self::INDEX_BITS.iter().take(level.index()).sum()
    }

    /// Pages that one entry at `level` spans.
    fn span(level: Level) -> u64 {
        1 << Self::shift(level)
    }

    /// The first frame of the entry at `level` that covers `gfn`.
    fn align_down(gfn: Gfn, level: Level) -> Gfn {
        Gfn(gfn.0 & !(Self::span(level) - 1))
    }

    /// The position, in its table at `level`, of the entry that covers `gfn`.
    fn index(gfn: Gfn, level: Level) -> usize {
        (gfn.0 >> Self::shift(level)) as usize & (Self::entries(level) - 1)
    }

    /// The table that an entry points to. Exactly `decode`'s answer for every value; formats
    /// override it with a few instructions.
    #[inline(always)]
    fn as_table(raw: u64, level: Level) -> Option<Pfn> {
        match Self::decode(raw, level) {
            Entry::Table { pfn } => Some(pfn),
            _ => None,
        }
    }

    /// The same as an address, in bytes. Formats whose entries hold frames where addresses have
    /// them override it: each step of each walk asks, and each instruction in it is a memory access
    /// less under way.
    #[inline(always)]
    fn table_hpa(raw: u64, level: Level) -> Option<u64> {
        Self::as_table(raw, level).map(Pfn::hpa)
    }

    /// What `decode` says of an entry that is a leaf; of any other value it may say anything.
    /// Formats override it with what takes no check.
    #[inline(always)]
    fn leaf(raw: u64, level: Level) -> Leaf {
        match Self::decode(raw, level) {
            Entry::Leaf(leaf) => leaf,
            _ => Leaf {
                pfn: Pfn(0),
                readable: false,
                writable: false,
                executable: false,
                mmu_writable: false,
                host_writable: false,
                accessed: false,
                dirty: false,
                memory: MemoryType::Normal,
            },
        }
    }

    /// Whether an entry is a leaf. Like the following shortcuts, it may say anything of a malformed
    /// value.
    #[inline(always)]
    fn is_leaf(raw: u64, level: Level) -> bool {
        matches!(Self::decode(raw, level), Entry::Leaf(_))
    }

    /// Whether a leaf's W bit is set. False for anything but a leaf.
    #[inline(always)]
    fn is_writable(raw: u64, level: Level) -> bool {
        matches!(Self::decode(raw, level), Entry::Leaf(leaf) if leaf.writable)
    }

    /// Whether the MMU may set a leaf's W bit. False for anything but a leaf.
    #[inline(always)]
    fn is_mmu_writable(raw: u64, level: Level) -> bool {
        matches!(Self::decode(raw, level), Entry::Leaf(leaf) if leaf.mmu_writable)
    }

    /// Whether a leaf was used. False for anything but a leaf.
    #[inline(always)]
    fn is_accessed(raw: u64, level: Level) -> bool {
        matches!(Self::decode(raw, level), Entry::Leaf(leaf) if leaf.accessed)
    }

    /// Whether a leaf was written. False for anything but a leaf.
    #[inline(always)]
    fn is_dirty(raw: u64, level: Level) -> bool {
        matches!(Self::decode(raw, level), Entry::Leaf(leaf) if leaf.dirty)
    }

    /// What to add to a leaf's entry to get the entry of the leaf that maps the frames after it.
    #[inline(always)]
    fn leaf_step(level: Level) -> u64 {
        let leaf = |pfn| Leaf {
            pfn: Pfn(pfn),
            readable: true,
            writable: false,
            executable: false,
            mmu_writable: false,
            host_writable: false,
            accessed: true,
            dirty: false,
            memory: MemoryType::Normal,
        };
        Self::make_leaf(&leaf(Self::span(level)), level)
            .wrapping_sub(Self::make_leaf(&leaf(0), level))
    }

    /// Whether hardware or the lockless fast path may change a leaf's W or D bit at any moment, so
    /// that only an atomic exchange loses nothing: W is off and may be given back, D is off and
    /// hardware may set it, or the leaf is access-tracked. Accessed alone is no reason: losing it
    /// is tolerated (`spte_needs_atomic_update`).
    #[inline(always)]
    fn is_volatile(raw: u64, level: Level) -> bool {
        let writable = Self::is_writable(raw, level);
        match Self::AD_POLICY {
            AdPolicy::Hardware => {
                (writable && !Self::is_dirty(raw, level))
                    || (!writable && Self::is_mmu_writable(raw, level))
            }
            AdPolicy::SetAtInstall => !writable && Self::is_mmu_writable(raw, level),
            AdPolicy::AccessTracking => {
                Self::is_leaf(raw, level) && !(writable && Self::is_accessed(raw, level))
            }
        }
    }

    /// Whether an entry is a leaf or points to a table.
    fn is_present(raw: u64, level: Level) -> bool {
        matches!(
            Self::decode(raw, level),
            Entry::Leaf(_) | Entry::Table { .. }
        )
    }

    /// Entry `index` of the table that replaces the huge leaf `raw` of `level`: the same memory
    /// with the same permissions, one level finer. [`EMPTY`](Self::EMPTY) if `raw` is not a leaf
    /// above 4 KiB.
    fn make_huge_page_split(raw: u64, level: Level, index: usize) -> u64 {
        match (Self::decode(raw, level), level.child()) {
            (Entry::Leaf(leaf), Some(child)) => {
                let pfn = Pfn(leaf.pfn.0 + index as u64 * Self::span(child));
                Self::make_leaf(&Leaf { pfn, ..leaf }, child)
            }
            _ => Self::EMPTY,
        }
    }

    /// The constants as a value, for code that does not know the format.
    fn info() -> FormatInfo {
        FormatInfo {
            name: Self::NAME,
            root_level: Self::ROOT_LEVEL,
            root_size: Self::node_size(Self::ROOT_LEVEL),
            max_leaf_level: Self::MAX_LEAF_LEVEL,
            max_gfn: Self::MAX_GFN,
            max_pfn: Self::MAX_PFN,
            ad_policy: Self::AD_POLICY,
            dirty_log: Self::DIRTY_LOG,
            install_needs_fence: Self::INSTALL_NEEDS_FENCE,
            break_before_make: Self::BREAK_BEFORE_MAKE,
            flush: Self::FLUSH,
            mmio_generation_bits: Self::MMIO_GENERATION_BITS,
            execute_only: Self::EXECUTE_ONLY,
            nx_huge_pages: Self::NX_HUGE_PAGES,
            optional_memory_types: Self::OPTIONAL_MEMORY_TYPES,
        }
    }
}

/// A format's constants at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FormatInfo {
    /// [`Format::NAME`].
    pub name: &'static str,
    /// [`Format::ROOT_LEVEL`].
    pub root_level: Level,
    /// Bytes of a root table, and its alignment.
    pub root_size: usize,
    /// [`Format::MAX_LEAF_LEVEL`].
    pub max_leaf_level: Level,
    /// [`Format::MAX_GFN`].
    pub max_gfn: Gfn,
    /// [`Format::MAX_PFN`].
    pub max_pfn: Pfn,
    /// [`Format::AD_POLICY`].
    pub ad_policy: AdPolicy,
    /// [`Format::DIRTY_LOG`].
    pub dirty_log: DirtyLogPolicy,
    /// [`Format::INSTALL_NEEDS_FENCE`].
    pub install_needs_fence: bool,
    /// [`Format::BREAK_BEFORE_MAKE`].
    pub break_before_make: bool,
    /// [`Format::FLUSH`].
    pub flush: FlushPrimitive,
    /// [`Format::MMIO_GENERATION_BITS`].
    pub mmio_generation_bits: u32,
    /// [`Format::EXECUTE_ONLY`].
    pub execute_only: bool,
    /// [`Format::NX_HUGE_PAGES`].
    pub nx_huge_pages: bool,
    /// [`Format::OPTIONAL_MEMORY_TYPES`].
    pub optional_memory_types: bool,
}
