//! The format that follows from a description of its bits.
//!
//! [`Encoded`] makes, reads and changes entries as a [`Layout`] says, and answers the shortcuts
//! that walks and sweeps use. The code that the MMU's soundness rests on exists once, here.
//!
//! # Invariants
//!
//! - What a layout must keep for the laws of [`Format`] to hold is checked at compile time, as far
//!   as constants can show it (`check`).
//! - `decode` accepts a leaf only if making it again would give the same bits (`is_exact`).
//!   Whatever a manual reserves is therefore malformed without a line of its own.
//! - The shortcuts are one mask and one comparison each, chosen at compile time.

use core::{fmt, marker::PhantomData};

use slat_mmu::{
    AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, Gfn, Leaf, Level, PAGE_SHIFT, Pfn,
};

use crate::{
    check,
    layout::{Flag, Layout, Mark},
};

/// The format that a table of bits describes; the formats of this crate are aliases of it.
#[derive(Clone, Copy)]
pub struct Encoded<L>(PhantomData<L>);

impl<L: Layout> fmt::Debug for Encoded<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(L::NAME)
    }
}

impl<L: Layout> Encoded<L> {
    /// A layout that is at fault does not compile.
    const CHECKED: () = match check::fault::<L>() {
        None => (),
        Some(what) => panic!("{}", what),
    };

    const ROOT_BITS: u32 = L::INDEX_BITS[L::INDEX_BITS.len() - 1];
    /// R and X, in the place where hardware obeys them.
    const SAVABLE: u64 = L::READ.mask | L::EXECUTE.mask;

    /// Every flag of a leaf.
    const ALL_FLAGS: [Flag; 7] = [
        L::READ,
        L::WRITE,
        L::EXECUTE,
        L::ACCESSED,
        L::DIRTY,
        L::MMU_WRITABLE,
        L::HOST_WRITABLE,
    ];
    const FLAGS: u64 = {
        let (mut mask, mut flag) = (0, 0);
        while flag < Self::ALL_FLAGS.len() {
            mask |= Self::ALL_FLAGS[flag].mask;
            flag += 1;
        }
        mask
    };
    /// Whether each flag is one bit at one place, or none.
    const IS_PLAIN: bool = {
        let (mut plain, mut flag) = (true, 0);
        while flag < Self::ALL_FLAGS.len() {
            plain &= Self::ALL_FLAGS[flag].mask.count_ones() <= 1;
            flag += 1;
        }
        plain && !matches!(L::AD_POLICY, AdPolicy::AccessTracking)
    };

    /// What tells a leaf of `level` from everything else at its level.
    #[inline(always)]
    fn mark(level: Level) -> Mark {
        if level > Level::SIZE_4K {
            L::HUGE
        } else {
            L::SMALL
        }
    }

    /// Whether `raw` is a leaf that says yes. Where a pointer to a table never does, the answer
    /// needs no look at the level.
    #[inline(always)]
    fn is_leaf_with(raw: u64, level: Level, flag: Flag) -> bool {
        if flag.is_on(L::TABLE) {
            Self::mark(level).and(flag).is_on(raw)
        } else {
            Mark::set(L::PRESENT).and(flag).is_on(raw)
        }
    }

    /// How far up R and X of this leaf are.
    #[inline(always)]
    fn home(raw: u64) -> u32 {
        match L::AD_POLICY {
            AdPolicy::AccessTracking if !L::ACCESSED.is_on(raw) => L::SAVED_SHIFT,
            _ => 0,
        }
    }

    #[inline(always)]
    fn with(raw: u64, flag: Flag, on: bool) -> u64 {
        raw & !flag.mask | flag.bits(on)
    }

    /// Whether making `leaf`, which was read from `raw`, again gives the same bits.
    ///
    /// Where nothing is moved about it need not be made: each flag is one bit and says what it
    /// says, so what is left are the bits that nothing stands for, and those that every leaf has.
    #[inline(always)]
    fn is_exact(raw: u64, leaf: &Leaf, level: Level) -> bool {
        if !Self::IS_PLAIN {
            return Self::make_leaf(leaf, level) == raw;
        }
        let frame = L::FRAME.put(u64::MAX << Self::shift(level));
        let carried = frame | L::MEMORY.mask | Self::FLAGS;
        let fixed = Self::mark(level).value | L::LEAF;
        let exact = raw & carried | fixed == raw && L::MEMORY.knows(raw) && Self::holds(leaf);
        debug_assert_eq!(exact, Self::make_leaf(leaf, level) == raw);
        exact
    }

    /// `leaf` if the format holds it, otherwise `leaf` without W if it holds that.
    #[inline(always)]
    fn held(leaf: &Leaf) -> Option<Leaf> {
        if Self::holds(leaf) {
            return Some(*leaf);
        }
        let leaf = Leaf {
            writable: false,
            ..*leaf
        };
        Self::holds(&leaf).then_some(leaf)
    }
}

