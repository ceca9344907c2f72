//! All leaves over a range, as an iterator over bounded batches.
//!
//! *Locking*: none, and nothing is held between batches (see `leaves`).

use alloc::vec::{self, Vec};

use super::{leaves::MappedLeaf, space::AddressSpace};
use crate::addr::GfnRange;

/// All leaves over a range, by guest frame.
///
/// Between batches it holds nothing of the MMU, so it may be kept, and left, at any time.
///
/// ```
/// # use slat_mmu::{AddressSpace, Gfn, GfnRange, Level};
/// /// How many 2 MiB pages the first gigabyte has.
/// fn huge(space: AddressSpace<'_>) -> usize {
///     let leaves = space.leaves(GfnRange::new(Gfn(0), 1 << 18));
///     leaves.filter(|found| found.level == Level::SIZE_2M).count()
/// }
/// ```
#[derive(Debug)]
pub struct Leaves<'m> {
    space: AddressSpace<'m>,
    found: vec::IntoIter<MappedLeaf>,
    rest: GfnRange,
    mirror: bool,
}

impl<'m> AddressSpace<'m> {
    /// The leaves over `range`, by guest frame. Takes no lock and changes nothing.
    pub fn leaves(self, range: GfnRange) -> Leaves<'m> {
        Leaves::new(self, range, false)
    }
}

impl<'m> Leaves<'m> {
    pub(super) fn new(space: AddressSpace<'m>, range: GfnRange, mirror: bool) -> Self {
        Self {
            space,
            found: Vec::new().into_iter(),
            rest: range,
            mirror,
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
            let batch = self.space.batch_of(self.rest, self.mirror);
            self.found = batch.leaves.into_iter();
            self.rest = batch.rest;
        }
    }
}
