//! One line of a chart: the samples of one VM's or one host's counters, bounded in number.
//!
//! # Invariants
//! * Counters only grow within one `run` of a line. A VM has a run for each of its processes (a
//!   migration begins a new one, at 0); a host has one.
//! * The newest sample of the running run is always kept. Older ones are thinned to the step that
//!   the owner asks for: what lies between two samples is their difference, so nothing is lost but
//!   resolution.
//! * A reading that repeats the one before says nothing until [`REPEATED`] has passed: agents
//!   report the last thing a VM said, which may be the same twice, and a rate would show that as a
//!   saw tooth.

use std::collections::VecDeque;

/// Counters of a sample: see [`super::Rate`].
pub(super) const COUNTERS: usize = 5;
/// A counter that is not offered.
pub(super) const ABSENT: u64 = u64::MAX;
/// A reading equal to the last one is news after this many milliseconds: nothing happened.
const REPEATED: u64 = 2_500;
/// Runs of one line that are told apart; more than that within ten minutes are not.
const MAX_RUNS: usize = 16;

/// The counters of one line at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    /// Milliseconds since 1970.
    pub(super) at: u64,
    /// Which run of the line.
    pub(super) run: u32,
    pub(super) counters: [u64; COUNTERS],
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ring {
    samples: VecDeque<Sample>,
    /// What makes a run one (host, process id and epoch), oldest first, with its number.
    runs: VecDeque<(String, u32)>,
    next_run: u32,
}

impl Ring {
    pub(super) fn samples(&self) -> &VecDeque<Sample> {
        &self.samples
    }

    /// The number of a run, new or known.
    pub(super) fn run(&mut self, process: &str) -> u32 {
        if let Some((_, run)) = self.runs.iter().find(|(known, _)| known == process) {
            return *run;
        }
        let run = self.next_run;
        self.next_run = self.next_run.wrapping_add(1);
        self.runs.push_back((process.to_owned(), run));
        if self.runs.len() > MAX_RUNS {
            self.runs.pop_front();
        }
        run
    }

    /// The newest sample of a run.
    pub(super) fn last_of(&self, run: u32) -> Option<&Sample> {
        self.samples.iter().rev().find(|sample| sample.run == run)
    }

    /// Keeps a sample; `cap` samples at most, older ones `step` milliseconds apart.
    pub(super) fn push(&mut self, sample: Sample, cap: usize, step: u64) {
        let newest = self.samples.back().copied();
        if let Some(newest) = newest.filter(|newest| newest.run == sample.run) {
            let since = sample.at.saturating_sub(newest.at);
            if newest.counters == sample.counters && since < REPEATED {
                return;
            }
            let before = self.samples.iter().rev().nth(1);
            let close = before.is_some_and(|before| {
                before.run == sample.run && sample.at.saturating_sub(before.at) < step
            });
            if close {
                self.samples.pop_back();
            }
        }
        self.samples.push_back(sample);
        if self.samples.len() > cap {
            self.thin();
        }
    }

    /// Drops every second sample, but the first and the last of each run: the line keeps its span.
    fn thin(&mut self) {
        let all: Vec<Sample> = self.samples.drain(..).collect();
        let mut odd = false;
        for (index, sample) in all.iter().enumerate() {
            let other = |at: Option<usize>| {
                at.and_then(|at| all.get(at))
                    .is_none_or(|next| next.run != sample.run)
            };
            odd = !odd;
            if odd || other(index.checked_sub(1)) || other(index.checked_add(1)) {
                self.samples.push_back(*sample);
            }
        }
    }

    /// Drops what is older than `oldest`. True when nothing is left.
    pub(super) fn expire(&mut self, oldest: u64) -> bool {
        while self
            .samples
            .front()
            .is_some_and(|sample| sample.at < oldest)
        {
            self.samples.pop_front();
        }
        self.samples.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: u64, run: u32, count: u64) -> Sample {
        Sample {
            at,
            run,
            counters: [count, ABSENT, ABSENT, ABSENT, 0],
        }
    }

    #[test]
    fn a_ring_keeps_its_span_and_its_newest_sample_within_its_bound() {
        let mut ring = Ring::default();
        for i in 0..10_000 {
            ring.push(sample(i * 1000, 0, i + 1), 100, 3000);
        }
        assert!(ring.samples().len() <= 100, "{}", ring.samples().len());
        assert_eq!(ring.samples().front().unwrap().at, 0);
        assert_eq!(ring.samples().back().unwrap().counters[0], 10_000);
        assert!(!ring.expire(9_000_000));
        assert!(ring.samples().front().unwrap().at >= 9_000_000);
        assert!(ring.expire(u64::MAX));
    }

    #[test]
    fn a_repeated_reading_is_no_sample_until_it_means_that_nothing_happens() {
        let mut ring = Ring::default();
        for at in [0, 1000, 2000] {
            ring.push(sample(at, 0, 5), 100, 0);
        }
        assert_eq!(ring.samples().len(), 1);
        ring.push(sample(3000, 0, 5), 100, 0);
        assert_eq!(ring.samples().len(), 2);
    }

    #[test]
    fn runs_are_told_apart_and_bounded() {
        let mut ring = Ring::default();
        let first = ring.run("a");
        assert_ne!(ring.run("b"), first);
        assert_eq!(ring.run("a"), first);
        for i in 0..100 {
            ring.run(&i.to_string());
        }
        assert_eq!(ring.runs.len(), MAX_RUNS);
    }
}
