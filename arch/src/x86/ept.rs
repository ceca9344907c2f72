//! Intel extended page tables: four or five levels, with Accessed and Dirty kept by hardware or by
//! faults.
//!
//! Source: Intel SDM vol. 3C, "The Extended Page Table Mechanism (EPT)": the tables of entry
//! formats, "EPT Misconfigurations", "Accessed and Dirty Flags for EPT". Bits that the SDM calls
//! ignored, or that belong to features left off (57: guest-paging verification, 58: paging-write),
//! hold our software bits, at the positions that KVM uses:
//!
//! | bit | leaf | pointer to a table |
//! |---|---|---|
//! | 0, 1, 2 | R, W, X | all set |
//! | 5:3 | memory type | 0, reserved |
//! | 6 | ignore PAT | 0, reserved |
//! | 7 | 1 above 4 KiB | 0 |
//! | 8 | Accessed | Accessed, always set |
//! | 9 | Dirty | 0 |
//! | 10 | 0 (user X, mode-based execute control is off) | 0 |
//! | 11 | software: meant as present | the same |
//! | 51:12 | frame, aligned to the level | frame |
//! | 54, 56 | software: R and X of an access-tracked leaf | 0 |
//! | 57, 58 | software: host-writable, MMU-writable | 0 |
//! | 63 | suppress #VE | 0 |
//!
//! *Absent.* An empty entry is not 0 but bit 63 alone, so that a guest with #VE enabled gets an EPT
//! violation and not an exception of its own.
//!
//! *Legal permissions* are R, RW, RX, RWX and X. W without R is a misconfiguration (exit 49); X
//! alone is one too on a processor without `IA32_VMX_EPT_VPID_CAP` bit 0. The MMU makes every leaf
//! readable, so its owner need not check that bit; execute-only leaves are understood where tables
//! of another's making are read.
//!
//! *Memory types.* Ordinary memory is WB with the guest's PAT ignored: the host, and a migration,
//! read the page through a write-back mapping, and must see what the guest wrote whatever its PAT
//! says. Non-cacheable memory is WC and device memory UC, both combined with the guest's PAT, so
//! that a guest can still choose WC for a frame buffer. WT and WP are legal for hardware but
//! nothing this MMU writes; 2, 3 and 7 are reserved. All five are malformed here.
//!
//! *MMIO* entries hold 110b (W and X without R) in bits 2:0, a misconfiguration on every processor
//! (see the [parent module](super)). The frame is stored inverted: on processors with L1 terminal
//! fault a walk that ends in an illegal entry goes on speculatively with the address in it, and an
//! inverted guest frame names the top of the physical address space, where no RAM is. Of a 57-bit
//! guest address the lowest 52 are kept; no processor has more physical address bits.
//!
//! *Accessed and Dirty.* With hardware's (`ept4`, `ept5`, EPTP bit 6 set) bits 8 and 9 are the
//! processor's; a table is linked with Accessed set, so hardware never changes a pointer. Without
//! (`ept4-noad`, `ept5-noad`) the processor ignores both bits and they are the MMU's own. A leaf
//! that was not accessed is then *access-tracked*: R, W and X are clear, R and X are saved 54 bits
//! up, and W is not saved, because a write must be seen anyway.
//!
//! *The dirty log* of `ept4` and `ept5` is page-modification logging: a page whose write is to be
//! seen loses Dirty and keeps W, so the write does not fault. The MMU never looks for Dirty bits;
//! what tells it is the log that the processor writes when it sets Dirty. So its owner enables PML
//! ("enable PML" in the secondary controls, SDM vol. 3C, "Page-Modification Logging") for every
//! vCPU while a slot logs, and drains each vCPU's log into
//! [`mark_dirty`](slat_mmu::AddressSpace::mark_dirty) when it is full and before each harvest, with
//! the vCPU out of the guest before the last. **Without PML, or with it off, the dirty log of these
//! formats loses writes**: use `ept4-noad` or `ept5-noad`, which log by write protection and need
//! nothing of the processor.
//!
//! *iTLB multihit*: most Intel processors without `PSCHANGE_MC_NO` in `IA32_ARCH_CAPABILITIES`
//! raise a machine check if an instruction fetch finds a page in the instruction TLB in two sizes,
//! which a guest can bring about where its memory is mapped by huge executable leaves; hence
//! [`Format::NX_HUGE_PAGES`].

