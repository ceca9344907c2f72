//! The slot table of a VM, and the memory behind each slot.
//!
//! The table is an immutable snapshot behind a lock that is held only to swap it, or to copy its
//! list of slots where somebody still reads the last one: readers take the `Arc` and go on with a
//! consistent table. Changes come from one owner (the VM's machine), which
//! tells the backend first.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use slat_proto::model::SlotSpec;

use super::{
    file::MemoryFile,
    huge::BLOCK_BYTES,
    made_of::MadeOf,
    mode::Mode,
    origin::Origin,
    region::Region,
    view::{GuestView, HostView},
};

/// So many small slots that are made at once share a file.
const TOGETHER: usize = 8;

/// One slot and its memory. Moving a slot keeps the memory and makes a new value.
#[derive(Clone, Debug)]
pub(crate) struct SlotMemory {
    spec: SlotSpec,
    region: Region,
}

impl SlotMemory {
    /// A slot of zeroes in the usual mode.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub(crate) fn new(spec: SlotSpec) -> io::Result<Self> {
        Self::with(spec, Mode::default())
    }

    /// A slot of zeroes.
    ///
    /// # Errors
    /// When the memory cannot be mapped, or not reserved.
    pub(crate) fn with(spec: SlotSpec, mode: Mode) -> io::Result<Self> {
        let region = Region::with(&format!("slat-slot{}", spec.slot), spec.pages, mode)?;
        Ok(Self { spec, region })
    }

    /// Slots of zeroes in the order of these; small ones, when there are many, in one file.
    ///
    /// # Errors
    /// As [`SlotMemory::with`], of the slot at this place.
    pub(crate) fn all(specs: &[SlotSpec], mode: Mode) -> Result<Vec<Self>, (usize, io::Error)> {
        let small = |spec: &&SlotSpec| mode == Mode::default() && spec.bytes() < BLOCK_BYTES;
        let pages: Vec<u64> = specs.iter().filter(small).map(|spec| spec.pages).collect();
        let mut together = if pages.len() < TOGETHER {
            Vec::new().into_iter()
        } else {
            let first = specs.iter().position(|spec| small(&spec)).unwrap_or(0);
            let regions = Region::together("slat-slots", &pages).map_err(|error| (first, error))?;
            regions.into_iter()
        };
        let slot = |(at, spec): (usize, &SlotSpec)| {
            let region = Some(spec).filter(small).and_then(|_| together.next());
            match region {
                Some(region) => Ok(Self {
                    spec: *spec,
                    region,
                }),
                None => Self::with(*spec, mode).map_err(|error| (at, error)),
            }
        };
        specs.iter().enumerate().map(slot).collect()
    }

    /// The same memory elsewhere in guest-physical space, or with other flags.
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

    /// An empty slot whose pages come from elsewhere.
    #[must_use]
    pub(crate) fn coming_from(mut self, origin: Origin) -> Self {
        self.region.come_from(origin);
        self
    }

    /// Where its pages come from, when they come from elsewhere.
    #[must_use]
    pub(crate) fn origin(&self) -> Option<&Arc<Origin>> {
        self.region.origin()
    }

    /// Its memory file.
    #[must_use]
    pub(crate) fn file(&self) -> MemoryFile {
        self.region.file()
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

    /// Pages of the host that it is made of now.
    #[must_use]
    pub(crate) fn made_of(&self) -> MadeOf {
        let slots = self.slots.iter().map(|slot| slot.region.made_of());
        slots.fold(MadeOf::nothing(), MadeOf::and)
    }

    /// Bytes in 2 MiB pages, as far as is known.
    #[cfg(test)]
    pub(crate) fn huge_bytes(&self) -> u64 {
        self.made_of().huge.unwrap_or(0)
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

    /// Publishes the table with one slot more. To readers it is as [`GuestMemory::publish`]; it
    /// costs about as much with many slots as with few, unless a reader has the table.
    pub(crate) fn insert(&self, slot: Arc<SlotMemory>) {
        self.edit(|slots| {
            let at = slots.partition_point(|other| other.spec.base_gfn < slot.spec.base_gfn);
            slots.insert(at, slot);
        });
    }

    /// Publishes the table with a slot in place of the one that begins at `base_gfn`.
    pub(crate) fn replace(&self, base_gfn: u64, slot: Arc<SlotMemory>) {
        self.edit(|slots| {
            remove(slots, base_gfn);
            let at = slots.partition_point(|other| other.spec.base_gfn < slot.spec.base_gfn);
            slots.insert(at, slot);
        });
    }

    /// Publishes the table without the slot that begins at `base_gfn`.
    pub(crate) fn remove(&self, base_gfn: u64) {
        self.edit(|slots| remove(slots, base_gfn));
    }

    fn edit(&self, edit: impl FnOnce(&mut Vec<Arc<SlotMemory>>)) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let table = Arc::make_mut(&mut table);
        edit(&mut table.slots);
        table.generation = table.generation.saturating_add(1);
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

fn remove(slots: &mut Vec<Arc<SlotMemory>>, base_gfn: u64) {
    if let Ok(at) = slots.binary_search_by_key(&base_gfn, |slot| slot.spec.base_gfn) {
        slots.remove(at);
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::PAGE_SIZE;

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
    fn slots_are_put_in_and_taken_one_by_one_beside_readers() {
        let memory = GuestMemory::new();
        let slot = |number, base| {
            Arc::new(SlotMemory::new(SlotSpec::new(number, base, 4, false).unwrap()).unwrap())
        };
        let numbers = |table: &SlotTable| -> Vec<u32> {
            table.slots().iter().map(|slot| slot.spec().slot).collect()
        };
        memory.insert(slot(0, 50));
        memory.insert(slot(1, 10));
        let read = memory.table();
        memory.replace(50, slot(0, 0));
        assert_eq!(numbers(&memory.table()), [0, 1]);
        memory.remove(10);
        memory.remove(9);
        assert_eq!(numbers(&memory.table()), [0]);
        assert_eq!(numbers(&read), [1, 0], "what a reader has does not change");
        assert_eq!(memory.table().generation(), 5);
    }

    #[test]
    fn slots_in_one_file_are_apart_and_give_their_pages_back() {
        let spec = |slot: u32| SlotSpec::new(slot, u64::from(slot) * 1000, 3, false).unwrap();
        let mut specs: Vec<SlotSpec> = (0..TOGETHER as u32).map(spec).collect();
        specs.insert(2, SlotSpec::new(99, 1 << 20, 600, false).unwrap());
        let mut slots = SlotMemory::all(&specs, Mode::default()).unwrap();
        let told: Vec<SlotSpec> = slots.iter().map(SlotMemory::spec).collect();
        assert_eq!(told, specs);
        assert_eq!(slots[2].guest().pages(), 600);
        assert!(slots[2].region().backing_span().is_none(), "large: its own");
        let page = PAGE_SIZE as usize;
        for (at, slot) in slots.iter().enumerate() {
            slot.guest().store(0, at as u64 + 1);
            slot.host().store(3 * page - 8, at as u64 + 1);
        }
        for (at, slot) in slots.iter().enumerate() {
            assert_eq!(slot.host().load(0), at as u64 + 1);
            assert_eq!(slot.guest().load(3 * page - 8), at as u64 + 1);
            assert_eq!(slot.allocated().unwrap(), 2 * PAGE_SIZE);
            assert!(!slot.has_page(1) && slot.has_page(2));
        }
        slots[4].populate(0, 3).unwrap();
        assert_eq!(slots[4].allocated().unwrap(), 3 * PAGE_SIZE);
        slots[4].discard(0, 2).unwrap();
        assert_eq!(slots[4].allocated().unwrap(), PAGE_SIZE);
        assert_eq!(slots[4].host().load(0), 0);
        // A view keeps the pages, whoever else is gone.
        let gone = slots.remove(1);
        let view = Arc::clone(gone.guest());
        let file = slots[0].region().whole_file();
        let before = file.allocated().unwrap();
        drop(gone);
        assert_eq!(view.load(0), 2);
        assert_eq!(file.allocated().unwrap(), before);
        drop(view);
        assert_eq!(file.allocated().unwrap(), before - 2 * PAGE_SIZE);
        for slot in &slots {
            assert_ne!(slot.host().load(3 * page - 8), 0, "the others stay");
        }
    }

    #[test]
    fn a_few_slots_have_files_of_their_own() {
        let specs = [
            SlotSpec::new(1, 0, 3, false).unwrap(),
            SlotSpec::new(2, 9, 3, false).unwrap(),
        ];
        for slot in SlotMemory::all(&specs, Mode::default()).unwrap() {
            assert!(slot.region().backing_span().is_none());
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
