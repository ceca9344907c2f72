//! Small helpers that every format uses.

use slat_mmu::{Format, Gfn, Leaf, Level, Pfn};

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

/// The bits of `frame` in an entry whose other bits are exactly `table`. Taken out by subtraction, which the compiler folds into
/// the next address.
#[inline(always)]
pub(crate) const fn pointer(raw: u64, frame: u64, table: u64) -> Option<u64> {
    if raw & !frame == table {
        Some(raw.wrapping_sub(table))
    } else {
        None
    }
}

/// log2 of the pages that an entry spans where every level below it has 9 index bits, as in all formats here.
#[inline(always)]
pub(crate) const fn shift(level: Level) -> u32 {
    9 * (level.get() as u32 - 1)
}

/// The position of `gfn`'s entry in its table, of which the root may have `root_bits` index bits and others have 9.
#[inline(always)]
pub(crate) fn index<F: Format>(gfn: Gfn, level: Level, root_bits: u32) -> usize {
    let bits = if level == F::ROOT_LEVEL { root_bits } else { 9 };
    (gfn.0 >> shift(level)) as usize & ((1 << bits) - 1)
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
