//! All leaves over a range, as an iterator over bounded batches.
//!
//! *Locking*: none, and nothing is held between batches (see `leaves`).

use alloc::vec::{self, Vec};

use super::{leaves::MappedLeaf, stage::SecondStage};
use crate::addr::GfnRange;

/// All leaves over a range, by guest frame.
///
/// Between batches it holds nothing of the MMU, so it may be kept, and left, at any time.
///
/// ```
/// # use slat_mmu::{Arena, Format, GfnRange, Gfn, Leaves, Level, SecondStage};
/// /// How many 2 MiB pages the first gigabyte has.
/// fn huge(mmu: &dyn SecondStage) -> usize {
///     let leaves = Leaves::new(mmu, 0, GfnRange::new(Gfn(0), 1 << 18));
///     leaves.filter(|found| found.level == Level::SIZE_2M).count()
/// }
/// ```
#[derive(Debug)]
pub struct Leaves<'m> {
    mmu: &'m dyn SecondStage,
    as_id: u8,
    found: vec::IntoIter<MappedLeaf>,
    rest: GfnRange,
}

impl<'m> Leaves<'m> {
    /// The leaves of address space `as_id` over `range`.
    pub fn new(mmu: &'m dyn SecondStage, as_id: u8, range: GfnRange) -> Self {
        Self {
            mmu,
            as_id,
            found: Vec::new().into_iter(),
            rest: range,
        }
    }
}

impl Iterator for Leaves<'_> {
    type Item = MappedLeaf;

    fn next(&mut self) -> Option<MappedLeaf> {
        loop {
            if let Some(found) = self.found.next() {
                return Some(found);
            }
            if self.rest.is_empty() {
                return None;
            }
            let batch = self.mmu.leaf_batch_in(self.as_id, self.rest);
            self.found = batch.leaves.into_iter();
            self.rest = batch.rest;
        }
    }
}
