//! The operands of `HFENCE.GVMA` and `HINVAL.GVMA`.
//!
//! `rs1` names a guest physical address and `rs2` a VMID. Register `x0` in their place means *all*,
//! which is not the same as a register that holds 0: that names address 0 or VMID 0. The address is
//! given shifted right by two bits, so that the 59-bit addresses of Sv57x4 and the 34-bit ones of
//! Sv32x4 fit a register.
//!
//! A fence with an address drops every cached translation that came from the *leaf* which maps the
//! address, so a huge leaf takes one. Pointers to tables are dropped only by a fence without an
//! address: after a table was unlinked or replaced, and before its memory is used again, fence the
//! whole VMID ([`HfenceGvma::guest`]) and not the range ("If software modifies a non-leaf PTE …",
//! description of `SFENCE.VMA`). The instructions act on the hart that executes them; other harts
//! are asked by an interrupt, after the new entries were made visible by `FENCE rw, rw`.

use slat_mmu::{Format, GfnRange, Level};

use super::Sv57x4;

/// What one `HFENCE.GVMA` (or `HINVAL.GVMA` between `SFENCE.W.INVAL` and `SFENCE.INVAL.IR`) drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HfenceGvma {
    /// A guest physical address, or `None` for all addresses.
    pub gpa: Option<u64>,
    /// A VMID, or `None` for all VMIDs.
    pub vmid: Option<u16>,
}

impl HfenceGvma {
    /// Everything of every guest.
    pub const ALL: Self = Self {
        gpa: None,
        vmid: None,
    };

    /// Above so many fences a range is dropped with its whole VMID instead, as KVM does.
    pub const MAX_RANGED: u64 = 512;

    /// Everything of one guest, pointers to tables as well.
    pub const fn guest(vmid: u16) -> Self {
        Self {
            gpa: None,
            vmid: Some(vmid),
        }
    }

    /// The value of register `rs1`; `None`: use `x0`.
    pub const fn rs1(self) -> Option<u64> {
        match self.gpa {
            Some(gpa) => Some(gpa >> 2),
            None => None,
        }
    }

    /// The value of register `rs2`; `None`: use `x0`.
    pub const fn rs2(self) -> Option<u64> {
        match self.vmid {
            Some(vmid) => Some(vmid as u64),
            None => None,
        }
    }

    /// The fences for leaves of `level` or coarser that were changed over a range: one a leaf, or
    /// one for the whole VMID if that would be more than [`MAX_RANGED`](Self::MAX_RANGED). None for
    /// an empty range.
    pub fn for_range(range: GfnRange, level: Level, vmid: u16) -> impl Iterator<Item = Self> {
        // All modes have the same spans.
        let span = Sv57x4::span(level);
        let first = Sv57x4::align_down(range.start, level).0;
        let fences = if range.is_empty() {
            0
        } else {
            (range.end.0 - first).div_ceil(span)
        };
        let ranged = fences <= Self::MAX_RANGED;
        (0..if ranged { fences } else { 1 }).map(move |i| Self {
            gpa: ranged.then(|| (first + i * span) << 12),
            vmid: Some(vmid),
        })
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use slat_mmu::Gfn;

    use super::*;

    fn fences(start: u64, pages: u64, level: Level) -> Vec<(Option<u64>, Option<u64>)> {
        HfenceGvma::for_range(GfnRange::new(Gfn(start), pages), level, 7)
            .map(|fence| (fence.rs1(), fence.rs2()))
            .collect()
    }

    /// Privileged specification, "Hypervisor Memory-Management Fence Instructions".
    #[test]
    fn the_address_is_shifted_right_by_two() {
        assert_eq!(
            fences(0x80000, 2, Level::SIZE_4K),
            [(Some(0x2000_0000), Some(7)), (Some(0x2000_0400), Some(7))]
        );
        let all = HfenceGvma::ALL;
        assert_eq!((all.rs1(), all.rs2()), (None, None));
        let guest = HfenceGvma::guest(0);
        assert_eq!((guest.rs1(), guest.rs2()), (None, Some(0)));
    }

    #[test]
    fn one_fence_covers_a_huge_leaf() {
        assert_eq!(
            fences(0x205, 1, Level::SIZE_2M),
            [(Some(0x8_0000), Some(7))]
        );
        assert_eq!(fences(0x1ff, 2, Level::SIZE_2M).len(), 2);
        assert_eq!(fences(5, 0, Level::SIZE_2M), []);
    }

    #[test]
    fn a_long_range_costs_one_fence() {
        assert_eq!(fences(0, 512, Level::SIZE_4K).len(), 512);
        assert_eq!(fences(0, 513, Level::SIZE_4K), [(None, Some(7))]);
    }
}
