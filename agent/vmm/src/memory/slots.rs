//! The slot table of a VM, and the memory behind each slot.
//!
//! The table is an immutable snapshot behind a lock that is held only to swap it: readers take the
//! `Arc` and go on with a consistent table. Changes come from one owner (the VM's machine), which
//! tells the backend first.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use slat_proto::model::SlotSpec;

use super::{
    region::Region,
    view::{GuestView, HostView},
};

/// One slot and its memory. Moving a slot keeps the memory and makes a new value.
#[derive(Clone, Debug)]
pub(crate) struct SlotMemory {
    spec: SlotSpec,
    region: Region,
}

impl SlotMemory {
    /// A slot of zeroes.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub(crate) fn new(spec: SlotSpec) -> io::Result<Self> {
        let region = Region::new(&format!("slat-slot{}", spec.slot), spec.pages)?;
        Ok(Self { spec, region })
    }

    /// The same memory elsewhere in guest-physical space.
    #[must_use]
    pub(crate) fn moved(&self, spec: SlotSpec) -> Self {
        Self {
            spec,
            region: self.region.clone(),
        }
    }

    /// Where it is.
    #[must_use]
    pub(crate) fn spec(&self) -> SlotSpec {
        self.spec
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    /// What the guest's slot maps.
    #[must_use]
    pub(crate) fn guest(&self) -> &Arc<GuestView> {
        self.region.guest()
    }

    /// What our own threads use.
    #[must_use]
    pub(crate) fn host(&self) -> &HostView {
        self.region.host()
    }
}

/// An immutable table of slots, by `base_gfn`.
#[derive(Clone, Debug, Default)]
pub(crate) struct SlotTable {
    slots: Vec<Arc<SlotMemory>>,
    generation: u64,
}

impl SlotTable {
    /// Its slots, by `base_gfn`.
    #[must_use]
    pub(crate) fn slots(&self) -> &[Arc<SlotMemory>] {
        &self.slots
    }

    /// Grows by 1 at each change, as long as the VM lives: a process that takes the VM over goes on
    /// from the generation it had.
    #[must_use]
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The slot of that number.
    #[must_use]
    pub(crate) fn slot(&self, number: u32) -> Option<&Arc<SlotMemory>> {
        self.slots.iter().find(|slot| slot.spec.slot == number)
    }

    /// The slot that holds a guest frame, and the page's index in it.
    #[must_use]
    pub(crate) fn find(&self, gfn: u64) -> Option<(&Arc<SlotMemory>, u64)> {
        let at = self
            .slots
            .partition_point(|slot| slot.spec.base_gfn <= gfn)
            .checked_sub(1)?;
        let slot = &self.slots[at];
        (gfn < slot.spec.end_gfn()).then(|| (slot, gfn - slot.spec.base_gfn))
    }

    /// All pages.
    #[must_use]
    pub(crate) fn pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.spec.pages).sum()
    }
}

/// The VM's current slot table.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    table: Mutex<Arc<SlotTable>>,
}

impl GuestMemory {
    /// A VM without slots.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The table now.
    #[must_use]
    pub(crate) fn table(&self) -> Arc<SlotTable> {
        Arc::clone(&self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Publishes a new table, one generation on. The caller has checked it and told the backend.
    pub(crate) fn publish(&self, mut slots: Vec<Arc<SlotMemory>>) {
        slots.sort_by_key(|slot| slot.spec.base_gfn);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = table.generation.saturating_add(1);
        *table = Arc::new(SlotTable { slots, generation });
    }

    /// The table is of `generation` from now on, unless it is of a later one: it never goes back.
    pub(crate) fn raise_generation(&self, generation: u64) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.generation < generation {
            *table = Arc::new(SlotTable {
                slots: table.slots.clone(),
                generation,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_in_their_slot() {
        let memory = GuestMemory::new();
        let slot = |number, base| {
            Arc::new(SlotMemory::new(SlotSpec::new(number, base, 4, false).unwrap()).unwrap())
        };
        memory.publish(vec![slot(1, 100), slot(0, 0)]);
        let table = memory.table();
        assert_eq!(table.generation(), 1);
        assert_eq!(
            table.find(3).map(|(slot, page)| (slot.spec().slot, page)),
            Some((0, 3))
        );
        assert_eq!(
            table.find(101).map(|(slot, page)| (slot.spec().slot, page)),
            Some((1, 1))
        );
        for hole in [4, 99, 104, u64::MAX] {
            assert!(table.find(hole).is_none(), "{hole}");
        }
    }

    #[test]
    fn a_generation_is_raised_and_never_goes_back() {
        let memory = GuestMemory::new();
        memory.publish(Vec::new());
        memory.raise_generation(7);
        assert_eq!(memory.table().generation(), 7);
        memory.raise_generation(3);
        assert_eq!(memory.table().generation(), 7);
        memory.publish(Vec::new());
        assert_eq!(memory.table().generation(), 8);
    }
}
