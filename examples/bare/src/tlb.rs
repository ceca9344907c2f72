//! A processor's translation cache, as small as can be: it holds what a walk found until it is told to forget it.
//!
//! Forgetting too little shows at once: the guest would write without a fault, and the dirty log would miss it.

use slat_mmu::{Access, Flush, Gfn, GfnRange, Pfn};

use crate::hardware::Found;

const ENTRIES: usize = 8;

/// The cache.
#[derive(Debug, Default)]
pub(crate) struct Tlb {
    entries: [Option<(GfnRange, Found)>; ENTRIES],
    next: usize,
}

impl Tlb {
    /// Where `gfn` leads, if the access needs no walk. A write does until the walker has seen Dirty set.
    pub(crate) fn look_up(&self, gfn: Gfn, access: Access) -> Option<Pfn> {
        let (range, found) = self
            .entries
            .iter()
            .flatten()
            .find(|(range, found)| range.contains(gfn) && found.allows(access))?;
        Some(Pfn(found.first.0 + (gfn.0 - range.start.0)))
    }

    /// Keeps what a walk for `gfn` found.
    pub(crate) fn fill(&mut self, gfn: Gfn, found: Found) {
        let start = Gfn(gfn.0 & !(found.pages - 1));
        self.entries[self.next % ENTRIES] = Some((GfnRange::new(start, found.pages), found));
        self.next = self.next.wrapping_add(1);
    }

    /// `INVEPT`, `TLB_CONTROL`, `HFENCE.GVMA`, `TLBI`. A huge entry goes if any of its frames is meant.
    pub(crate) fn flush(&mut self, flush: Flush) {
        for entry in &mut self.entries {
            if entry.is_some_and(|(range, _)| flush.touches(range)) {
                *entry = None;
            }
        }
    }
}
