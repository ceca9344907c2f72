//! Intel SDM vol. 3C, "The Extended Page Table Mechanism (EPT)": 4 levels, Accessed and Dirty flags
//! and page-modification logging on.
//!
//! Bits 2:0 are R, W and X; all clear is "not present". W without R is a misconfiguration, and so
//! is, in a leaf, memory type 2, 3 or 7 (bits 5:3), and in a pointer any of bits 6:3. Bit 7 marks a
//! leaf above 4 KiB, at 2 MiB and 1 GiB. Bit 8 is Accessed in every entry, bit 9 Dirty in leaves.
//! Bits 51:12 are the address.

use slat_arch::Ept4;
use slat_mmu::Pfn;

use super::{Manual, Present, Seen};

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Manual for Ept4 {
    const LEVELS: u32 = 4;
    const SETS_BITS: bool = true;
    const LOGS_WRITES: bool = true;

    fn register(root: Pfn) -> u64 {
        Self::eptp(root)
    }

    /// "Extended-Page-Table Pointer (EPTP)": memory type in 2:0, walk length less one in 5:3,
    /// Accessed and Dirty in 6.
    fn root(register: u64) -> Option<u64> {
        (register & 0xfff == 6 | 3 << 3 | 1 << 6).then_some(register & ADDRESS)
    }

    fn read(raw: u64, level: u32) -> Seen {
        if raw & 7 == 0 {
            return Seen::Absent;
        }
        let leaf = level == 0 || raw & 1 << 7 != 0;
        let reserved = if leaf {
            level > 2 || matches!(raw >> 3 & 7, 2 | 3 | 7)
        } else {
            raw >> 3 & 0xf != 0
        };
        if reserved || raw & 3 == 2 {
            return Seen::Reserved;
        }
        Seen::Present(Present {
            address: raw & ADDRESS,
            leaf,
            read: raw & 1 != 0,
            write: raw & 2 != 0,
            execute: raw & 4 != 0,
            accessed: 1 << 8,
            dirty: if leaf { 1 << 9 } else { 0 },
        })
    }
}
