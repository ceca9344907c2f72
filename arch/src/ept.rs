//! Intel extended page tables, four levels.
//!
//! Source: Intel SDM vol. 3C, "The Extended Page Table Mechanism" (tables of EPT entry formats). Bits that the SDM calls
//! ignored hold our software bits:
//!
//! | bit | use |
//! |---|---|
//! | 0, 1, 2 | R, W, X |
//! | 5:3 | memory type of a leaf |
//! | 7 | leaf above 4 KiB |
//! | 8, 9 | Accessed, Dirty (enabled in the EPTP) |
//! | 11 | software: written by the MMU as present |
//! | 51:12 | frame |
//! | 57, 58 | software: host-writable, MMU-writable |
//! | 63 | suppress #VE |
//!
//! A non-present entry is not 0 but bit 63 alone, so that a guest with #VE enabled gets an EPT violation and not an
//! exception of its own. A table is linked with Accessed set, so hardware never changes it.

use slat_mmu::{
    AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, Gfn, Leaf, Level, MemoryType, Pfn,
};

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const MEMORY_TYPE_SHIFT: u32 = 3;
const MEMORY_TYPE: u64 = 7 << MEMORY_TYPE_SHIFT;
const HUGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const MMU_PRESENT: u64 = 1 << 11;
const HOST_WRITABLE: u64 = 1 << 57;
const MMU_WRITABLE: u64 = 1 << 58;
const SUPPRESS_VE: u64 = 1 << 63;

const PFN_SHIFT: u32 = 12;
const PFN_BITS: u32 = 40;
const PFN: u64 = ((1 << PFN_BITS) - 1) << PFN_SHIFT;

/// Memory types of the SDM.
const UC: u64 = 0;
const WC: u64 = 1;
const WB: u64 = 6;

/// Four-level EPT: 48-bit guest physical addresses, leaves of 4 KiB, 2 MiB and 1 GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ept4;

impl Ept4 {
    /// The EPTP for a root table: write-back, four levels, Accessed and Dirty enabled (SDM vol. 3C, "EPTP").
    pub const fn eptp(root: Pfn) -> u64 {
        (root.0 << PFN_SHIFT) & PFN | 1 << 6 | 3 << 3 | WB
    }
}

const fn bit(on: bool, mask: u64) -> u64 {
    if on { mask } else { 0 }
}

// SAFETY: the laws hold by construction (decode accepts only what encode gives back) and are tested in
// `tests/format_laws.rs`. Hardware sets bits 8 and 9 of leaves only; tables are linked with bit 8 set.
#[expect(unsafe_code, reason = "a format vouches for its laws")]
unsafe impl Format for Ept4 {
    const NAME: &'static str = "ept4";
    const INDEX_BITS: &'static [u32] = &[9, 9, 9, 9];
    const MAX_LEAF_LEVEL: Level = Level::SIZE_1G;
    const MAX_GFN: Gfn = Gfn(1 << 36);
    const MAX_PFN: Pfn = Pfn(1 << PFN_BITS);
    const EMPTY: u64 = SUPPRESS_VE;
    /// No permission and no MMU-present bit, and nothing that an empty entry ever is.
    const FROZEN: u64 = SUPPRESS_VE | 0x1a0;
    const AD_POLICY: AdPolicy = AdPolicy::Hardware;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    /// Non-present entries are never cached (SDM vol. 3C, "Caching Translation Information").
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = false;
    const FLUSH: FlushPrimitive = FlushPrimitive::Invept;

    fn decode(raw: u64, level: Level) -> Entry {
        if raw == Self::FROZEN {
            return Entry::Frozen;
        }
        if raw & (READ | WRITE | EXECUTE | MMU_PRESENT) == 0 {
            return Entry::NonPresent;
        }
        let pfn = Pfn((raw & PFN) >> PFN_SHIFT);
        if level > Level::SIZE_4K && raw & HUGE == 0 {
            return if Self::make_table(pfn) == raw {
                Entry::Table { pfn }
            } else {
                Entry::Malformed
            };
        }
        let memory = match (raw & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT {
            WB => MemoryType::Normal,
            WC => MemoryType::NonCacheable,
            UC => MemoryType::Device,
            _ => return Entry::Malformed,
        };
        let leaf = Leaf {
            pfn,
            readable: true,
            writable: raw & WRITE != 0,
            executable: raw & EXECUTE != 0,
            mmu_writable: raw & MMU_WRITABLE != 0,
            host_writable: raw & HOST_WRITABLE != 0,
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
            memory,
        };
        if level <= Self::MAX_LEAF_LEVEL && Self::make_leaf(&leaf, level) == raw {
            Entry::Leaf(leaf)
        } else {
            Entry::Malformed
        }
    }

    fn make_leaf(leaf: &Leaf, level: Level) -> u64 {
        let memory = match leaf.memory {
            MemoryType::Normal => WB,
            MemoryType::NonCacheable => WC,
            MemoryType::Device => UC,
        };
        let frame = Self::align_down(Gfn(leaf.pfn.0), level).0;
        (frame << PFN_SHIFT) & PFN
            | READ
            | MMU_PRESENT
            | SUPPRESS_VE
            | memory << MEMORY_TYPE_SHIFT
            | bit(level > Level::SIZE_4K, HUGE)
            | bit(leaf.writable, WRITE)
            | bit(leaf.executable, EXECUTE)
            | bit(leaf.mmu_writable, MMU_WRITABLE)
            | bit(leaf.host_writable, HOST_WRITABLE)
            | bit(leaf.accessed, ACCESSED)
            | bit(leaf.dirty, DIRTY)
    }

    fn make_table(pfn: Pfn) -> u64 {
        (pfn.0 << PFN_SHIFT) & PFN | READ | WRITE | EXECUTE | ACCESSED | MMU_PRESENT
    }

    fn with_writable(raw: u64, on: bool) -> u64 {
        raw & !WRITE | bit(on, WRITE)
    }

    fn clear_mmu_writable(raw: u64) -> u64 {
        raw & !(WRITE | MMU_WRITABLE)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_the_manual_has_them() {
        let leaf = Leaf {
            pfn: Pfn(0x12345),
            readable: true,
            writable: true,
            executable: true,
            mmu_writable: true,
            host_writable: true,
            accessed: true,
            dirty: true,
            memory: MemoryType::Normal,
        };
        assert_eq!(
            Ept4::make_leaf(&leaf, Level::SIZE_4K),
            0x8600_0000_1234_5b37
        );
        assert_eq!(
            Ept4::make_leaf(&leaf, Level::SIZE_2M),
            0x8600_0000_1220_0bb7
        );
        assert_eq!(Ept4::make_table(Pfn(0xabc)), 0xab_c907);
        assert_eq!(Ept4::eptp(Pfn(0xabc)), 0xab_c05e);
    }

    #[test]
    fn misconfigurations_are_malformed() {
        let level = Level::SIZE_4K;
        // Write without read; execute only; reserved memory type 2.
        for raw in [
            MMU_PRESENT | WRITE,
            MMU_PRESENT | EXECUTE,
            MMU_PRESENT | SUPPRESS_VE | READ | 2 << 3,
        ] {
            assert_eq!(Ept4::decode(raw, level), Entry::Malformed, "{raw:#x}");
        }
        assert_eq!(
            Ept4::decode(MMU_PRESENT | READ | HUGE, Level::SIZE_512G),
            Entry::Malformed
        );
    }
}
