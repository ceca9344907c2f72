//! Stage-2 descriptors: 40-bit and 48-bit intermediate physical addresses.
//!
//! | bit | leaf | pointer to a table |
//! |---|---|---|
//! | 0 | valid | valid |
//! | 1 | 1 at 4 KiB (page), 0 above (block) | 1 |
//! | 5:2 | MemAttr | 0 |
//! | 6, 7 | S2AP: read, write | 0 |
//! | 9:8 | SH, always inner shareable | 0 |
//! | 10 | AF | 0 |
//! | 47:12 | output address, aligned to the level | address |
//! | 51, 52 | 0 (DBM, Contiguous) | 0 |
//! | 54:53 | XN: 10b no execution, 00b execution | 0 |
//! | 55, 56, 57 | software: MMU-writable, host-writable, Dirty | 0 |
//!
//! Arm numbers levels from the root, down to level 3; the MMU's 4 KiB, 2 MiB, 1 GiB and 512 GiB are Arm's 3, 2, 1 and
//! 0, which holds no blocks in this granule. An invalid descriptor's other bits are free; one such value is `FROZEN`.
//!
//! *Concatenated root*: a 40-bit address has one bit too many for three levels. The walk starts at Arm's level 1 with two tables
//! side by side, which is one table of 1024 entries, as the RISC-V root is four.
//!
//! *Permissions*: read and write are separate bits, so write-only is legal for hardware but nothing this MMU writes;
//! execute-only (S2AP 00, XN 00) is legal. XN bit 53 belongs to FEAT_XNX and stays 0.
//!
//! *Memory types* (without FEAT_S2FWB): Normal write-back 1111b, Normal non-cacheable 0101b, Device-nGnRE 0001b. The
//! stronger of both stages' attributes wins.
//!
//! *Accessed and Dirty*: the processor may be one that faults where AF is clear (`VTCR_EL2.HA` = 0), so leaves are made with
//! it set. Dirty is the MMU's own bit; hardware's (DBM) stays off and writes are logged by taking S2AP's write bit away.

use slat_mmu::{
    AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, Gfn, Leaf, Level, MemoryType, Pfn,
};

use crate::bits::{align, all, bit, held, index, pointer, shift};

const VALID: u64 = 1 << 0;
const TYPE: u64 = 3;
const TABLE: u64 = 3;
const PAGE: u64 = 3;
const BLOCK: u64 = 1;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const NO_EXECUTE: u64 = 1 << 54;
const MMU_WRITABLE: u64 = 1 << 55;
const HOST_WRITABLE: u64 = 1 << 56;
const DIRTY: u64 = 1 << 57;

const MEMORY: u64 = 0xf << 2;
const NORMAL: u64 = 0xf << 2;
const NON_CACHEABLE: u64 = 5 << 2;
const DEVICE: u64 = 1 << 2;

const PFN_SHIFT: u32 = 12;
const PFN_BITS: u32 = 36;
const PFN: u64 = ((1 << PFN_BITS) - 1) << PFN_SHIFT;

/// Stage 2 with `LEVELS` levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stage2<const LEVELS: usize>;

/// Three levels with a root of two concatenated tables: 40-bit addresses (`VTCR_EL2`: T0SZ 24, SL0 1).
pub type Arm64Ipa40 = Stage2<3>;
/// Four levels: 48-bit addresses (`VTCR_EL2`: T0SZ 16, SL0 2).
pub type Arm64Ipa48 = Stage2<4>;

/// What marks a leaf of `level`.
#[inline(always)]
fn leaf_type(level: Level) -> u64 {
    if level == Level::SIZE_4K { PAGE } else { BLOCK }
}

