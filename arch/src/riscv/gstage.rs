//! G-stage page-table entries: Sv39x4, Sv48x4, Sv57x4.
//!
//! The root has two more index bits than the other levels: 2048 entries in 16 KiB, aligned to 16
//! KiB. Otherwise the three formats differ in the number of levels alone; each level may hold
//! leaves.
//!
//! | bit | use |
//! |---|---|
//! | 0 | V |
//! | 1, 2, 3 | R, W, X; all clear in a pointer to a table |
//! | 4 | U, always set in a leaf: G-stage accesses count as user accesses |
//! | 5 | G, never set |
//! | 6, 7 | A, D; clear in a pointer |
//! | 8, 9 | RSW: MMU-writable, host-writable |
//! | 53:10 | PPN |
//! | 60:54 | reserved |
//! | 62:61 | PBMT: 0 as the physical memory attributes say; with Svpbmt also 1 NC, 2 IO |
//! | 63 | N (Svnapot), never set |
//!
//! An invalid entry's other bits are free; one such value is `FROZEN`. The two RSW bits are the
//! only free ones of a valid entry (without Svrsw60t59b, which adds bits 60 and 59), and enough: V
//! says that the entry is present, and there are no access-tracked and no MMIO entries.
//!
//! # Accessed and Dirty: one format for Svade and Svadu
//!
//! A hart with Svade faults where A, or D on a write, is clear; one with Svadu enabled sets the
//! bit. A guest may run on either, or move between them, so leaves are made with both set, which no
//! hart changes and none faults on. Ageing clears A; the next use sets it in hardware or faults,
//! and the fault finds the access permitted and sets it.
//!
//! There is no variant of these formats that logs writes by clearing D. It would need Svadu on
//! every hart that the guest may ever run on, and would still gain nothing: no RISC-V extension
//! keeps a log of the addresses whose D it set, so a harvest would have to read every leaf of the
//! slot, where write protection finds the dirty pages in the bitmap that the faults filled. A clean
//! slot of 1 TiB would cost 268 million reads instead of a bitmap scan.
//!
//! # Svnapot
//!
//! N = 1 at 4 KiB with PPN bits 3:0 = 1000b maps 64 KiB by sixteen equal entries. The MMU has no
//! such level, so N is malformed. It would go into `make_leaf` as a property of the leaf ("sixteen
//! neighbours map one block"), set when the sixteen leaves are filled at once, and would have to be
//! taken back from all sixteen before one of them changes: a break-before-make rule within a table,
//! which is why it is not a mere bit.

use slat_mmu::{AdPolicy, DirtyLogPolicy, FlushPrimitive, Level, Pfn};

use super::{Hgatp, HgatpMode};
use crate::{
    encoded::Encoded,
    layout::{Flag, Frame, Layout, Mark, Memory},
};

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const MMU_WRITABLE: u64 = 1 << 8;
const HOST_WRITABLE: u64 = 1 << 9;

/// PBMT: as the physical memory attributes say, NC, IO.
const PBMT: Memory = Memory {
    mask: 3 << 61,
    normal: 0,
    non_cacheable: 1 << 61,
    device: 2 << 61,
};

/// A G-stage format with `LEVELS` levels.
pub type GStage<const LEVELS: usize> = Encoded<GStageLayout<LEVELS>>;

/// Three levels: 41-bit guest physical addresses, leaves up to 1 GiB.
pub type Sv39x4 = GStage<3>;
/// Four levels: 50-bit guest physical addresses, leaves up to 512 GiB.
pub type Sv48x4 = GStage<4>;
/// Five levels: 59-bit guest physical addresses, leaves up to 256 TiB.
pub type Sv57x4 = GStage<5>;

impl<const LEVELS: usize> GStage<LEVELS> {
    /// The mode in `hgatp` that selects this format.
    pub const MODE: HgatpMode = match LEVELS {
        3 => HgatpMode::Sv39x4,
        4 => HgatpMode::Sv48x4,
        5 => HgatpMode::Sv57x4,
        _ => panic!("the G-stage has three to five levels"),
    };

    /// The `hgatp` that selects this format, a root table and a VMID (14 bits).
    pub const fn hgatp(root: Pfn, vmid: u16) -> u64 {
        Hgatp {
            mode: Self::MODE,
            vmid,
            root,
        }
        .encode()
    }
}

/// Where the bits are.
#[derive(Clone, Copy, Debug)]
pub struct GStageLayout<const LEVELS: usize>;