// SAFETY: `decode` accepts only what `make_leaf` and `make_table` would give back (`is_exact`:
// `check` keeps fields disjoint, so bits can be judged one by one), and `check` keeps pointers,
// leaves and absent entries distinct whatever the flags say. A flag of a leaf is no bit of its
// frame, so neither a mutator nor hardware, which sets Accessed and Dirty of leaves, makes a
// pointer of a leaf. `tests/format_laws.rs` tests each law on each format.
#[expect(unsafe_code, reason = "a format vouches for its laws")]
unsafe impl<L: Layout> Format for Encoded<L> {
    const NAME: &'static str = L::NAME;
    const INDEX_BITS: &'static [u32] = L::INDEX_BITS;
    const MAX_LEAF_LEVEL: Level = L::MAX_LEAF_LEVEL;
    const MAX_GFN: Gfn = {
        let () = Self::CHECKED;
        let (mut level, mut bits) = (0, 0);
        while level < L::INDEX_BITS.len() {
            bits += L::INDEX_BITS[level];
            level += 1;
        }
        Gfn(1 << bits)
    };
    const MAX_PFN: Pfn = Pfn(1 << L::FRAME.bits);
    const EMPTY: u64 = L::EMPTY;
    const FROZEN: u64 = L::FROZEN;
    const AD_POLICY: AdPolicy = L::AD_POLICY;
    const DIRTY_LOG: DirtyLogPolicy = L::DIRTY_LOG;
    const INSTALL_NEEDS_FENCE: bool = L::INSTALL_NEEDS_FENCE;
    const BREAK_BEFORE_MAKE: bool = L::BREAK_BEFORE_MAKE;
    const FLUSH: FlushPrimitive = L::FLUSH;
    const MMIO_GENERATION_BITS: u32 = L::MMIO_GENERATION_BITS;
    const EXECUTE_ONLY: bool = L::EXECUTE_ONLY;
    const NX_HUGE_PAGES: bool = L::NX_HUGE_PAGES;
    const OPTIONAL_MEMORY_TYPES: bool = L::OPTIONAL_MEMORY_TYPES;

    #[inline]
    fn decode(raw: u64, level: Level) -> Entry {
        if raw & L::PRESENT == 0 {
            return if raw == L::FROZEN {
                Entry::Frozen
            } else if raw & L::HARDWARE_PRESENT == 0 {
                Entry::NonPresent
            } else if let Some(generation) = L::mmio_generation(raw) {
                Entry::Mmio { generation }
            } else {
                Entry::Malformed
            };
        }
        if let Some(pfn) = Self::as_table(raw, level) {
            return Entry::Table { pfn };
        }
        let leaf = Self::leaf(raw, level);
        if level <= L::MAX_LEAF_LEVEL && Self::is_exact(raw, &leaf, level) {
            Entry::Leaf(leaf)
        } else {
            Entry::Malformed
        }
    }

    #[inline(always)]
    fn leaf(raw: u64, _: Level) -> Leaf {
        let permissions = raw >> Self::home(raw);
        Leaf {
            pfn: Pfn(L::FRAME.get(raw)),
            readable: L::READ.is_on(permissions),
            writable: L::WRITE.is_on(raw),
            executable: L::EXECUTE.is_on(permissions),
            mmu_writable: L::MMU_WRITABLE.is_on(raw),
            host_writable: L::HOST_WRITABLE.is_on(raw),
            accessed: L::ACCESSED.is_on(raw),
            dirty: L::DIRTY.is_on(raw),
            memory: L::MEMORY.of(raw),
        }
    }

    #[inline]
    fn make_leaf(leaf: &Leaf, level: Level) -> u64 {
        let Some(leaf) = Self::held(leaf) else {
            return L::EMPTY;
        };
        let shift = Self::shift(level);
        let accessed = L::ACCESSED.bits(leaf.accessed);
        let permissions = L::READ.bits(leaf.readable) | L::EXECUTE.bits(leaf.executable);
        L::FRAME.put(leaf.pfn.0 >> shift << shift)
            | Self::mark(level).value
            | L::LEAF
            | L::MEMORY.bits(leaf.memory)
            | permissions << Self::home(accessed)
            | L::WRITE.bits(leaf.writable)
            | L::MMU_WRITABLE.bits(leaf.mmu_writable)
            | L::HOST_WRITABLE.bits(leaf.host_writable)
            | accessed
            | L::DIRTY.bits(leaf.dirty)
    }

    #[inline(always)]
    fn make_table(pfn: Pfn) -> u64 {
        L::FRAME.put(pfn.0) | L::TABLE
    }

    #[inline(always)]
    fn with_writable(raw: u64, on: bool) -> u64 {
        let raw = match L::AD_POLICY {
            // Back to its place first: W beside a clear R is reserved.
            AdPolicy::AccessTracking if on => Self::with_accessed(raw, true),
            _ => raw,
        };
        Self::with(raw, L::WRITE, on)
    }

