//! Requests about contents: load and discard.

use slat_paging::wire::ProblemKind;

use super::split::range;
use crate::{
    error::Trouble,
    guard::{is_guarded, keep, keep_part},
    layout::Part,
    memory::stripes,
    shared::Shared,
    sync::read,
};

impl Shared {
    /// Brings contents, and keeps them for snapshots if they are going to be written.
    pub(super) fn load(&self, gfn: u64, pages: u64, write: bool) -> Result<(), Trouble> {
        let parts = read(&self.layout).parts(gfn, pages);
        self.bring_all(&parts)?;
        if !write {
            return Ok(());
        }
        let layout = read(&self.layout);
        parts.iter().try_for_each(|part| {
            let guards = layout.get(part.memory.id).map(|place| &place.guards[..]);
            keep(
                &part.memory,
                guards.unwrap_or_default(),
                part.pages.clone(),
                &self.stats,
            )
        })
    }

    pub(super) fn load_all(&self) -> Result<(), Trouble> {
        let parts: Vec<Part> = {
            let layout = read(&self.layout);
            let part = |place: &crate::layout::Place| Part {
                memory: place.memory.clone(),
                pages: 0..place.memory.pages,
                gfn: place.base_gfn,
            };
            layout.places().map(part).collect()
        };
        self.queue.load_all();
        self.bring_all(&parts)?;
        self.tell_if_loaded();
        Ok(())
    }

    /// Has loaders bring what is not there, and waits for it. Ends with what is wrong as soon as
    /// something is: a read of it that failed, or any that takes too long.
    fn bring_all(&self, parts: &[Part]) -> Result<(), Trouble> {
        let is_there = |part: &&Part| part.memory.there_until(part.pages.clone()) == part.pages.end;
        let missing = parts.iter().filter(|part| !is_there(part));
        let asked = self
            .queue
            .ask(missing.map(|part| (part.memory.clone(), part.pages.clone())));
        let result = self.queue.wait_until(|| {
            if parts.iter().all(|part| is_there(&part)) {
                return Some(Ok(()));
            }
            let failed = self.queue.ask_failed(asked);
            failed.or_else(|| self.problems.stalled()).map(Err)
        });
        self.queue.end_ask(asked);
        result.unwrap_or_else(|| Err(Trouble::new(ProblemKind::Stopping, "the pager is ending")))
    }

    /// Takes contents away. Pages that a snapshot needs are kept first, for which they have to be
    /// there.
    pub(super) fn discard(&self, gfn: u64, pages: u64) -> Result<(), Trouble> {
        loop {
            let parts = read(&self.layout).parts(gfn, pages);
            let needed: Vec<Part> = parts.iter().flat_map(|part| self.needed(part)).collect();
            self.bring_all(&needed)?;
            let token = self.mirror.as_ref().map(|mirror| {
                let range = range(gfn, pages);
                (mirror, mirror.space().invalidate_begin(range, true))
            });
            let result = parts
                .iter()
                .try_fold(true, |all, part| Ok(all & self.discard_part(part)?));
            if let Some((mirror, token)) = token {
                // It was begun at this mirror.
                let ended = mirror.mmu.invalidate_end(token);
                debug_assert!(ended.is_ok());
            }
            // A snapshot may have begun meanwhile that needs what is not there.
            if result? {
                return Ok(());
            }
        }
    }

    /// The runs of a part that a snapshot needs and that are not there.
    fn needed(&self, part: &Part) -> Vec<Part> {
        let layout = read(&self.layout);
        let Some(place) = layout.get(part.memory.id) else {
            return Vec::new();
        };
        let missing = |page: &u64| !part.memory.is_there(*page) && is_guarded(&place.guards, *page);
        if place.guards.is_empty() {
            return Vec::new();
        }
        let mut runs: Vec<Part> = Vec::new();
        for page in part.pages.clone().filter(missing) {
            match runs.last_mut() {
                Some(run) if run.pages.end == page => run.pages.end = page + 1,
                _ => runs.push(Part {
                    memory: part.memory.clone(),
                    pages: page..page + 1,
                    gfn: part.gfn + (page - part.pages.start),
                }),
            }
        }
        runs
    }

    /// Keeps and punches. Whether nothing is left that has to be brought first.
    fn discard_part(&self, part: &Part) -> Result<bool, Trouble> {
        let layout = read(&self.layout);
        let guards = layout.get(part.memory.id).map(|place| &place.guards[..]);
        let (guards, memory) = (guards.unwrap_or_default(), &part.memory);
        let mut all = true;
        for stripe in stripes(part.pages.clone()) {
            let _stripe = memory.stripe(stripe.start);
            let stuck = |page: u64| !memory.is_there(page) && is_guarded(guards, page);
            if stripe.clone().any(stuck) {
                all = false;
                continue;
            }
            keep_part(memory, guards, stripe.clone(), &self.stats)?;
            // From here on no loader stores anything there.
            memory.set_there(stripe);
        }
        if all {
            let count = part.pages.end - part.pages.start;
            let punched = memory.file.punch(part.pages.start, count);
            punched.map_err(|error| Trouble::memory("discarding guest memory", &error))?;
            self.queue.came(memory, part.pages.clone());
        }
        Ok(all)
    }
}
