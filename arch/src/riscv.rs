//! RISC-V G-stage page tables: Sv39x4, Sv48x4, Sv57x4.
//!
//! Source: RISC-V privileged specification, "Two-Stage Address Translation" (H extension) and "Sv39". The root has two
//! more index bits than the other levels: 2048 entries in 16 KiB, aligned to 16 KiB.
//!
//! | bit | use |
//! |---|---|
//! | 0 | V |
//! | 1, 2, 3 | R, W, X; all clear in a pointer to a table |
//! | 4 | U, always set in a leaf: G-stage accesses count as user accesses |
//! | 5 | G, never set |
//! | 6, 7 | A, D |
//! | 8, 9 | RSW: MMU-writable, host-writable |
//! | 53:10 | PPN |
//! | 60:54 | reserved |
//! | 62:61 | PBMT (Svpbmt) |
//! | 63 | N (Svnapot), never set |
//!
//! A and D: Svade harts fault where Svadu harts set the bits, and a guest may run on either, so leaves are made with
//! both set and writes are logged by taking W away. Harts without Svvptc may remember that an entry was invalid, so a
//! newly installed one takes a fence on the hart that faulted.

use slat_mmu::{
    AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, Gfn, Leaf, Level, MemoryType, Pfn,
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

const PPN_SHIFT: u32 = 10;
const PPN_BITS: u32 = 44;
const PPN: u64 = ((1 << PPN_BITS) - 1) << PPN_SHIFT;
const PBMT_SHIFT: u32 = 61;
const PBMT: u64 = 3 << PBMT_SHIFT;
const PBMT_PMA: u64 = 0;
const PBMT_NC: u64 = 1;
const PBMT_IO: u64 = 2;

/// V clear, so all other bits are ours.
const FROZEN: u64 = 0x1a0;

const fn bit(on: bool, mask: u64) -> u64 {
    if on { mask } else { 0 }
}

fn decode<F: Format>(raw: u64, level: Level) -> Entry {
    if raw == FROZEN {
        return Entry::Frozen;
    }
    if raw & VALID == 0 {
        return Entry::NonPresent;
    }
    let pfn = Pfn((raw & PPN) >> PPN_SHIFT);
    if raw & (READ | WRITE | EXECUTE) == 0 {
        let is_table = level > Level::SIZE_4K && make_table(pfn) == raw;
        return if is_table {
            Entry::Table { pfn }
        } else {
            Entry::Malformed
        };
    }
    let memory = match (raw & PBMT) >> PBMT_SHIFT {
        PBMT_PMA => MemoryType::Normal,
        PBMT_NC => MemoryType::NonCacheable,
        PBMT_IO => MemoryType::Device,
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
    // A misaligned superpage, W without R, a missing U, G, N and the reserved bits all fail the comparison.
    if level <= F::MAX_LEAF_LEVEL && make_leaf::<F>(&leaf, level) == raw {
        Entry::Leaf(leaf)
    } else {
        Entry::Malformed
    }
}

fn make_leaf<F: Format>(leaf: &Leaf, level: Level) -> u64 {
    let memory = match leaf.memory {
        MemoryType::Normal => PBMT_PMA,
        MemoryType::NonCacheable => PBMT_NC,
        MemoryType::Device => PBMT_IO,
    };
    let frame = F::align_down(Gfn(leaf.pfn.0), level).0;
    (frame << PPN_SHIFT) & PPN
        | VALID
        | READ
        | USER
        | memory << PBMT_SHIFT
        | bit(leaf.writable, WRITE)
        | bit(leaf.executable, EXECUTE)
        | bit(leaf.mmu_writable, MMU_WRITABLE)
        | bit(leaf.host_writable, HOST_WRITABLE)
        | bit(leaf.accessed, ACCESSED)
        | bit(leaf.dirty, DIRTY)
}

const fn make_table(pfn: Pfn) -> u64 {
    (pfn.0 << PPN_SHIFT) & PPN | VALID
}

/// `hgatp` for RV64 (privileged specification, "Hypervisor Guest Address Translation and Protection Register").
const fn hgatp(mode: u64, root: Pfn, vmid: u16) -> u64 {
    mode << 60 | (vmid as u64 & 0x3fff) << 44 | root.0 & ((1 << PPN_BITS) - 1) & !3
}

macro_rules! g_stage {
    ($(#[$doc:meta])* $type:ident, $name:literal, mode $mode:literal, $bits:expr, gpa $gpa_bits:literal, $leaf:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $type;

        impl $type {
            /// The `hgatp` that selects this format, a root table and a VMID (14 bits).
            pub const fn hgatp(root: Pfn, vmid: u16) -> u64 {
                hgatp($mode, root, vmid)
            }
        }

        // SAFETY: the laws hold by construction (decode accepts only what encode gives back) and are tested in
        // `tests/format_laws.rs`. Hardware sets A and D of leaves only.
        #[expect(unsafe_code, reason = "a format vouches for its laws")]
        unsafe impl Format for $type {
            const NAME: &'static str = $name;
            const INDEX_BITS: &'static [u32] = &$bits;
            const MAX_LEAF_LEVEL: Level = Level::$leaf;
            const MAX_GFN: Gfn = Gfn(1 << ($gpa_bits - 12));
            const MAX_PFN: Pfn = Pfn(1 << PPN_BITS);
            const EMPTY: u64 = 0;
            const FROZEN: u64 = FROZEN;
            const AD_POLICY: AdPolicy = AdPolicy::SetAtInstall;
            const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
            const INSTALL_NEEDS_FENCE: bool = true;
            const BREAK_BEFORE_MAKE: bool = false;
            const FLUSH: FlushPrimitive = FlushPrimitive::HfenceGvma;

            fn decode(raw: u64, level: Level) -> Entry {
                decode::<Self>(raw, level)
            }

            fn make_leaf(leaf: &Leaf, level: Level) -> u64 {
                make_leaf::<Self>(leaf, level)
            }

            fn make_table(pfn: Pfn) -> u64 {
                make_table(pfn)
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
    };
}

g_stage! {
    /// Three levels: 41-bit guest physical addresses, leaves up to 1 GiB.
    Sv39x4, "sv39x4", mode 8, [9, 9, 11], gpa 41, SIZE_1G
}

g_stage! {
    /// Four levels: 50-bit guest physical addresses, leaves up to 512 GiB.
    Sv48x4, "sv48x4", mode 9, [9, 9, 9, 11], gpa 50, SIZE_512G
}

g_stage! {
    /// Five levels: 59-bit guest physical addresses, leaves up to 256 TiB.
    Sv57x4, "sv57x4", mode 10, [9, 9, 9, 9, 11], gpa 59, SIZE_256T
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
        assert_eq!(Sv48x4::make_table(Pfn(0xabc)), 0x2a_f001);
        assert_eq!(Sv57x4::hgatp(Pfn(0x80004), 5), 0xa000_5000_0008_0004);
    }

    #[test]
    fn what_the_specification_reserves_is_malformed() {
        let table = VALID | 5 << PPN_SHIFT;
        // A pointer with U, A, D, G or PBMT; a table at the last level; W without R; N; PBMT 3; a reserved bit.
        for extra in [
            USER,
            ACCESSED,
            DIRTY,
            1 << 5,
            1 << PBMT_SHIFT,
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
    fn the_root_is_four_times_as_wide() {
        assert_eq!(Sv39x4::entries(Level::SIZE_1G), 2048);
        assert_eq!(Sv39x4::node_size(Level::SIZE_1G), 16384);
        assert_eq!(Sv48x4::entries(Level::SIZE_1G), 512);
        assert_eq!(Sv48x4::index(Gfn((1 << 38) - 1), Level::SIZE_512G), 2047);
    }
}
