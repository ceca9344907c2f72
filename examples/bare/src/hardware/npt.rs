//! AMD APM vol. 2, "Nested Paging" and "Page-Translation-Table Entry Fields": an ordinary 4-level
//! x86-64 table, walked as user accesses, with `EFER.NXE` set.
//!
//! Bit 0 is P, 1 is W, 2 is U, 5 Accessed, 6 Dirty, 7 marks a leaf at 2 MiB and 1 GiB and is
//! reserved at 512 GiB, 63 is NX. The address is bits 51:12; here, on a processor with 51 physical
//! address bits, bit 51 is reserved. In a huge leaf bit 12 is PAT.

use slat_arch::Npt4;
use slat_mmu::Pfn;

use super::{Manual, Present, Seen};

const ADDRESS: u64 = 0x0007_ffff_ffff_f000;

impl Manual for Npt4 {
    const LEVELS: u32 = 4;
    const SETS_BITS: bool = true;

    fn register(root: Pfn) -> u64 {
        Self::n_cr3(root)
    }

    fn root(register: u64) -> Option<u64> {
        (register & !ADDRESS == 0).then_some(register)
    }

    fn read(raw: u64, level: u32) -> Seen {
        if raw & 1 == 0 {
            return Seen::Absent;
        }
        let leaf = level == 0 || raw & 1 << 7 != 0;
        if raw & 1 << 51 != 0 || leaf && level > 2 {
            return Seen::Reserved;
        }
        let user = raw & 1 << 2 != 0;
        let address = raw & ADDRESS & if leaf && level > 0 { !(1 << 12) } else { !0 };
        Seen::Present(Present {
            address,
            leaf,
            read: user,
            write: user && raw & 2 != 0,
            execute: user && raw >> 63 == 0,
            accessed: 1 << 5,
            dirty: if leaf { 1 << 6 } else { 0 },
        })
    }
}
