//! `VTTBR_EL2`: the root of a guest's stage-2 tables and its VMID.
//!
//! | bits | field |
//! |---|---|
//! | 63:48 | VMID; 55:48 where `VTCR_EL2.VS` is 0 |
//! | 47:1 | BADDR, aligned to the size of the root |
//! | 0 | CnP: the processor may share translations with others of the same VMID; 0 here |

use slat_mmu::Pfn;

/// How wide a VMID is (`ID_AA64MMFR1_EL1.VMIDBits`, `VTCR_EL2.VS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmidBits {
    /// `VTCR_EL2.VS` = 0.
    Eight,
    /// `VTCR_EL2.VS` = 1, needs FEAT_VMID16.
    Sixteen,
}

/// The register's value. Bits of the VMID and of the root that do not fit are dropped.
pub const fn vttbr(root: Pfn, vmid: u16, bits: VmidBits) -> u64 {
    let vmid = match bits {
        VmidBits::Eight => vmid & 0xff,
        VmidBits::Sixteen => vmid,
    };
    (vmid as u64) << 48 | root.hpa() & 0xffff_ffff_f000
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arm ARM, "VTTBR_EL2, Virtualization Translation Table Base Register".
    #[test]
    fn fields_are_where_the_manual_has_them() {
        let root = Pfn(0x4_0000);
        assert_eq!(vttbr(root, 0x1ff, VmidBits::Eight), 0x00ff_0000_4000_0000);
        assert_eq!(vttbr(root, 0x1ff, VmidBits::Sixteen), 0x01ff_0000_4000_0000);
    }
}
