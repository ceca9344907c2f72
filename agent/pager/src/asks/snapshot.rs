//! How a snapshot begins: armed while the guest runs, then begun while it stands still.
//!
//! To arm is to take leave to write away, in rounds: at first from all that is mapped, then from
//! what became writable during the round before. A round protects a page in less than a
//! microsecond, and a write fault costs the guest ten or more, so each leaves a small part of the
//! one before. To begin is to make the last round with the guest stopped, and to guard.
//!
//! Where the host cannot protect, mappings are taken away instead, once: what the guest goes on to
//! read or write comes back by a fault each time, so a further round leaves no less than the first.
//! The last is made when the snapshot begins.
//!
//! The VM process may give an arming up while it is at work here, and arm another. Each looks at
//! what was noted for itself, and ends when it is not armed any more. One that is not over when its
//! snapshot begins is as none: it may have taken notes that it has not protected yet.

use slat_mmu::{AddressSpace, Gfn, GfnRange, MirrorChange};
use slat_paging::wire::Answer;

use super::{split::complete, thread::no};
use crate::{
    error::Trouble,
    layout::{Layout, Place},
    noted::Noted,
    shared::Shared,
    sync::{lock, read, write},
};

/// Pages that are few: 0.2 ms of protecting.
const FEW: u64 = 256;
/// Rounds, for a guest that writes faster than it should be able to.
const MOST_ROUNDS: u32 = 16;

impl Shared {
    pub(super) fn arm(&self, snapshot: u64) -> Result<Answer, Trouble> {
        let space = self.watching()?.space();
        self.wait_until_swept()?;
        let (arming, first) = {
            let mut snapshots = lock(&self.snapshots);
            let known = snapshots.get_mut(snapshot).filter(|known| !known.active);
            known.ok_or_else(|| none(snapshot))?;
            let mut layout = write(&self.layout);
            let arming = layout.next_arming();
            for place in layout.places_mut() {
                place.armed = Some(Noted::new(snapshot, arming, place.memory.pages));
            }
            let all = layout.places();
            let all = all.map(|place| GfnRange::new(Gfn(place.base_gfn), place.memory.pages));
            (arming, all.collect::<Vec<_>>())
        };
        self.take_leave(space, &first)?;
        let mut rounds = 1;
        loop {
            {
                let layout = read(&self.layout);
                let left = noted(&layout, arming).ok_or_else(|| given_up(snapshot))?;
                let enough = left <= FEW || !self.setup.can_protect;
                if enough || rounds == MOST_ROUNDS || self.is_over() {
                    of(&layout, arming).for_each(|(_, noted)| noted.set_over());
                    return Ok(Answer::Armed { left, rounds });
                }
            }
            // Who is mapping a page that is noted has done so when the lock is had.
            let runs = taken(&write(&self.layout), arming);
            self.take_leave(space, &runs)?;
            rounds += 1;
        }
    }

    pub(super) fn begin(&self, snapshot: u64) -> Result<(), Trouble> {
        let space = self.watching()?.space();
        let mut snapshots = lock(&self.snapshots);
        let known = snapshots.get_mut(snapshot).filter(|known| !known.active);
        let known = known.ok_or_else(|| none(snapshot))?;
        let mut layout = write(&self.layout);
        let mut runs: Vec<GfnRange> = Vec::new();
        for place in layout.places() {
            let of_this = |noted: &&Noted| noted.snapshot == snapshot;
            match place.armed.as_ref().filter(of_this) {
                Some(noted) if noted.is_over() => runs.extend(frames(place, noted)),
                // Not armed, or a memory that came since: all of it.
                _ => runs.push(GfnRange::new(Gfn(place.base_gfn), place.memory.pages)),
            }
        }
        self.take_leave(space, &runs)?;
        layout.disarm(snapshot);
        for (memory, guard) in &known.guards {
            if let Some(place) = layout.get_mut(*memory) {
                place.guards.push(guard.clone());
            }
        }
        known.active = true;
        Ok(())
    }

