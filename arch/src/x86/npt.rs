//! AMD nested page tables: four or five levels.
//!
//! Source: AMD APM vol. 2, "Nested Paging" (15.25) and "Page-Translation-Table Entry Fields" (5.4).
//! A nested table is an ordinary x86-64 page table, whose number of levels is that of the host's
//! own paging when the guest is entered (`CR4.LA57`). Our software bits are at the positions that
//! KVM uses:
//!
//! | bit | leaf | pointer to a table |
//! |---|---|---|
//! | 0, 1 | P, W | both set |
//! | 2 | U: always set, because nested walks count as user accesses | set |
//! | 3, 4 | PWT, PCD | 0 |
//! | 5 | Accessed | Accessed, always set |
//! | 6 | Dirty | 0 |
//! | 7 | 1 above 4 KiB; at 4 KiB PAT, 0 | 0 |
//! | 8 | 0 (G, ignored) | 0 |
//! | 9, 10 | software: host-writable, MMU-writable | 0 |
//! | 11 | software: meant as present | the same |
//! | 50:12 | frame, aligned to the level (bit 12 is PAT in a huge leaf, 0) | frame |
//! | 51 | 0; reserved, for MMIO entries | 0 |
//! | 62:52 | 0 | 0 |
//! | 63 | NX | 0 |
//!
//! *Permissions*: a present entry can always be read, so there are no execute-only leaves.
//!
//! *Memory types* are an index into the *host's* PAT, combined with the guest's (15.25.8). Ordinary
//! memory has index 0, WB in every PAT in use. Device memory has index 3, UC. Non-cacheable memory
//! has index 2, UC-: unlike index 1, which is WC only if the host has set it so and otherwise WT,
//! it is never cached, and the guest's PAT may still weaken it to WC.
//!
//! *MMIO* entries are present with bit 51 set (see the [parent module](super)). That bit is
//! reserved, and the access faults with RSV in its error code, only if the processor has fewer than
//! 52 physical address bits (CPUID `8000_0008` EAX 7:0). On one with 52 the MMU's owner must not
//! use MMIO entries; [`Npt::mmio_faults`] says so. Memory encryption (a C-bit) is not supported.
//! Frames are below bit 51 in any case.
//!
//! *Accessed and Dirty* are always hardware's; the walker sets them in nested entries for guest
//! page tables as well. There is no log of dirty addresses as Intel's, so writes are logged by
//! taking W away.
//!
//! *iTLB multihit* is an erratum of Intel processors; no other vendor's are affected, so huge
//! leaves stay executable.

use slat_mmu::{AdPolicy, DirtyLogPolicy, FlushPrimitive, Gfn, Level, Pfn};

use super::{GENERATION_BITS, HUGE, MMU_PRESENT, pack_generation, unpack_generation};
use crate::{
    encoded::Encoded,
    layout::{Flag, Frame, Layout, Mark, Memory},
};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const RESERVED: u64 = 1 << 51;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: Frame = Frame::new(12, 39);

/// WB, UC- and UC.
const MEMORY: Memory = Memory {
    mask: WRITE_THROUGH | CACHE_DISABLE,
    normal: 0,
    non_cacheable: CACHE_DISABLE,
    device: CACHE_DISABLE | WRITE_THROUGH,
};

const MMIO: u64 = PRESENT | RESERVED;
/// The bits that tell an MMIO entry from everything else; all others are its content.
const MMIO_MASK: u64 = PRESENT | WRITE | USER | MMU_PRESENT | RESERVED | NO_EXECUTE;

/// Nested page tables with `LEVELS` levels.
pub type Npt<const LEVELS: usize> = Encoded<NptLayout<LEVELS>>;

/// Four levels: 48-bit guest physical addresses.
pub type Npt4 = Npt<4>;
/// Five levels: 57-bit guest physical addresses.
pub type Npt5 = Npt<5>;

impl<const LEVELS: usize> Npt<LEVELS> {
    /// The `N_CR3` field of the VMCB for a root table (APM vol. 2, appendix B). PCD and PWT are
    /// clear: walks are cached.
    pub const fn n_cr3(root: Pfn) -> u64 {
        FRAME.put(root.0)
    }

    /// Whether MMIO entries fault on a processor with so many physical address bits.
    pub const fn mmio_faults(physical_address_bits: u32) -> bool {
        physical_address_bits < 52
    }

    /// The guest frame in an MMIO entry, modulo 2^39; `None` for any other value.
    pub const fn mmio_gfn(raw: u64) -> Option<Gfn> {
        if raw & MMIO_MASK == MMIO {
            Some(Gfn(FRAME.get(raw)))
        } else {
            None
        }
    }
}

/// Where the bits are.
#[derive(Clone, Copy, Debug)]
pub struct NptLayout<const LEVELS: usize>;

