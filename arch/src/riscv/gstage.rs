//! G-stage page-table entries: Sv39x4, Sv48x4, Sv57x4.
//!
//! The root has two more index bits than the other levels: 2048 entries in 16 KiB, aligned to 16 KiB. Otherwise the three
//! formats differ in the number of levels alone; each level may hold leaves.
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
//! | 62:61 | PBMT (Svpbmt): 0 as the physical memory attributes say, 1 NC, 2 IO; 0 on a hart without it |
//! | 63 | N (Svnapot), never set |
//!
//! An invalid entry's other bits are free; one such value is `FROZEN`. The two RSW bits are the only free ones of a valid
//! entry (without Svrsw60t59b, which adds bits 60 and 59), and enough: V says that the entry is present, and there are no
//! access-tracked and no MMIO entries.
//!
//! # Accessed and Dirty: one format for Svade and Svadu
//!
//! A hart with Svade faults where A, or D on a write, is clear; one with Svadu enabled sets the bit. A guest may run on either,
//! or move between them, so leaves are made with both set, which no hart changes and none faults on. Ageing clears A; the next
//! use sets it in hardware or faults, and the fault finds the access permitted and sets it.
//!
//! There is no variant of these formats that logs writes by clearing D. It would need Svadu on every hart that the guest may
//! ever run on, and would still gain nothing: no RISC-V extension keeps a log of the addresses whose D it set, so a
//! harvest would have to read every leaf of the slot, where write protection finds the dirty pages in the bitmap that the
//! faults filled. A clean slot of 1 TiB would cost 268 million reads instead of a bitmap scan.
//!
//! # Svnapot
//!
//! N = 1 at 4 KiB with PPN bits 3:0 = 1000b maps 64 KiB by sixteen equal entries. The MMU has no such
//! level, so N is malformed. It would go into `make_leaf` as a property of the leaf ("sixteen neighbours map one block"), set when
//! the sixteen leaves are filled at once, and would have to be taken back from all sixteen before one of them changes: a
//! break-before-make rule within a table, which is why it is not a mere bit.

use slat_mmu::{
    AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, Gfn, Leaf, Level, MemoryType, Pfn,
};

use super::{Hgatp, HgatpMode};
use crate::bits::{align, all, bit, held, index, shift};

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const MMU_WRITABLE: u64 = 1 << 8;
const HOST_WRITABLE: u64 = 1 << 9;

const PPN_SHIFT: u32 = 10;
const PPN_BITS: u32 = 44;
const PPN: u64 = ((1 << PPN_BITS) - 1) << PPN_SHIFT;
const PBMT: u64 = 3 << 61;
const PBMT_PMA: u64 = 0;
const PBMT_NC: u64 = 1 << 61;
const PBMT_IO: u64 = 2 << 61;

/// A G-stage format with `LEVELS` levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GStage<const LEVELS: usize>;

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

// SAFETY: the laws hold by construction (decode accepts only what encode gives back) and are tested in
// `tests/format_laws.rs`. Hardware sets A and D of leaves only.
#[expect(unsafe_code, reason = "a format vouches for its laws")]
unsafe impl<const LEVELS: usize> Format for GStage<LEVELS> {
    const NAME: &'static str = match Self::MODE {
        HgatpMode::Sv39x4 => "sv39x4",
        HgatpMode::Sv48x4 => "sv48x4",
        HgatpMode::Sv57x4 => "sv57x4",
    };
    const INDEX_BITS: &'static [u32] = match Self::MODE {
        HgatpMode::Sv39x4 => &[9, 9, 11],
        HgatpMode::Sv48x4 => &[9, 9, 9, 11],
        HgatpMode::Sv57x4 => &[9, 9, 9, 9, 11],
    };
    const MAX_LEAF_LEVEL: Level = Self::ROOT_LEVEL;
    const MAX_GFN: Gfn = Gfn(1 << (9 * LEVELS + 2));
    const MAX_PFN: Pfn = Pfn(1 << PPN_BITS);
    const EMPTY: u64 = 0;
    /// V clear, so all other bits are ours.
    const FROZEN: u64 = 0x1a0;
    const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    const INSTALL_NEEDS_FENCE: bool = true;
    const BREAK_BEFORE_MAKE: bool = false;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("HFENCE.GVMA");
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
        // A misaligned superpage, W without R, a missing U, G, N and the reserved bits all fail the comparison.
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
        let memory = match raw & PBMT {
            PBMT_PMA => MemoryType::Normal,
            PBMT_NC => MemoryType::NonCacheable,
            PBMT_IO => MemoryType::Device,
            _ => MemoryType::Normal,
        };
        Leaf {
            pfn: Pfn((raw & PPN) >> PPN_SHIFT),
            readable: raw & READ != 0,
            writable: raw & WRITE != 0,
            executable: raw & EXECUTE != 0,
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
            MemoryType::Normal => PBMT_PMA,
            MemoryType::NonCacheable => PBMT_NC,
            MemoryType::Device => PBMT_IO,
        };
        (align(leaf.pfn, level) << PPN_SHIFT) & PPN
            | VALID
            | USER
            | memory
            | bit(leaf.readable, READ)
            | bit(leaf.writable, WRITE)
            | bit(leaf.executable, EXECUTE)
            | bit(leaf.mmu_writable, MMU_WRITABLE)
            | bit(leaf.host_writable, HOST_WRITABLE)
            | bit(leaf.accessed, ACCESSED)
            | bit(leaf.dirty, DIRTY)
    }

    #[inline(always)]
    fn make_table(pfn: Pfn) -> u64 {
        (pfn.0 << PPN_SHIFT) & PPN | VALID
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
        raw & !EXECUTE | bit(on, EXECUTE)
    }

    #[inline(always)]
    fn shift(level: Level) -> u32 {
        shift(level)
    }

    #[inline(always)]
    fn index(gfn: Gfn, level: Level) -> usize {
        index::<Self>(gfn, level, 11)
    }

    #[inline(always)]
    fn as_table(raw: u64, level: Level) -> Option<Pfn> {
        (raw & !PPN == VALID && level > Level::SIZE_4K).then_some(Pfn((raw & PPN) >> PPN_SHIFT))
    }

    /// Leaves have U and pointers never do.
    #[inline(always)]
    fn is_leaf(raw: u64, _: Level) -> bool {
        all(raw, VALID | USER)
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
        1 << (shift(level) + PPN_SHIFT)
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

    /// Privileged specification, "Sv39": figure of the page-table entry, which Sv39x4 to Sv57x4 share.
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
        let table = VALID | 5 << PPN_SHIFT;
        // A pointer with U, A, D, G or PBMT; a table at the last level; W without R; N; PBMT 3; a reserved bit.
        for extra in [USER, ACCESSED, DIRTY, 1 << 5, PBMT_NC, 1 << 63, 1 << 54] {
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
            leaf | PBMT,
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
        let execute_only = VALID | USER | EXECUTE | ACCESSED | DIRTY | 5 << PPN_SHIFT;
        assert!(matches!(
            Sv39x4::decode(execute_only, Level::SIZE_4K),
            Entry::Leaf(Leaf {
                readable: false,
                executable: true,
                ..
            })
        ));
        // Hardware would follow it but for U, A and D, which are reserved in a pointer and make the access fault.
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
