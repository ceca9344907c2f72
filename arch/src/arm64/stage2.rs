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
//! Arm numbers levels from the root, down to level 3; the MMU's 4 KiB, 2 MiB, 1 GiB and 512 GiB are
//! Arm's 3, 2, 1 and 0, which holds no blocks in this granule. An invalid descriptor's other bits
//! are free; one such value is `FROZEN`.
//!
//! *Concatenated root*: a 40-bit address has one bit too many for three levels. The walk starts at
//! Arm's level 1 with two tables side by side, which is one table of 1024 entries, as the RISC-V
//! root is four.
//!
//! *Permissions*: read and write are separate bits, so write-only is legal for hardware but nothing
//! this MMU writes; execute-only (S2AP 00, XN 00) is legal. XN bit 53 belongs to FEAT_XNX and stays
//! 0.
//!
//! *Memory types* (without FEAT_S2FWB): Normal write-back 1111b, Normal non-cacheable 0101b,
//! Device-nGnRE 0001b. The stronger of both stages' attributes wins.
//!
//! *Accessed and Dirty*: the processor may be one that faults where AF is clear (`VTCR_EL2.HA` =
//! 0), so leaves are made with it set. Dirty is the MMU's own bit; hardware's (DBM) stays off and
//! writes are logged by taking S2AP's write bit away.

use slat_mmu::{AdPolicy, DirtyLogPolicy, FlushPrimitive, Level};

use crate::{
    encoded::Encoded,
    layout::{Flag, Frame, Layout, Mark, Memory},
};

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

const MEMORY: Memory = Memory {
    mask: 0xf << 2,
    normal: 0xf << 2,
    non_cacheable: 5 << 2,
    device: 1 << 2,
};

/// Stage 2 with `LEVELS` levels.
pub type Stage2<const LEVELS: usize> = Encoded<Stage2Layout<LEVELS>>;

/// Three levels with a root of two concatenated tables: 40-bit addresses (`VTCR_EL2`: T0SZ 24,
/// SL0 1).
pub type Arm64Ipa40 = Stage2<3>;
/// Four levels: 48-bit addresses (`VTCR_EL2`: T0SZ 16, SL0 2).
pub type Arm64Ipa48 = Stage2<4>;

/// Where the bits are.
#[derive(Clone, Copy, Debug)]
pub struct Stage2Layout<const LEVELS: usize>;

impl<const LEVELS: usize> Layout for Stage2Layout<LEVELS> {
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
    const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = true;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("TLBI IPAS2E1IS");
    const EXECUTE_ONLY: bool = true;

    const FRAME: Frame = Frame::new(12, 36);
    const PRESENT: u64 = VALID;
    const TABLE: u64 = TABLE;
    const SMALL: Mark = Mark::new(TYPE, PAGE);
    const HUGE: Mark = Mark::new(TYPE, BLOCK);
    const LEAF: u64 = INNER_SHAREABLE;

    const READ: Flag = Flag::set(READ);
    const WRITE: Flag = Flag::set(WRITE);
    const EXECUTE: Flag = Flag::clear(NO_EXECUTE);
    const ACCESSED: Flag = Flag::set(ACCESSED);
    const DIRTY: Flag = Flag::set(DIRTY);
    const MMU_WRITABLE: Flag = Flag::set(MMU_WRITABLE);
    const HOST_WRITABLE: Flag = Flag::set(HOST_WRITABLE);
    const MEMORY: Memory = MEMORY;
}

#[cfg(test)]
mod tests {
    use slat_mmu::{Entry, Format as _, Gfn, Leaf, MemoryType, Pfn};

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
        // Reserved type; write-only; an unused memory type; not shareable; DBM; Contiguous; XNX; a
        // high output address.
        for wrong in [
            page & !2,
            page & !READ,
            page & !MEMORY.mask | 2 << 2,
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