impl<const LEVELS: usize> Layout for NptLayout<LEVELS> {
    const NAME: &'static str = match LEVELS {
        4 => "npt4",
        5 => "npt5",
        _ => panic!("NPT has four or five levels"),
    };
    const INDEX_BITS: &'static [u32] = &[9; LEVELS];
    const MAX_LEAF_LEVEL: Level = Level::SIZE_1G;
    const AD_POLICY: AdPolicy = AdPolicy::Hardware;
    const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
    /// Entries that are not present are never cached (APM vol. 2, "Translation-Lookaside Buffer
    /// (TLB)").
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = false;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("TLB_CONTROL");
    const MMIO_GENERATION_BITS: u32 = GENERATION_BITS;

    const FRAME: Frame = FRAME;
    const PRESENT: u64 = MMU_PRESENT;
    const HARDWARE_PRESENT: u64 = PRESENT;
    const TABLE: u64 = PRESENT | WRITE | USER | ACCESSED | MMU_PRESENT;
    const SMALL: Mark = Mark::set(MMU_PRESENT);
    const HUGE: Mark = Mark::set(MMU_PRESENT | HUGE);
    const LEAF: u64 = PRESENT | USER;

    const READ: Flag = Flag::ALWAYS;
    const WRITE: Flag = Flag::set(WRITE);
    const EXECUTE: Flag = Flag::clear(NO_EXECUTE);
    const ACCESSED: Flag = Flag::set(ACCESSED);
    const DIRTY: Flag = Flag::set(DIRTY);
    const MMU_WRITABLE: Flag = Flag::set(MMU_WRITABLE);
    const HOST_WRITABLE: Flag = Flag::set(HOST_WRITABLE);
    const MEMORY: Memory = MEMORY;

    #[inline(always)]
    fn make_mmio(gfn: Gfn, generation: u32) -> Option<u64> {
        Some(FRAME.put(gfn.0) | pack_generation(generation) | MMIO)
    }

    #[inline(always)]
    fn mmio_generation(raw: u64) -> Option<u32> {
        (raw & MMIO_MASK == MMIO).then_some(unpack_generation(raw))
    }
}

#[cfg(test)]
mod tests {
    use slat_mmu::{Entry, Format as _, Leaf, MemoryType};

    use super::*;

    const LEAF: Leaf = Leaf {
        pfn: Pfn(0x12345),
        readable: true,
        writable: true,
        executable: false,
        mmu_writable: true,
        host_writable: true,
        accessed: true,
        dirty: true,
        memory: MemoryType::Normal,
    };

    /// APM vol. 2, 5.3.3 "4-Kbyte Page Translation" and 5.3.4 "2-Mbyte Page Translation", figures
    /// of PTE and PDE.
    #[test]
    fn bits_are_where_the_manual_has_them() {
        // P W U = 7, A D = 0x60, software 9, 10, 11 = 0xe00, NX.
        assert_eq!(
            Npt4::make_leaf(&LEAF, Level::SIZE_4K),
            0x8000_0000_1234_5e67
        );
        assert_eq!(
            Npt5::make_leaf(&LEAF, Level::SIZE_2M),
            0x8000_0000_1220_0ee7
        );
        let device = Leaf {
            memory: MemoryType::Device,
            ..LEAF
        };
        assert_eq!(Npt4::make_leaf(&device, Level::SIZE_4K) & 0x18, 0x18);
        assert_eq!(Npt4::make_table(Pfn(0xabc)), 0xab_c827);
        assert_eq!(Npt4::n_cr3(Pfn(0xabc)), 0xab_c000);
    }

    #[test]
    fn what_the_manual_reserves_is_malformed() {
        let leaf = Npt4::make_leaf(&LEAF, Level::SIZE_4K);
        // Not a user page; a reserved frame bit; PAT; G; not present; an available bit.
        for raw in [
            leaf & !USER,
            leaf | RESERVED,
            leaf | 1 << 7,
            leaf | 1 << 8,
            leaf & !PRESENT,
            leaf | 1 << 52,
        ] {
            assert_eq!(Npt4::decode(raw, Level::SIZE_4K), Entry::Malformed);
        }
        let huge = Npt4::make_leaf(&LEAF, Level::SIZE_2M);
        assert_eq!(
            Npt4::decode(huge | 1 << 12, Level::SIZE_2M),
            Entry::Malformed,
            "PAT"
        );
        let table = Npt4::make_table(Pfn(5));
        for wrong in [table & !USER, table & !WRITE, table | NO_EXECUTE] {
            assert_eq!(Npt4::decode(wrong, Level::SIZE_2M), Entry::Malformed);
        }
    }

    #[test]
    fn nothing_is_execute_only() {
        let leaf = Leaf {
            readable: false,
            writable: false,
            mmu_writable: false,
            executable: true,
            ..LEAF
        };
        assert_eq!(Npt4::make_leaf(&leaf, Level::SIZE_4K), Npt4::EMPTY);
    }

    /// APM vol. 2, 15.25.6 "Nested versus Guest Page Faults": RSV is reported for a present entry
    /// with a reserved bit.
    #[test]
    fn mmio_entries_are_present_with_a_reserved_bit() {
        let raw = Npt4::make_mmio(Gfn(0xfee00), 0x7_ff01).unwrap();
        assert_eq!(raw, 0x7ff8_0000_fee0_0009);
        assert_eq!(
            Npt4::decode(raw, Level::SIZE_4K),
            Entry::Mmio {
                generation: 0x7_ff01
            }
        );
        assert_eq!(Npt4::mmio_gfn(raw), Some(Gfn(0xfee00)));
        assert_eq!(Npt4::mmio_gfn(0), None);
        assert!(Npt4::mmio_faults(48));
        assert!(!Npt4::mmio_faults(52));
    }
}
