//! Small helpers that every format uses.

use slat_mmu::{Format, Leaf, Level, Pfn};

/// `mask` if `on`.
#[inline(always)]
pub(crate) const fn bit(on: bool, mask: u64) -> u64 {
    if on { mask } else { 0 }
}

/// Whether every bit of `mask` is set.
#[inline(always)]
pub(crate) const fn all(raw: u64, mask: u64) -> bool {
    raw & mask == mask
}

/// log2 of the pages that an entry spans where every level below it has 9 index bits, as in all formats here.
#[inline(always)]
pub(crate) const fn shift(level: Level) -> u32 {
    9 * (level.get() as u32 - 1)
}

/// `pfn` without the bits below `level`'s alignment.
#[inline(always)]
pub(crate) const fn align(pfn: Pfn, level: Level) -> u64 {
    pfn.0 >> shift(level) << shift(level)
}

/// `leaf` if the format holds it, otherwise `leaf` without W if it holds that.
#[inline(always)]
pub(crate) fn held<F: Format>(leaf: &Leaf) -> Option<Leaf> {
    if F::holds(leaf) {
        return Some(*leaf);
    }
    let leaf = Leaf {
        writable: false,
        ..*leaf
    };
    F::holds(&leaf).then_some(leaf)
}