// SAFETY: the laws hold by construction (decode accepts only what encode gives back) and are tested in
// `tests/format_laws.rs`. Hardware sets AF of leaves at most (VTCR_EL2.HA); it changes no pointer.
#[expect(unsafe_code, reason = "a format vouches for its laws")]
unsafe impl<const LEVELS: usize> Format for Stage2<LEVELS> {
    const NAME: &'static str = match LEVELS {
        3 => "arm64-ipa40",
        4 => "arm64-ipa48",
        _ => panic!("stage 2 is described with three or four levels"),
    };
    const INDEX_BITS: &'static [u32] = if LEVELS == 3 {
        &[9, 9, 10]
    } else {
        &[9, 9, 9, 9]
    };
    const MAX_LEAF_LEVEL: Level = Level::SIZE_1G;
    const MAX_GFN: Gfn = Gfn(if LEVELS == 3 { 1 << 28 } else { 1 << 36 });
    const MAX_PFN: Pfn = Pfn(1 << PFN_BITS);
    const EMPTY: u64 = 0;
    /// Not valid, so all other bits are ours.
    const FROZEN: u64 = 0x1a0;
    const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = true;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("TLBI IPAS2E1IS");
    const EXECUTE_ONLY: bool = true;

    #[inline]
    fn decode(raw: u64, level: Level) -> Entry {
        if raw & VALID == 0 {
            return if raw == Self::FROZEN {
                Entry::Frozen
            } else {
                Entry::NonPresent
            };
        }
        if let Some(pfn) = Self::as_table(raw, level) {
            return Entry::Table { pfn };
        }
        let leaf = Self::leaf(raw, level);
        if level <= Self::MAX_LEAF_LEVEL && Self::make_leaf(&leaf, level) == raw {
            Entry::Leaf(leaf)
        } else {
            Entry::Malformed
        }
    }

    /// An unknown memory type reads as normal; `decode` sees that making it again gives something else.
    #[inline(always)]
    fn leaf(raw: u64, _: Level) -> Leaf {
        let memory = match raw & MEMORY {
            NORMAL => MemoryType::Normal,
            NON_CACHEABLE => MemoryType::NonCacheable,
            DEVICE => MemoryType::Device,
            _ => MemoryType::Normal,
        };
        Leaf {
            pfn: Pfn((raw & PFN) >> PFN_SHIFT),
            readable: raw & READ != 0,
            writable: raw & WRITE != 0,
            executable: raw & NO_EXECUTE == 0,
            mmu_writable: raw & MMU_WRITABLE != 0,
            host_writable: raw & HOST_WRITABLE != 0,
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
            memory,
        }
    }

    #[inline]
    fn make_leaf(leaf: &Leaf, level: Level) -> u64 {
        let Some(leaf) = held::<Self>(leaf) else {
            return Self::EMPTY;
        };
        let memory = match leaf.memory {
            MemoryType::Normal => NORMAL,
            MemoryType::NonCacheable => NON_CACHEABLE,
            MemoryType::Device => DEVICE,
        };
        (align(leaf.pfn, level) << PFN_SHIFT) & PFN
            | leaf_type(level)
            | INNER_SHAREABLE
            | memory
            | bit(leaf.readable, READ)
            | bit(leaf.writable, WRITE)
            | bit(!leaf.executable, NO_EXECUTE)
            | bit(leaf.mmu_writable, MMU_WRITABLE)
            | bit(leaf.host_writable, HOST_WRITABLE)
            | bit(leaf.accessed, ACCESSED)
            | bit(leaf.dirty, DIRTY)
    }

    #[inline(always)]
    fn make_table(pfn: Pfn) -> u64 {
        (pfn.0 << PFN_SHIFT) & PFN | TABLE
    }

    #[inline(always)]
    fn with_writable(raw: u64, on: bool) -> u64 {
        raw & !WRITE | bit(on, WRITE)
    }

    #[inline(always)]
    fn clear_mmu_writable(raw: u64) -> u64 {
        raw & !(WRITE | MMU_WRITABLE)
    }

    #[inline(always)]
    fn with_accessed(raw: u64, on: bool) -> u64 {
        raw & !ACCESSED | bit(on, ACCESSED)
    }

    #[inline(always)]
    fn with_dirty(raw: u64, on: bool) -> u64 {
        raw & !DIRTY | bit(on, DIRTY)
    }

    #[inline(always)]
    fn with_executable(raw: u64, on: bool) -> u64 {
        raw & !NO_EXECUTE | bit(!on, NO_EXECUTE)
    }

    #[inline(always)]
    fn shift(level: Level) -> u32 {
        shift(level)
    }

    #[inline(always)]
    fn index(gfn: Gfn, level: Level) -> usize {
        index::<Self>(gfn, level, if LEVELS == 3 { 10 } else { 9 })
    }

    #[inline(always)]
    fn as_table(raw: u64, level: Level) -> Option<Pfn> {
        (raw & !PFN == TABLE && level > Level::SIZE_4K).then_some(Pfn((raw & PFN) >> PFN_SHIFT))
    }

    #[inline(always)]
    fn table_hpa(raw: u64, level: Level) -> Option<u64> {
        pointer(raw, PFN, TABLE).filter(|_| level > Level::SIZE_4K)
    }

    #[inline(always)]
    fn is_leaf(raw: u64, level: Level) -> bool {
        raw & TYPE == leaf_type(level)
    }

    #[inline(always)]
    fn is_writable(raw: u64, _: Level) -> bool {
        all(raw, VALID | WRITE)
    }

    #[inline(always)]
    fn is_mmu_writable(raw: u64, _: Level) -> bool {
        all(raw, VALID | MMU_WRITABLE)
    }

    #[inline(always)]
    fn is_accessed(raw: u64, _: Level) -> bool {
        all(raw, VALID | ACCESSED)
    }

    #[inline(always)]
    fn is_dirty(raw: u64, _: Level) -> bool {
        all(raw, VALID | DIRTY)
    }

    #[inline(always)]
    fn leaf_step(level: Level) -> u64 {
        1 << (shift(level) + PFN_SHIFT)
    }

    #[inline(always)]
    fn is_volatile(raw: u64, _: Level) -> bool {
        raw & (VALID | MMU_WRITABLE | WRITE) == VALID | MMU_WRITABLE
    }

    #[inline(always)]
    fn is_present(raw: u64, level: Level) -> bool {
        Self::is_leaf(raw, level) || Self::as_table(raw, level).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: Leaf = Leaf {
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

    /// Arm ARM D8.3, "VMSAv8-64 Block and Page descriptors", stage 2 attribute fields.
    #[test]
    fn bits_are_where_the_manual_has_them() {
        // Page = 3, write-back = 0x3c, S2AP = 0xc0, SH = 0x300, AF = 0x400, software = 7 << 55.
        assert_eq!(
            Arm64Ipa40::make_leaf(&LEAF, Level::SIZE_4K),
            0x0380_0000_1234_57ff
        );
        assert_eq!(
            Arm64Ipa48::make_leaf(&LEAF, Level::SIZE_2M),
            0x0380_0000_1220_07fd
        );
        let device = Leaf {
            memory: MemoryType::Device,
            executable: false,
            ..LEAF
        };
        assert_eq!(
            Arm64Ipa48::make_leaf(&device, Level::SIZE_4K),
            0x03c0_0000_1234_57c7
        );
        assert_eq!(Arm64Ipa48::make_table(Pfn(0xabc)), 0xab_c003);
    }

    #[test]
    fn what_the_mmu_never_writes_is_malformed() {
        let page = Arm64Ipa40::make_leaf(&LEAF, Level::SIZE_4K);
        // Reserved type; write-only; an unused memory type; not shareable; DBM; Contiguous; XNX; a high output address.
        for wrong in [
            page & !2,
            page & !READ,
            page & !MEMORY | 2 << 2,
            page & !INNER_SHAREABLE,
            page | 1 << 51,
            page | 1 << 52,
            page | 1 << 53,
            page | 1 << 48,
        ] {
            assert_eq!(
                Arm64Ipa40::decode(wrong, Level::SIZE_4K),
                Entry::Malformed,
                "{wrong:#x}"
            );
        }
        let block = Arm64Ipa48::make_leaf(&LEAF, Level::SIZE_2M);
        for level in [Level::SIZE_4K, Level::SIZE_1G, Level::SIZE_512G] {
            assert_eq!(Arm64Ipa48::decode(block, level), Entry::Malformed);
        }
        assert_eq!(
            Arm64Ipa48::decode(block | 1 << 16, Level::SIZE_2M),
            Entry::Malformed,
            "nT"
        );
    }

    #[test]
    fn a_40_bit_root_is_two_tables() {
        assert_eq!(Arm64Ipa40::node_size(Level::SIZE_1G), 8192);
        assert_eq!(Arm64Ipa40::index(Gfn((1 << 28) - 1), Level::SIZE_1G), 1023);
        assert_eq!(Arm64Ipa48::node_size(Level::SIZE_512G), 4096);
    }
}
