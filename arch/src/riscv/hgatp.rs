//! `hgatp`: the register that selects a G-stage root, a mode and a VMID (RV64).
//!
//! | bits | field |
//! |---|---|
//! | 63:60 | MODE: 0 Bare, 8 Sv39x4, 9 Sv48x4, 10 Sv57x4 |
//! | 59:58 | 0 |
//! | 57:44 | VMID |
//! | 43:0 | PPN of the root; the low two bits are 0, the root is aligned to 16 KiB |
//!
//! The fields are WARL: what a hart does not implement reads back as something else.
//! [`Hgatp::probe`] is the value to write and [`Hgatp::probed_vmid_bits`] judges what was read
//! back.

use slat_mmu::Pfn;

const MODE_SHIFT: u32 = 60;
const VMID_SHIFT: u32 = 44;
const VMID_MASK: u64 = 0x3fff;
const PPN: u64 = (1 << VMID_SHIFT) - 1;

/// MODE of `hgatp`, without Bare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HgatpMode {
    /// Three levels.
    Sv39x4 = 8,
    /// Four levels.
    Sv48x4 = 9,
    /// Five levels.
    Sv57x4 = 10,
}

impl HgatpMode {
    /// The modes in the order in which to probe them: the widest first.
    pub const PROBE_ORDER: [Self; 3] = [Self::Sv57x4, Self::Sv48x4, Self::Sv39x4];

    const fn from_field(field: u64) -> Option<Self> {
        match field {
            8 => Some(Self::Sv39x4),
            9 => Some(Self::Sv48x4),
            10 => Some(Self::Sv57x4),
            _ => None,
        }
    }
}

/// The content of `hgatp` when translation is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hgatp {
    /// The format of the tables.
    pub mode: HgatpMode,
    /// The tag of the guest's translations, 14 bits at most.
    pub vmid: u16,
    /// The root table's first frame, a multiple of 4.
    pub root: Pfn,
}

impl Hgatp {
    /// The most bits a VMID has on RV64.
    pub const MAX_VMID_BITS: u32 = 14;

    /// The register's value. Bits of the VMID and the frame that do not fit are dropped.
    pub const fn encode(self) -> u64 {
        (self.mode as u64) << MODE_SHIFT
            | (self.vmid as u64 & VMID_MASK) << VMID_SHIFT
            | self.root.0 & PPN & !3
    }

    /// The content of a value; `None` for Bare, for a reserved mode, and for a value with a
    /// reserved bit set.
    pub const fn decode(raw: u64) -> Option<Self> {
        let Some(mode) = HgatpMode::from_field(raw >> MODE_SHIFT) else {
            return None;
        };
        let content = Self {
            mode,
            vmid: (raw >> VMID_SHIFT & VMID_MASK) as u16,
            root: Pfn(raw & PPN),
        };
        if content.encode() == raw {
            Some(content)
        } else {
            None
        }
    }

    /// What to write, with no guest's translations in use, to learn whether the hart has `mode` and
    /// how many VMID bits: the mode, all VMID bits, root 0. Restore the old value and fence
    /// everything afterwards.
    pub const fn probe(mode: HgatpMode) -> u64 {
        Self {
            mode,
            vmid: VMID_MASK as u16,
            root: Pfn(0),
        }
        .encode()
    }

    /// What `read_back` says after [`probe`](Self::probe)`(mode)` was written: the number of VMID
    /// bits, or `None` if the hart lacks the mode. Implemented bits are the lowest ones.
    pub const fn probed_vmid_bits(mode: HgatpMode, read_back: u64) -> Option<u32> {
        if read_back >> MODE_SHIFT == mode as u64 {
            Some((read_back >> VMID_SHIFT & VMID_MASK).trailing_ones())
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Privileged specification, "Hypervisor guest address translation and protection register
    /// hgatp when HSXLEN=64".
    #[test]
    fn fields_are_where_the_specification_has_them() {
        let value = Hgatp {
            mode: HgatpMode::Sv57x4,
            vmid: 5,
            root: Pfn(0x80004),
        };
        assert_eq!(value.encode(), 0xa000_5000_0008_0004);
        assert_eq!(Hgatp::decode(0xa000_5000_0008_0004), Some(value));
        let widest = Hgatp {
            mode: HgatpMode::Sv39x4,
            vmid: 0x3fff,
            root: Pfn((1 << 44) - 4),
        };
        assert_eq!(widest.encode(), 0x83ff_ffff_ffff_fffc);
        assert_eq!(Hgatp::decode(widest.encode()), Some(widest));
    }

    #[test]
    fn other_values_are_not_decoded() {
        // Bare; a reserved mode; an unaligned root; reserved bit 58.
        for raw in [0, 11 << 60, 8 << 60 | 1, 8 << 60 | 1 << 58] {
            assert_eq!(Hgatp::decode(raw), None, "{raw:#x}");
        }
    }

    #[test]
    fn a_probe_finds_the_mode_and_the_vmid_bits() {
        let mode = HgatpMode::Sv48x4;
        assert_eq!(Hgatp::probe(mode), 0x93ff_f000_0000_0000);
        assert_eq!(
            Hgatp::probed_vmid_bits(mode, 0x93ff_f000_0000_0000),
            Some(14)
        );
        assert_eq!(
            Hgatp::probed_vmid_bits(mode, 0x9007_f000_0000_0000),
            Some(7)
        );
        assert_eq!(Hgatp::probed_vmid_bits(mode, 9 << 60), Some(0));
        // The mode was not taken.
        assert_eq!(Hgatp::probed_vmid_bits(mode, 0), None);
        assert_eq!(Hgatp::probed_vmid_bits(mode, 8 << 60), None);
    }
}
