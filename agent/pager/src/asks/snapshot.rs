//! How a snapshot begins: armed while the guest runs, then begun while it stands still.
//!
//! To arm is to take leave to write away, in rounds: at first from all that is mapped, then from
//! what became writable during the round before. A round protects a page in less than a
//! microsecond, and a write fault costs the guest ten or more, so each leaves a small part of the
//! one before. To begin is to make the last round with the guest stopped, and to guard. Where the
//! host cannot protect, mappings are taken away instead.

use slat_mmu::{AddressSpace, Gfn, GfnRange, MirrorChange};
use slat_paging::wire::Answer;

use super::{split::complete, thread::no};
use crate::{
    error::Trouble,
    layout::Layout,
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
        let first: Vec<GfnRange> = {
            let mut snapshots = lock(&self.snapshots);
            let known = snapshots.get_mut(snapshot).filter(|known| !known.active);
            known.ok_or_else(|| none(snapshot))?;
            let mut layout = write(&self.layout);
            for place in layout.places_mut() {
                place.armed = Some(Noted::new(snapshot, place.memory.pages));
            }
            let all = layout.places();
            all.map(|place| GfnRange::new(Gfn(place.base_gfn), place.memory.pages))
                .collect()
        };
        self.take_leave(space, &first)?;
        let mut rounds = 1;
        loop {
            let left = noted(&read(&self.layout));
            if left <= FEW || rounds == MOST_ROUNDS || self.is_over() {
                return Ok(Answer::Armed { left, rounds });
            }
            // Who is mapping a page that is noted has done so when the lock is had.
            let runs = taken(&write(&self.layout));
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
        let armed = |place: &crate::layout::Place| {
            place
                .armed
                .as_ref()
                .is_some_and(|noted| noted.snapshot == snapshot)
        };
        // Without having been armed, or for a memory that came since: all of it.
        let rest: Vec<GfnRange> = layout
            .places()
            .filter(|place| !armed(place))
            .map(|place| GfnRange::new(Gfn(place.base_gfn), place.memory.pages))
            .collect();
        let runs: Vec<GfnRange> = taken(&layout).into_iter().chain(rest).collect();
        self.take_leave(space, &runs)?;
        for place in layout.places_mut() {
            place.armed = None;
        }
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

fn noted(layout: &Layout) -> u64 {
    let noted = layout.places().filter_map(|place| place.armed.as_ref());
    noted.map(Noted::count).sum()
}

/// What became writable since the last time, by frame.
fn taken(layout: &Layout) -> Vec<GfnRange> {
    let mut runs = Vec::new();
    for place in layout.places() {
        let noted = place.armed.iter().flat_map(Noted::take);
        runs.extend(
            noted.map(|run| GfnRange::new(Gfn(place.base_gfn + run.start), run.end - run.start)),
        );
    }
    runs
}

fn none(snapshot: u64) -> Trouble {
    no(format!("there is no snapshot {snapshot} that could begin"))
}
