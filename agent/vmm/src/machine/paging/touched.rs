//! What a saved VM's file says of its working set: the pages that its guest had touched, so that a
//! lazy restore reads them first.
//!
//! It is what the mirror maps, of a VM that its agent pages: a guest that the kernel paged until
//! now has touched nothing that anybody saw. It is a hint: what cannot be had in time is left out,
//! and a save does not fail for want of it.

use std::time::{Duration, Instant};

use slat_paging::wire::{Answer, Ask};

use super::super::Machine;

/// Runs, as many as a file has. Beyond that, runs that are close to each other become one.
const MOST: usize = 1 << 16;
/// It is listed within this, about; then the rest is left out.
const PATIENCE: Duration = Duration::from_secs(3);

/// Pages of a slot that the guest touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TouchedRun {
    /// The slot's number.
    pub(crate) slot: u32,
    /// The first page, counted from the slot's beginning.
    pub(crate) page: u64,
    /// How many.
    pub(crate) pages: u64,
}

impl TouchedRun {
    fn end(self) -> u64 {
        self.page + self.pages
    }
}

impl Machine {
    /// By slot and page. Nothing of a VM that its agent does not page.
    pub(super) fn touched(&self) -> Vec<TouchedRun> {
        if !self.is_paged_by_agent() || !self.is_watched() {
            return Vec::new();
        }
        let table = self.memory.table();
        let begun = Instant::now();
        let mut specs: Vec<_> = table.slots().iter().map(|slot| slot.spec()).collect();
        specs.sort_by_key(|spec| spec.slot);
        let mut runs = Vec::new();
        for spec in specs {
            let mut gfn = spec.base_gfn;
            while gfn < spec.end_gfn() {
                let pages = spec.end_gfn() - gfn;
                let left = PATIENCE.saturating_sub(begun.elapsed());
                let (more, next) = match self.pager.ask(Ask::Mapped { gfn, pages }, left) {
                    Ok(Answer::Mapped { runs, next }) if next > gfn => (runs, next),
                    Ok(_) => break,
                    Err(error) => {
                        tracing::warn!(%error, vm = %self.shared.vm, "its working set is not whole");
                        return fitting(runs);
                    }
                };
                for run in more {
                    // A pager may say anything.
                    let end = run.gfn.checked_add(run.pages);
                    let within = end.is_some_and(|end| end <= spec.end_gfn());
                    if within && run.gfn >= gfn {
                        let page = run.gfn - spec.base_gfn;
                        add(&mut runs, spec.slot, page, run.pages);
                    }
                }
                gfn = next;
            }
        }
        fitting(runs)
    }
}

/// Adds a run, to the last one where they touch. One that goes back is passed over.
fn add(runs: &mut Vec<TouchedRun>, slot: u32, page: u64, pages: u64) {
    match runs.last_mut() {
        _ if pages == 0 => {}
        Some(last) if last.slot == slot && last.end() == page => last.pages += pages,
        Some(last) if last.slot == slot && last.end() > page => {}
        _ => runs.push(TouchedRun { slot, page, pages }),
    }
}

/// As many runs as a file has.
fn fitting(mut runs: Vec<TouchedRun>) -> Vec<TouchedRun> {
    let mut gap = 1;
    while runs.len() > MOST {
        // One a slot is left in the end, and there are fewer slots.
        let mut joined: Vec<TouchedRun> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if last.slot == run.slot && run.page - last.end() <= gap => {
                    last.pages = run.end() - last.page;
                }
                _ => joined.push(run),
            }
        }
        runs = joined;
        gap *= 2;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_are_one_and_what_goes_back_is_none() {
        let mut runs = Vec::new();
        for (slot, page, pages) in [(0, 0, 2), (0, 2, 1), (0, 1, 9), (0, 5, 0), (1, 0, 4)] {
            add(&mut runs, slot, page, pages);
        }
        let run = |slot, page, pages| TouchedRun { slot, page, pages };
        assert_eq!(runs, [run(0, 0, 3), run(1, 0, 4)]);
    }

    #[test]
    fn more_runs_than_a_file_has_become_fewer_of_the_same_slot() {
        let mut runs = Vec::new();
        for page in 0..MOST as u64 {
            add(&mut runs, 3, page * 3, 1);
        }
        add(&mut runs, 4, 7, 1);
        let fewer = fitting(runs);
        assert!(fewer.len() <= MOST && fewer.len() >= 2, "{}", fewer.len());
        assert_eq!((fewer[0].slot, fewer[0].page), (3, 0));
        let last = fewer[fewer.len() - 1];
        assert_eq!((last.slot, last.page, last.pages), (4, 7, 1));
    }
}
