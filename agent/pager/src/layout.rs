//! Which memories there are, where the guest and the VM process have them, and which snapshots
//! guard them.
//!
//! *Locking*: behind one lock ([`crate::shared`]). Whoever resolves a fault reads it from the
//! judgement to the mapping; whoever moves, removes, switches or begins a snapshot writes. So a
//! judgement is true until the mapping that it led to is made.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use slat_paging::PAGE;

use crate::{guard::Guard, memory::Memory, noted::Noted};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    by_id: BTreeMap<u32, Place>,
    by_gfn: BTreeMap<u64, u32>,
    by_view: BTreeMap<u64, u32>,
    /// The number of the last arming.
    armings: u64,
}

/// A memory and where it is.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) memory: Arc<Memory>,
    pub(crate) base_gfn: u64,
    /// Where the VM process has its view; 0 without.
    pub(crate) view: u64,
    /// While a snapshot is armed: the pages that became writable since the last round.
    pub(crate) armed: Option<Noted>,
    /// Of snapshots that have begun.
    pub(crate) guards: Vec<Arc<Guard>>,
}

/// A part of a range of frames that lies in one memory.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) memory: Arc<Memory>,
    pub(crate) pages: Range<u64>,
    /// The frame of the first page.
    pub(crate) gfn: u64,
}

impl Layout {
    pub(crate) fn get(&self, memory: u32) -> Option<&Place> {
        self.by_id.get(&memory)
    }

    pub(crate) fn get_mut(&mut self, memory: u32) -> Option<&mut Place> {
        self.by_id.get_mut(&memory)
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        self.by_id.values()
    }

    pub(crate) fn places_mut(&mut self) -> impl Iterator<Item = &mut Place> {
        self.by_id.values_mut()
    }

    /// Adds a memory, unless there is one of its name.
    pub(crate) fn add(&mut self, place: Place) -> bool {
        let id = place.memory.id;
        if self.by_id.contains_key(&id) {
            return false;
        }
        self.by_id.insert(id, place);
        self.index();
        true
    }

    pub(crate) fn remove(&mut self, memory: u32) -> Option<Place> {
        let removed = self.by_id.remove(&memory);
        self.index();
        removed
    }

    /// A number for an arming.
    pub(crate) fn next_arming(&mut self) -> u64 {
        self.armings += 1;
        self.armings
    }

    /// The snapshot has begun, or will not begin: nothing is noted for it any more.
    pub(crate) fn disarm(&mut self, snapshot: u64) {
        for place in self.places_mut() {
            let armed = place.armed.take();
            place.armed = armed.filter(|noted| noted.snapshot != snapshot);
        }
    }

    /// To be called after places were changed: they are found where they are now.
    pub(crate) fn index(&mut self) {
        let places = || self.by_id.iter();
        self.by_gfn = places().map(|(id, place)| (place.base_gfn, *id)).collect();
        let views = places().filter(|(_, place)| place.view != 0);
        self.by_view = views.map(|(id, place)| (place.view, *id)).collect();
    }

    /// The memory and the page at an address of the VM process.
    pub(crate) fn at_view(&self, address: u64) -> Option<(&Place, u64)> {
        let (view, id) = self.by_view.range(..=address).next_back()?;
        let place = self.by_id.get(id)?;
        let page = (address - view) / PAGE as u64;
        (page < place.memory.pages).then_some((place, page))
    }

    /// The parts of a range of frames that have memory.
    pub(crate) fn parts(&self, gfn: u64, pages: u64) -> Vec<Part> {
        let end = gfn.saturating_add(pages);
        let before = self.by_gfn.range(..=gfn).next_back();
        let first = before.map_or(gfn, |(base, _)| *base);
        let found = self.by_gfn.range(first..end.max(first));
        let part = |(base, id): (&u64, &u32)| {
            let memory = Arc::clone(&self.by_id.get(id)?.memory);
            let from = gfn.max(*base);
            let to = end.min(base.saturating_add(memory.pages));
            (from < to).then(|| Part {
                pages: from - base..to - base,
                gfn: from,
                memory,
            })
        };
        found.filter_map(part).collect()
    }
}