use slat_mmu::{AdPolicy, DirtyLogPolicy, FlushPrimitive, Gfn, Level, Pfn};

use super::{GENERATION_BITS, HUGE, MMU_PRESENT, pack_generation, unpack_generation};
use crate::{
    encoded::Encoded,
    layout::{Flag, Frame, Layout, Mark, Memory},
};

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const PERMISSIONS: u64 = READ | WRITE | EXECUTE;
const IGNORE_PAT: u64 = 1 << 6;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const HOST_WRITABLE: u64 = 1 << 57;
const MMU_WRITABLE: u64 = 1 << 58;
const SUPPRESS_VE: u64 = 1 << 63;
const FRAME: Frame = Frame::new(12, 40);

/// Memory type and ignore-PAT: bits 6:3. UC, WC and WB are 0, 1 and 6.
const MEMORY: Memory = Memory {
    mask: 0xf << 3,
    normal: 6 << 3 | IGNORE_PAT,
    non_cacheable: 1 << 3,
    device: 0,
};

/// W and X without R.
const MMIO: u64 = WRITE | EXECUTE;
/// The bits that tell an MMIO entry from everything else; all others are its content.
const MMIO_MASK: u64 = PERMISSIONS | MMU_PRESENT | SUPPRESS_VE;

/// EPT with `LEVELS` levels; `AD`: hardware keeps Accessed and Dirty.
pub type Ept<const LEVELS: usize, const AD: bool> = Encoded<EptLayout<LEVELS, AD>>;

/// Four levels: 48-bit guest physical addresses. Its dirty log needs PML (see the head of this
/// file, and [`DirtyLogPolicy::DirtyBit`]); without, [`Ept4NoAd`].
pub type Ept4 = Ept<4, true>;
/// Five levels: 57-bit guest physical addresses. Its dirty log needs PML, as [`Ept4`]'s does;
/// without, [`Ept5NoAd`].
pub type Ept5 = Ept<5, true>;
/// Four levels on a processor without Accessed and Dirty flags for EPT, or with them left off.
pub type Ept4NoAd = Ept<4, false>;
/// Five levels with Accessed and Dirty flags left off.
pub type Ept5NoAd = Ept<5, false>;

impl<const LEVELS: usize, const AD: bool> Ept<LEVELS, AD> {
    /// The EPTP for a root table (SDM vol. 3C, "Extended-Page-Table Pointer"): write-back, the
    /// number of levels less one in bits 5:3, and bit 6 if hardware keeps Accessed and Dirty.
    pub const fn eptp(root: Pfn) -> u64 {
        FRAME.put(root.0) | (AD as u64) << 6 | (LEVELS as u64 - 1) << 3 | 6
    }

    /// The guest frame in an MMIO entry, modulo 2^40; `None` for any other value.
    pub const fn mmio_gfn(raw: u64) -> Option<Gfn> {
        if raw & MMIO_MASK == MMIO {
            Some(Gfn(FRAME.get(!raw)))
        } else {
            None
        }
    }
}

/// Where the bits are.
#[derive(Clone, Copy, Debug)]
pub struct EptLayout<const LEVELS: usize, const AD: bool>;

