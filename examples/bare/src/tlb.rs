//! A processor's translation cache, as small as can be: it holds what a walk found until it is told
//! to forget it.
//!
//! Forgetting too little shows at once: the guest would write without a fault, and the dirty log
//! would miss it.
//!
//! Where the processor may remember that an entry mapped *nothing*, it does, at whatever level. A
//! fence by address drops such an entry if it covers it whole, as it does when the entry is a leaf
//! by now; one above the leaf stays until everything goes. A hypervisor that does not ask
//! [`install_fence`](slat_mmu::SecondStage::install_fence) has a guest that faults for ever.

use slat_mmu::{Access, Flush, Gfn, GfnRange, Pfn};

use crate::hardware::Found;

const ENTRIES: usize = 8;

/// The cache.
#[derive(Debug, Default)]
pub(crate) struct Tlb {
    entries: [Option<(GfnRange, Found)>; ENTRIES],
    next: usize,
    /// Frames of entries that mapped nothing.
    absent: [Option<GfnRange>; ENTRIES],
    next_absent: usize,
}

impl Tlb {
    /// Where `gfn` leads, if the access needs no walk. A write does until the walker has seen Dirty
    /// set.
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

    /// Whether the processor faults on `gfn` without a walk.
    pub(crate) fn is_absent(&self, gfn: Gfn) -> bool {
        let mut absent = self.absent.iter().flatten();
        absent.any(|span| span.contains(gfn))
    }

    /// Remembers that an entry of `pages` frames around `gfn` mapped nothing.
    pub(crate) fn remember_absent(&mut self, gfn: Gfn, pages: u64) {
        let span = GfnRange::new(Gfn(gfn.0 & !(pages - 1)), pages);
        self.absent[self.next_absent % ENTRIES] = Some(span);
        self.next_absent = self.next_absent.wrapping_add(1);
    }

    /// `INVEPT`, `TLB_CONTROL`, `HFENCE.GVMA`, `TLBI`. A huge entry goes if any of its frames is
    /// meant.
    pub(crate) fn flush(&mut self, flush: Flush) {
        for entry in &mut self.entries {
            if entry.is_some_and(|(range, _)| flush.touches(range)) {
                *entry = None;
            }
        }
        for span in &mut self.absent {
            if span
                .is_some_and(|span| flush.covers(span.start) && flush.covers(Gfn(span.end.0 - 1)))
            {
                *span = None;
            }
        }
    }
}
