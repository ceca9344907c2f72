//! Where things are in guest-physical memory: a function of the memory's size alone. The table is
//! in the parent's doc.
//!
//! "Linear" offsets count RAM bytes from [`Layout::LINEAR_BASE`] up to the support and on from
//! 4 GiB, without the hole; [`Layout::gpa`] turns one into an address.

use slat_proto::{
    ApiError,
    model::{PAGE_SIZE, SlotSpec, slots_for_memory},
};

const GIB: u64 = 1 << 30;

/// Where a slot's bytes begin and end.
pub(super) fn bounds(slot: &SlotSpec) -> (u64, u64) {
    (slot.base_gfn * PAGE_SIZE, slot.end_gfn() * PAGE_SIZE)
}

/// Pages of the support. As many on every architecture as page tables of x86-64 take: one, one for
/// each 512 GiB up to the end, one for each GiB that holds memory. Slots start at whole GiB, so no
/// GiB holds two.
pub(super) fn support_pages(slots: &[SlotSpec]) -> u64 {
    let end = slots.iter().map(|slot| bounds(slot).1).max().unwrap_or(0);
    let gibs = |slot| {
        let (base, end) = bounds(slot);
        end.div_ceil(GIB) - base / GIB
    };
    1 + end.div_ceil(512 * GIB) + slots.iter().map(gibs).sum::<u64>()
}

/// Layout of guest memory of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    slots: Vec<SlotSpec>,
    support_pages: u64,
    working_pages: u64,
}

impl Layout {
    /// Of memstress' code.
    pub(crate) const CODE: u64 = 0x1000;
    /// Of memstress' control pages.
    pub(crate) const CONTROL: u64 = 0x1_0000;
    /// Where linear offsets start.
    pub(crate) const LINEAR_BASE: u64 = 0x5_0000;

    /// Of a VM with that much memory.
    ///
    /// # Errors
    /// When no slots can be made for it.
    pub(crate) fn new(memory_bytes: u64) -> Result<Self, ApiError> {
        let slots = slots_for_memory(memory_bytes)?;
        let support_pages = support_pages(&slots);
        let mut layout = Self {
            slots,
            support_pages,
            working_pages: 0,
        };
        let linear = layout.low_limit().saturating_sub(Self::LINEAR_BASE) / PAGE_SIZE
            + layout.slots.get(1).map_or(0, |high| high.pages);
        // A table page serves 1,024 working pages, so of each 1,025 pages one is table.
        layout.working_pages = linear - linear.div_ceil(1025);
        Ok(layout)
    }

    /// The slots, by base.
    #[must_use]
    pub(crate) fn slots(&self) -> &[SlotSpec] {
        &self.slots
    }

    /// Of what the architecture's CPU needs beside the guest's code: see
    /// [`arch`](crate::guest::arch).
    #[must_use]
    pub(crate) fn support(&self) -> u64 {
        self.low_limit()
    }

    /// Where low memory ends for the guest: the support follows.
    #[must_use]
    pub(crate) fn low_limit(&self) -> u64 {
        self.slots[0].bytes() - self.support_pages * PAGE_SIZE
    }

    /// What to add to an address at or above [`Layout::low_limit`] to skip the support and the
    /// hole.
    #[must_use]
    pub(crate) fn hole(&self) -> u64 {
        self.slots
            .get(1)
            .map_or(0, |high| high.base_gfn * PAGE_SIZE - self.low_limit())
    }

    /// Pages memstress works on.
    #[must_use]
    pub(crate) fn working_pages(&self) -> u64 {
        self.working_pages
    }

    /// Linear address of the count table.
    #[must_use]
    pub(crate) fn expected(&self) -> u64 {
        Self::LINEAR_BASE
    }

    /// Linear address of the first working page.
    #[must_use]
    pub(crate) fn work(&self) -> u64 {
        Self::LINEAR_BASE + (self.working_pages * 4).next_multiple_of(PAGE_SIZE)
    }

    /// Guest-physical address of a linear one.
    #[must_use]
    pub(crate) fn gpa(&self, linear: u64) -> u64 {
        if linear < self.low_limit() {
            linear
        } else {
            linear + self.hole()
        }
    }

    /// Guest-physical address of a working page.
    #[must_use]
    pub(crate) fn working_page(&self, page: u64) -> u64 {
        self.gpa(self.work() + page * PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_fits_and_nothing_overlaps() {
        for bytes in [
            8 << 20,
            64 << 20,
            3 << 30,
            (3 << 30) + (2 << 20),
            5 << 30,
            4 << 40,
        ] {
            let layout = Layout::new(bytes).unwrap();
            let table_bytes = layout.work() - layout.expected();
            assert!(table_bytes >= layout.working_pages() * 4, "{bytes}");
            let end = layout.work() + layout.working_pages() * PAGE_SIZE;
            let linear_end =
                layout.low_limit() + layout.slots().get(1).map_or(0, |high| high.bytes());
            assert!(end <= linear_end, "{bytes}");
            assert!(
                linear_end - end < 2 * PAGE_SIZE,
                "{bytes} leaves memory unused"
            );
            let last = layout.working_page(layout.working_pages() - 1) / PAGE_SIZE;
            assert!(
                layout
                    .slots()
                    .iter()
                    .any(|slot| (slot.base_gfn..slot.end_gfn()).contains(&last))
            );
            assert!(last < layout.support() / PAGE_SIZE || last >= (4 << 30) / PAGE_SIZE);
        }
    }

    #[test]
    fn addresses_skip_the_hole() {
        let layout = Layout::new(4 << 30).unwrap();
        assert_eq!(layout.gpa(layout.low_limit() - 1), layout.low_limit() - 1);
        assert_eq!(layout.gpa(layout.low_limit()), 4 << 30);
    }
}