    fn take_leave(&self, space: AddressSpace<'_>, runs: &[GfnRange]) -> Result<(), Trouble> {
        runs.iter().try_for_each(|run| {
            let change: MirrorChange = match self.setup.can_protect {
                true => space.write_protect_mirror(*run),
                false => space.zap_mirror(*run),
            };
            complete(&change, "protecting")
        })
    }
}

/// What is noted for an arming, and where.
fn of(layout: &Layout, arming: u64) -> impl Iterator<Item = (&Place, &Noted)> {
    let noted = layout
        .places()
        .filter_map(|place| Some((place, place.armed.as_ref()?)));
    noted.filter(move |(_, noted)| noted.arming == arming)
}

/// How many pages are noted for an arming; `None`: it is not armed any more.
fn noted(layout: &Layout, arming: u64) -> Option<u64> {
    let counts = of(layout, arming).map(|(_, noted)| noted.count());
    counts.reduce(|sum, count| sum + count)
}

/// What became writable since the last time, by frame.
fn taken(layout: &Layout, arming: u64) -> Vec<GfnRange> {
    let places = of(layout, arming);
    places
        .flat_map(|(place, noted)| frames(place, noted))
        .collect()
}

/// Takes what is noted for a memory, by frame.
fn frames(place: &Place, noted: &Noted) -> Vec<GfnRange> {
    let runs = noted.take().into_iter();
    runs.map(|run| GfnRange::new(Gfn(place.base_gfn + run.start), run.end - run.start))
        .collect()
}

fn given_up(snapshot: u64) -> Trouble {
    no(format!("snapshot {snapshot} is not armed any more"))
}

fn none(snapshot: u64) -> Trouble {
    no(format!("there is no snapshot {snapshot} that could begin"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use slat_paging::{PAGE, wire};

    use super::*;
    use crate::memory::Memory;

    const PAGES: u64 = 100;

    fn layout() -> Layout {
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, PAGES * PAGE as u64).unwrap();
        let message = wire::Memory {
            memory: 0,
            slot: 0,
            base_gfn: 1000,
            pages: PAGES,
            view: 0,
            file_start: 0,
            read_only: false,
            origin: None,
            has_loaded: false,
        };
        let memory = Memory::new(&message, vec![file], 0).unwrap();
        let mut layout = Layout::default();
        assert!(layout.add(Place {
            memory: Arc::new(memory),
            base_gfn: 1000,
            view: 0,
            armed: None,
            guards: Vec::new(),
        }));
        layout
    }

    /// Arms, as [`Shared::arm`] does at first. The number of the arming.
    fn arm(layout: &mut Layout, snapshot: u64) -> u64 {
        let arming = layout.next_arming();
        for place in layout.places_mut() {
            place.armed = Some(Noted::new(snapshot, arming, PAGES));
        }
        arming
    }

    fn note(layout: &Layout, page: u64) {
        for place in layout.places() {
            place.armed.as_ref().unwrap().set(page);
        }
    }

    #[test]
    fn an_arming_that_was_given_up_takes_nothing_of_the_next() {
        let mut layout = layout();
        let first = arm(&mut layout, 1);
        note(&layout, 3);
        assert_eq!(noted(&layout, first), Some(1));
        layout.disarm(1);
        assert_eq!(noted(&layout, first), None);
        // Also of the same snapshot, which is asked for again.
        for snapshot in [2, 1] {
            let second = arm(&mut layout, snapshot);
            note(&layout, 7);
            assert_eq!(noted(&layout, first), None);
            assert_eq!(taken(&layout, first), []);
            assert_eq!(noted(&layout, second), Some(1));
            assert_eq!(taken(&layout, second), [GfnRange::new(Gfn(1007), 1)]);
        }
        layout.disarm(2);
        assert!(layout.places().all(|place| place.armed.is_some()));
    }
}
