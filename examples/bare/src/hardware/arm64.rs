//! Arm ARM, "VMSAv8-64 translation table format descriptors", stage 2, 4 KiB granule, 48-bit
//! addresses, for a processor that faults where the access flag is clear (`VTCR_EL2.HA` = 0).
//!
//! Bit 0 is valid. Bit 1 tells a table (1) from a block (0), and a page (1) from what is reserved
//! (0) at the last level. Blocks are 2 MiB and 1 GiB. S2AP is bits 7:6 (write, read), AF bit 10,
//! the address 47:12, XN 54:53 (00 allows fetches). What DBM (51) would do with writes is off.

use slat_arch::{
    Arm64Ipa48,
    arm64::{VmidBits, vttbr},
};
use slat_mmu::Pfn;

use super::{Manual, Present, Seen};

const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const VMID: u16 = 7;

impl Manual for Arm64Ipa48 {
    const LEVELS: u32 = 4;
    const SETS_BITS: bool = false;

    fn register(root: Pfn) -> u64 {
        vttbr(root, VMID, VmidBits::Sixteen)
    }

    /// `VTTBR_EL2`: VMID in 63:48, BADDR in 47:1.
    fn root(register: u64) -> Option<u64> {
        (register & 0xfff == 0).then_some(register & ADDRESS)
    }

    fn read(raw: u64, level: u32) -> Seen {
        if raw & 1 == 0 {
            return Seen::Absent;
        }
        let leaf = level == 0 || raw & 2 == 0;
        if leaf && (level > 2 || level == 0 && raw & 2 == 0) {
            return Seen::Reserved;
        }
        let xn = raw >> 53 & 3;
        Seen::Present(Present {
            address: raw & ADDRESS,
            leaf,
            read: !leaf || raw & 1 << 6 != 0,
            write: !leaf || raw & 1 << 7 != 0,
            execute: !leaf || xn == 0,
            accessed: if leaf { 1 << 10 } else { 0 },
            dirty: 0,
        })
    }
}