    #[inline(always)]
    fn clear_mmu_writable(raw: u64) -> u64 {
        let both = L::WRITE.mask | L::MMU_WRITABLE.mask;
        raw & !both | L::WRITE.bits(false) | L::MMU_WRITABLE.bits(false)
    }

    #[inline(always)]
    fn with_accessed(raw: u64, on: bool) -> u64 {
        if L::AD_POLICY != AdPolicy::AccessTracking {
            return Self::with(raw, L::ACCESSED, on);
        }
        let (savable, saved) = (Self::SAVABLE, Self::SAVABLE << L::SAVED_SHIFT);
        match (on, L::ACCESSED.is_on(raw)) {
            (true, false) => {
                let permissions = (raw & saved) >> L::SAVED_SHIFT;
                raw & !saved | permissions | L::ACCESSED.bits(true)
            }
            (false, true) => {
                let permissions = (raw & savable) << L::SAVED_SHIFT;
                let rest = Self::with(raw & !savable, L::ACCESSED, false);
                Self::with(rest, L::WRITE, false) | permissions
            }
            _ => raw,
        }
    }

    #[inline(always)]
    fn with_dirty(raw: u64, on: bool) -> u64 {
        Self::with(raw, L::DIRTY, on)
    }

    #[inline(always)]
    fn with_executable(raw: u64, on: bool) -> u64 {
        let home = Self::home(raw);
        raw & !(L::EXECUTE.mask << home) | L::EXECUTE.bits(on) << home
    }

    #[inline(always)]
    fn make_mmio(gfn: Gfn, generation: u32) -> Option<u64> {
        L::make_mmio(gfn, generation)
    }

    #[inline(always)]
    fn shift(level: Level) -> u32 {
        9 * (level.get() as u32 - 1)
    }

    #[inline(always)]
    fn index(gfn: Gfn, level: Level) -> usize {
        let bits = if level == Self::ROOT_LEVEL {
            Self::ROOT_BITS
        } else {
            9
        };
        (gfn.0 >> Self::shift(level)) as usize & ((1 << bits) - 1)
    }

    #[inline(always)]
    fn as_table(raw: u64, level: Level) -> Option<Pfn> {
        let is_pointer = raw & !L::FRAME.mask() == L::TABLE && level > Level::SIZE_4K;
        is_pointer.then_some(Pfn(L::FRAME.get(raw)))
    }

    #[inline(always)]
    fn table_hpa(raw: u64, level: Level) -> Option<u64> {
        if L::FRAME.shift != PAGE_SHIFT {
            return Self::as_table(raw, level).map(Pfn::hpa);
        }
        // By subtraction, which the compiler folds into the next address.
        let is_pointer = raw & !L::FRAME.mask() == L::TABLE && level > Level::SIZE_4K;
        is_pointer.then_some(raw.wrapping_sub(L::TABLE))
    }

    #[inline(always)]
    fn is_leaf(raw: u64, level: Level) -> bool {
        Self::mark(level).is_on(raw)
    }

    #[inline(always)]
    fn is_writable(raw: u64, level: Level) -> bool {
        Self::is_leaf_with(raw, level, L::WRITE)
    }

    #[inline(always)]
    fn is_mmu_writable(raw: u64, level: Level) -> bool {
        Self::is_leaf_with(raw, level, L::MMU_WRITABLE)
    }

    #[inline(always)]
    fn is_accessed(raw: u64, level: Level) -> bool {
        Self::is_leaf_with(raw, level, L::ACCESSED)
    }

    #[inline(always)]
    fn is_dirty(raw: u64, level: Level) -> bool {
        Self::is_leaf_with(raw, level, L::DIRTY)
    }

    #[inline(always)]
    fn leaf_step(level: Level) -> u64 {
        1 << (Self::shift(level) + L::FRAME.shift)
    }

    #[inline(always)]
    fn is_volatile(raw: u64, level: Level) -> bool {
        let may_write = Mark::new(0, 0).and(L::WRITE);
        match L::AD_POLICY {
            // Settled: W and D, or neither W nor the leave to set it.
            AdPolicy::Hardware => {
                let neither = L::WRITE.mask | L::MMU_WRITABLE.mask;
                let none = L::WRITE.bits(false) | L::MMU_WRITABLE.bits(false);
                let settled = may_write.and(L::DIRTY).is_on(raw) || raw & neither == none;
                Self::is_leaf(raw, level) && !settled
            }
            AdPolicy::SetAtInstall => {
                let leave = Mark::set(L::PRESENT).and(L::MMU_WRITABLE);
                let withheld = Mark::new(L::WRITE.mask, L::WRITE.bits(false));
                raw & (leave.mask | withheld.mask) == leave.value | withheld.value
            }
            AdPolicy::AccessTracking => {
                Self::is_leaf(raw, level) && !may_write.and(L::ACCESSED).is_on(raw)
            }
        }
    }

    #[inline(always)]
    fn is_present(raw: u64, level: Level) -> bool {
        Self::is_leaf(raw, level) || Self::as_table(raw, level).is_some()
    }
}