impl<const LEVELS: usize, const AD: bool> Layout for EptLayout<LEVELS, AD> {
    const NAME: &'static str = match (LEVELS, AD) {
        (4, true) => "ept4",
        (5, true) => "ept5",
        (4, false) => "ept4-noad",
        (5, false) => "ept5-noad",
        _ => panic!("EPT has four or five levels"),
    };
    const INDEX_BITS: &'static [u32] = &[9; LEVELS];
    const MAX_LEAF_LEVEL: Level = Level::SIZE_1G;
    const AD_POLICY: AdPolicy = if AD {
        AdPolicy::Hardware
    } else {
        AdPolicy::AccessTracking
    };
    const DIRTY_LOG: DirtyLogPolicy = if AD {
        DirtyLogPolicy::DirtyBit
    } else {
        DirtyLogPolicy::WriteProtect
    };
    /// Entries that are not present are never cached (SDM vol. 3C, "Information That May Be
    /// Cached").
    const INSTALL_NEEDS_FENCE: bool = false;
    const BREAK_BEFORE_MAKE: bool = false;
    const FLUSH: FlushPrimitive = FlushPrimitive::new("INVEPT");
    const MMIO_GENERATION_BITS: u32 = GENERATION_BITS;
    const EXECUTE_ONLY: bool = true;
    const NX_HUGE_PAGES: bool = true;
    const EMPTY: u64 = SUPPRESS_VE;

    const FRAME: Frame = FRAME;
    const PRESENT: u64 = MMU_PRESENT;
    const HARDWARE_PRESENT: u64 = PERMISSIONS;
    const TABLE: u64 = PERMISSIONS | ACCESSED | MMU_PRESENT;
    const SMALL: Mark = Mark::set(MMU_PRESENT);
    const HUGE: Mark = Mark::set(MMU_PRESENT | HUGE);
    const LEAF: u64 = SUPPRESS_VE;

    const READ: Flag = Flag::set(READ);
    const WRITE: Flag = Flag::set(WRITE);
    const EXECUTE: Flag = Flag::set(EXECUTE);
    const ACCESSED: Flag = Flag::set(ACCESSED);
    const DIRTY: Flag = Flag::set(DIRTY);
    const MMU_WRITABLE: Flag = Flag::set(MMU_WRITABLE);
    const HOST_WRITABLE: Flag = Flag::set(HOST_WRITABLE);
    const MEMORY: Memory = MEMORY;
    const SAVED_SHIFT: u32 = 54;

    #[inline(always)]
    fn make_mmio(gfn: Gfn, generation: u32) -> Option<u64> {
        Some(!FRAME.put(gfn.0) & FRAME.mask() | pack_generation(generation) | MMIO)
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
        executable: true,
        mmu_writable: true,
        host_writable: true,
        accessed: true,
        dirty: true,
        memory: MemoryType::Normal,
    };

    /// SDM vol. 3C, "Format of an EPT Page-Table Entry that Maps a 4-KByte Page" and its 2-MByte
    /// sister.
    #[test]
    fn bits_are_where_the_manual_has_them() {
        // RWX = 7, WB = 6 << 3 and ignore PAT = 0x70, A and D = 0x300, software 0x800, 57, 58,
        // suppress #VE.
        assert_eq!(
            Ept4::make_leaf(&LEAF, Level::SIZE_4K),
            0x8600_0000_1234_5b77
        );
        assert_eq!(
            Ept5::make_leaf(&LEAF, Level::SIZE_2M),
            0x8600_0000_1220_0bf7
        );
        assert_eq!(
            Ept4::make_leaf(&LEAF, Level::SIZE_1G),
            0x8600_0000_0000_0bf7
        );
        let device = Leaf {
            memory: MemoryType::Device,
            ..LEAF
        };
        assert_eq!(Ept4::make_leaf(&device, Level::SIZE_4K) & 0x78, 0);
        let write_combining = Leaf {
            memory: MemoryType::NonCacheable,
            ..LEAF
        };
        assert_eq!(
            Ept4::make_leaf(&write_combining, Level::SIZE_4K) & 0x78,
            1 << 3
        );
        assert_eq!(Ept4::make_table(Pfn(0xabc)), 0xab_c907);
    }

    /// SDM vol. 3C, "Format of Extended-Page-Table Pointer".
    #[test]
    fn the_eptp_names_levels_and_flags() {
        assert_eq!(Ept4::eptp(Pfn(0xabc)), 0xab_c05e);
        assert_eq!(Ept5::eptp(Pfn(0xabc)), 0xab_c066);
        assert_eq!(Ept4NoAd::eptp(Pfn(0xabc)), 0xab_c01e);
        assert_eq!(Ept5NoAd::eptp(Pfn(0xabc)), 0xab_c026);
    }

    /// SDM vol. 3C, "EPT Misconfigurations".
    #[test]
    fn misconfigurations_are_malformed() {
        let level = Level::SIZE_4K;
        let leaf = Ept4::make_leaf(&LEAF, level);
        let (wt, wp) = (4 << 3, 5 << 3);
        for raw in [
            leaf & !READ,
            leaf & !(READ | EXECUTE),
            leaf & !MEMORY.mask | 2 << 3,
            leaf & !MEMORY.mask | 3 << 3,
            leaf & !MEMORY.mask | 7 << 3,
            leaf & !MEMORY.mask | wt,
            leaf & !MEMORY.mask | wp,
            leaf & !PERMISSIONS,
            leaf | HUGE,
            leaf & !MMU_PRESENT,
        ] {
            assert_eq!(Ept4::decode(raw, level), Entry::Malformed, "{raw:#x}");
        }
        let huge = Ept4::make_leaf(&LEAF, Level::SIZE_2M);
        for raw in [huge | 1 << 12, huge | 1 << 20] {
            assert_eq!(Ept4::decode(raw, Level::SIZE_2M), Entry::Malformed);
        }
        assert_eq!(Ept4::decode(huge, Level::SIZE_512G), Entry::Malformed);
        let table = Ept4::make_table(Pfn(5));
        for bit in 3..8 {
            let raw = table | 1 << bit;
            assert_eq!(Ept4::decode(raw, Level::SIZE_512G), Entry::Malformed);
        }
    }

    #[test]
    fn execute_only_is_a_leaf() {
        let leaf = Leaf {
            readable: false,
            writable: false,
            mmu_writable: false,
            ..LEAF
        };
        let raw = Ept4::make_leaf(&leaf, Level::SIZE_4K);
        assert_eq!(raw & PERMISSIONS, EXECUTE);
        assert_eq!(Ept4::decode(raw, Level::SIZE_4K), Entry::Leaf(leaf));
    }

    #[test]
    fn mmio_entries_are_misconfigured_and_inverted() {
        let raw = Ept4::make_mmio(Gfn(0xfee00), 0x7_ff01).unwrap();
        assert_eq!(raw, 0x7fff_ffff_011f_f00e);
        assert_eq!(
            Ept4::decode(raw, Level::SIZE_4K),
            Entry::Mmio {
                generation: 0x7_ff01
            }
        );
        assert_eq!(Ept4::mmio_gfn(raw), Some(Gfn(0xfee00)));
        assert_eq!(Ept4::mmio_gfn(Ept4::EMPTY), None);
        assert_eq!(Ept4::mmio_gfn(Ept4::make_table(Pfn(1))), None);
    }

    #[test]
    fn an_unused_leaf_keeps_its_permissions_out_of_reach() {
        let leaf = Ept4NoAd::make_leaf(&LEAF, Level::SIZE_4K);
        let tracked = Ept4NoAd::with_accessed(leaf, false);
        assert_eq!(leaf, 0x8600_0000_1234_5b77);
        assert_eq!(tracked, 0x8740_0000_1234_5a70, "R in bit 54, X in bit 56");
        let back = Ept4NoAd::with_accessed(tracked, true);
        assert_eq!(back, leaf & !WRITE, "W is not saved");
        assert_eq!(Ept4NoAd::with_writable(tracked, true), leaf);
        let no_execute = Ept4NoAd::with_executable(tracked, false);
        assert_eq!(
            Ept4NoAd::with_accessed(no_execute, true) & PERMISSIONS,
            READ
        );
        // With hardware flags the same value is not one of ours.
        assert_eq!(Ept4::decode(tracked, Level::SIZE_4K), Entry::Malformed);
    }
}
