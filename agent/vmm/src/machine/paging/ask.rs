//! What callers ask of a pager: which pages the guest touched, what is mapped, and to try its
//! source again.

use std::time::{Duration, Instant};

use slat_paging::wire::{Answer, Ask, Mapped};
use slat_proto::{ApiError, v1};

use super::super::{Machine, view::State};
use crate::pager::PagerError;

/// A pager answers about a piece within this.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pages asked about at once: an answer has place for every second of them.
const PIECE: u64 = 2048;
/// Runs of an answer at most, about, and questions for it.
const MOST_RUNS: usize = 8192;
const MOST_ASKED: u32 = 1024;

/// Adds a run, to the last one where they touch.
fn join(runs: &mut Vec<(u64, u64)>, gfn: u64, pages: u64) {
    match runs.last_mut() {
        Some((first, len)) if *first + *len == gfn => *len += pages,
        _ => runs.push((gfn, pages)),
    }
}

/// Whether frames lie in a range, all of them.
fn is_within(gfn: u64, pages: u64, first: u64, len: u64) -> bool {
    let end = gfn.checked_add(pages);
    pages > 0 && gfn >= first && end.is_some_and(|end| end <= first + len)
}

impl Machine {
    /// CAPABILITY_MISSING unless a pager resolves the guest's faults; PAGER_UNREACHABLE when one is
    /// going to.
    pub(super) fn check_paged_now(&self) -> Result<(), ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if self.is_watched() {
            return Ok(());
        }
        if self.is_paged_by_agent() || self.watching().is_wanted() {
            return Err(self.paged(PagerError::NotYet));
        }
        let error = ApiError::capability_missing(&self.shared.vm, v1::Capability::Paging);
        Err(error.with("advice", "create the VM with paging AGENT"))
    }

    /// Frames (first, pages) that were mapped, whose mappings are gone now; how many pages, and how
    /// long it took.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; CAPABILITY_MISSING; BAD_PARAMETER when not all of `range` lies in
    /// slots; PAGER_UNREACHABLE and the pager's.
    pub(crate) fn harvest_working_set(
        &self,
        range: Option<(u64, u64)>,
    ) -> Result<(Vec<(u64, u64)>, Duration), ApiError> {
        self.check_paged_now()?;
        let begun = Instant::now();
        let mut runs = Vec::new();
        for (gfn, pages) in self.pieces(range)? {
            let mut at = gfn;
            while at < gfn + pages {
                let here = PIECE.min(gfn + pages - at);
                let age = Ask::Age {
                    gfn: at,
                    pages: here,
                };
                let answer = self.pager.ask(age, PATIENCE);
                if let Answer::Frames(frames) = answer.map_err(|error| self.paged(error))? {
                    // A pager may say anything.
                    let within = |(gfn, pages): &(u64, u64)| is_within(*gfn, *pages, at, here);
                    let found: Vec<(u64, u64)> = frames.into_iter().filter(within).collect();
                    self.tell_readers(&found);
                    for (gfn, pages) in found {
                        join(&mut runs, gfn, pages);
                    }
                }
                at += here;
            }
        }
        Ok((runs, begun.elapsed()))
    }

    /// Runs of mappings from a frame on, and where to go on; `None` at the end.
    ///
    /// # Errors
    /// As [`Machine::harvest_working_set`].
    pub(crate) fn list_mappings(
        &self,
        from_gfn: u64,
    ) -> Result<(Vec<Mapped>, Option<u64>), ApiError> {
        self.check_paged_now()?;
        let (mut runs, mut asked) = (Vec::new(), 0);
        for (gfn, pages) in self.pieces(None)? {
            let end = gfn + pages;
            let mut at = gfn.max(from_gfn);
            while at < end {
                if runs.len() >= MOST_RUNS || asked == MOST_ASKED {
                    return Ok((runs, Some(at)));
                }
                asked += 1;
                let mapped = Ask::Mapped {
                    gfn: at,
                    pages: end - at,
                };
                let answer = self.pager.ask(mapped, PATIENCE);
                match answer.map_err(|error| self.paged(error))? {
                    Answer::Mapped { runs: more, next } if next > at => {
                        let within = |run: &Mapped| is_within(run.gfn, run.pages, at, end - at);
                        runs.extend(more.into_iter().filter(within));
                        at = next;
                    }
                    _ => break,
                }
            }
        }
        Ok((runs, None))
    }

    /// Has a source that failed tried again.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; PAGER_UNREACHABLE and the pager's.
    pub(crate) fn retry_page_source(&self) -> Result<v1::Vm, ApiError> {
        self.shared.identity(&self.shared.view())?;
        if self.pager.has_source() {
            let asked = self.pager.ask(Ask::Retry, PATIENCE);
            asked.map_err(|error| self.paged(error))?;
        }
        self.shown()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_are_one() {
        let mut runs = Vec::new();
        for (gfn, pages) in [(0, 2), (2, 3), (6, 1), (7, 1)] {
            join(&mut runs, gfn, pages);
        }
        assert_eq!(runs, [(0, 5), (6, 2)]);
    }

    #[test]
    fn what_a_pager_says_of_other_frames_is_passed_over() {
        assert!(is_within(4, 4, 4, 4) && is_within(5, 1, 4, 4));
        for (gfn, pages) in [(3, 2), (4, 5), (8, 1), (5, 0), (5, u64::MAX)] {
            assert!(!is_within(gfn, pages, 4, 4), "{gfn} {pages}");
        }
    }
}