impl<const LEVELS: usize> Layout for GStageLayout<LEVELS> {
    const NAME: &'static str = match GStage::<LEVELS>::MODE {
        HgatpMode::Sv39x4 => "sv39x4",
        HgatpMode::Sv48x4 => "sv48x4",
        HgatpMode::Sv57x4 => "sv57x4",
    };
    const INDEX_BITS: &'static [u32] = match GStage::<LEVELS>::MODE {
        HgatpMode::Sv39x4 => &[9, 9, 11],
        HgatpMode::Sv48x4 => &[9, 9, 9, 11],
        HgatpMode::Sv57x4 => &[9, 9, 9, 9, 11],
    };
    const MAX_LEAF_LEVEL: Level = match GStage::<LEVELS>::MODE {
        HgatpMode::Sv39x4 => Level::SIZE_1G,
        HgatpMode::Sv48x4 => Level::SIZE_512G,
        HgatpMode::Sv57x4 => Level::SIZE_256T,
    };
    const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    const INSTALL_NEEDS_FENCE: bool = true;
    const BREAK_BEFORE_MAKE: bool = false;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("HFENCE.GVMA");
    const EXECUTE_ONLY: bool = true;
    /// Bits 62:61 are reserved on a hart without Svpbmt.
    const OPTIONAL_MEMORY_TYPES: bool = true;

    const FRAME: Frame = Frame::new(10, 44);
    const PRESENT: u64 = VALID;
    const TABLE: u64 = VALID;
    /// Leaves have U and pointers never do.
    const SMALL: Mark = Mark::set(VALID | USER);
    const HUGE: Mark = Self::SMALL;

    const READ: Flag = Flag::set(READ);
    const WRITE: Flag = Flag::set(WRITE);
    const EXECUTE: Flag = Flag::set(EXECUTE);
    const ACCESSED: Flag = Flag::set(ACCESSED);
    const DIRTY: Flag = Flag::set(DIRTY);
    const MMU_WRITABLE: Flag = Flag::set(MMU_WRITABLE);
    const HOST_WRITABLE: Flag = Flag::set(HOST_WRITABLE);
    const MEMORY: Memory = PBMT;
}

#[cfg(test)]
mod tests {
    use slat_mmu::{Entry, Format as _, Gfn, Leaf, MemoryType};

    use super::*;

    /// Privileged specification, "Sv39": figure of the page-table entry, which Sv39x4 to Sv57x4
    /// share.
    #[test]
    fn bits_are_where_the_manual_has_them() {
        let leaf = Leaf {
            pfn: Pfn(0x12345),
            readable: true,
            writable: true,
            executable: true,
            mmu_writable: true,
            host_writable: false,
            accessed: true,
            dirty: true,
            memory: MemoryType::NonCacheable,
        };
        assert_eq!(
            Sv39x4::make_leaf(&leaf, Level::SIZE_4K),
            0x2000_0000_048d_15df
        );
        assert_eq!(
            Sv39x4::make_leaf(&leaf, Level::SIZE_2M),
            0x2000_0000_0488_01df
        );
        let device = Leaf {
            memory: MemoryType::Device,
            ..leaf
        };
        assert_eq!(
            Sv57x4::make_leaf(&device, Level::SIZE_4K),
            0x4000_0000_048d_15df
        );
        assert_eq!(Sv48x4::make_table(Pfn(0xabc)), 0x2a_f001);
        assert_eq!(Sv57x4::hgatp(Pfn(0x80004), 5), 0xa000_5000_0008_0004);
    }

    #[test]
    fn what_the_specification_reserves_is_malformed() {
        let table = VALID | 5 << 10;
        // A pointer with U, A, D, G or PBMT; a table at the last level; W without R; N; PBMT 3; a
        // reserved bit.
        for extra in [
            USER,
            ACCESSED,
            DIRTY,
            1 << 5,
            PBMT.non_cacheable,
            1 << 63,
            1 << 54,
        ] {
            assert_eq!(
                Sv39x4::decode(table | extra, Level::SIZE_2M),
                Entry::Malformed,
                "{extra:#x}"
            );
        }
        assert_eq!(Sv39x4::decode(table, Level::SIZE_4K), Entry::Malformed);
        let leaf = table | READ | USER;
        assert!(matches!(
            Sv39x4::decode(leaf, Level::SIZE_4K),
            Entry::Leaf(_)
        ));
        assert_eq!(
            Sv39x4::decode(leaf, Level::SIZE_2M),
            Entry::Malformed,
            "misaligned superpage"
        );
        for wrong in [
            leaf & !READ | WRITE,
            leaf & !READ | WRITE | EXECUTE,
            leaf & !USER,
            leaf | PBMT.mask,
            leaf | 1 << 63,
            leaf | 1 << 60,
        ] {
            assert_eq!(
                Sv39x4::decode(wrong, Level::SIZE_4K),
                Entry::Malformed,
                "{wrong:#x}"
            );
        }
    }

    #[test]
    fn without_any_permission_a_leaf_is_no_pointer() {
        let execute_only = VALID | USER | EXECUTE | ACCESSED | DIRTY | 5 << 10;
        assert!(matches!(
            Sv39x4::decode(execute_only, Level::SIZE_4K),
            Entry::Leaf(Leaf {
                readable: false,
                executable: true,
                ..
            })
        ));
        // Hardware would follow it but for U, A and D, which are reserved in a pointer and make the
        // access fault.
        let nothing = Sv39x4::with_executable(execute_only, false);
        assert_eq!(Sv39x4::as_table(nothing, Level::SIZE_2M), None);
        assert_eq!(Sv39x4::decode(nothing, Level::SIZE_2M), Entry::Malformed);
    }

    #[test]
    fn the_root_is_four_times_as_wide() {
        assert_eq!(Sv39x4::entries(Level::SIZE_1G), 2048);
        assert_eq!(Sv39x4::node_size(Level::SIZE_1G), 16384);
        assert_eq!(Sv48x4::entries(Level::SIZE_1G), 512);
        assert_eq!(Sv48x4::index(Gfn((1 << 38) - 1), Level::SIZE_512G), 2047);
    }
}
