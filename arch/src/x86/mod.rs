//! x86-64: Intel's extended page tables and AMD's nested page tables.
//!
//! Both have tables of 512 entries of 8 bytes, a 4 KiB frame number from bit 12 on, leaves of 4
//! KiB, 2 MiB and 1 GiB marked by bit 7 above 4 KiB, and four or five levels. Neither processor
//! caches entries that are not present, and both allow a present entry to be replaced by another in
//! one store.
//!
//! # The dirty log
//!
//! `npt4`, `npt5`, `ept4-noad` and `ept5-noad` log by write protection. `ept4` and `ept5` log by
//! Dirty bits and lose writes unless the MMU's owner has page-modification logging (PML) on for
//! every vCPU while a slot logs, and drains the logs into
//! [`mark_dirty`](slat_mmu::AddressSpace::mark_dirty) before each harvest.
//!
//! # MMIO entries
//!
//! An access to a guest frame without a slot is the device model's. To learn that without a look at
//! the slots, the MMU leaves an entry that always faults in a recognisable way — a
//! *misconfiguration* on Intel, a *reserved bit* on AMD — and holds the slots' generation and the
//! guest frame:
//!
//! | bits | content |
//! |---|---|
//! | 10:3 | generation 7:0 |
//! | 51:12 (AMD 50:12) | guest frame |
//! | 62:52 | generation 18:8 |
//!
//! Bit 11, which every entry that the MMU means as present has, is clear, so no shortcut takes an
//! MMIO entry for a leaf.

mod ept;
mod npt;
mod violation;

pub use self::{
    ept::{Ept, Ept4, Ept4NoAd, Ept5, Ept5NoAd},
    npt::{Npt, Npt4, Npt5},
    violation::EptViolation,
};

/// Ignored by hardware everywhere: the MMU means this entry as present.
const MMU_PRESENT: u64 = 1 << 11;
/// Marks a leaf above 4 KiB.
const HUGE: u64 = 1 << 7;

/// Bits of a generation in an MMIO entry.
const GENERATION_BITS: u32 = 19;

/// A generation's bits in an MMIO entry.
const fn pack_generation(generation: u32) -> u64 {
    let generation = generation as u64;
    (generation & 0xff) << 3 | (generation >> 8 & 0x7ff) << 52
}

/// The generation in an MMIO entry.
const fn unpack_generation(raw: u64) -> u32 {
    ((raw >> 3 & 0xff) | (raw >> 52 & 0x7ff) << 8) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_has_19_bits() {
        assert_eq!(
            pack_generation(u32::MAX),
            0x7ff0_0000_0000_07f8,
            "bits 3 to 10 and 52 to 62"
        );
        for generation in [0, 1, 0xff, 0x100, 0x5a5a5, (1 << 19) - 1] {
            assert_eq!(unpack_generation(pack_generation(generation)), generation);
        }
    }
}
