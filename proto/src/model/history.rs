//! Bounded histories of a migration: the first entries, the last entries, and what is between added
//! up.
//!
//! A migration may have a million iterations; its record, its messages and whoever shows it must
//! not grow with them. Entries go in through [`v1::MigrationProgress::push_iteration`] and
//! [`v1::MigrationProgress::push_decision`] alone, and [`v1::MigrationProgress::bound_histories`]
//! brings what another program sent to the same form.
//!
//! # Invariants
//! At most [`HISTORY_ENDS`] entries of each kind, in order; an entry is either listed or counted in
//! the summary, never both.

use std::time::Duration;

use super::time::{proto_duration, std_duration};
use crate::v1;

/// How many of the first and of the last entries a history keeps.
pub const HISTORY_ENDS: (usize, usize) = (16, 48);

/// Longest cause of a decision, bytes; a longer one is cut.
const MAX_CAUSE: usize = 400;

impl v1::MigrationProgress {
    /// Adds an iteration.
    pub fn push_iteration(&mut self, iteration: v1::MigrationIteration) {
        let (first, last) = HISTORY_ENDS;
        self.iterations.push(iteration);
        while self.iterations.len() > first + last {
            let gone = self.iterations.remove(first);
            self.iterations_between.get_or_insert_default().add(&gone);
        }
    }

    /// Adds a decision.
    pub fn push_decision(&mut self, mut decision: v1::MigrationDecision) {
        let (first, last) = HISTORY_ENDS;
        cut(&mut decision.cause);
        self.decisions.push(decision);
        while self.decisions.len() > first + last {
            let gone = self.decisions.remove(first);
            self.decisions_between.get_or_insert_default().add(&gone);
        }
    }

    /// How many iterations there have been, listed or not.
    #[must_use]
    pub fn iterations_done(&self) -> u64 {
        let between = self.iterations_between.as_ref().map_or(0, |sum| sum.count);
        self.iterations.len() as u64 + u64::from(between)
    }

    /// Brings histories that another program sent to their bounds.
    pub fn bound_histories(&mut self) {
        let (first, last) = HISTORY_ENDS;
        if self.iterations.len() > first + last {
            for iteration in std::mem::take(&mut self.iterations) {
                self.push_iteration(iteration);
            }
        }
        self.decisions
            .iter_mut()
            .for_each(|decision| cut(&mut decision.cause));
        if self.decisions.len() > first + last {
            for decision in std::mem::take(&mut self.decisions) {
                self.push_decision(decision);
            }
        }
    }

    /// Leaves the histories out, for a message whose receiver has them or does not read them.
    pub fn omit_histories(&mut self) {
        self.iterations.clear();
        self.iterations_between = None;
        self.decisions.clear();
        self.decisions_between = None;
        self.histories_omitted = true;
    }

    /// Adds every entry up, for a list of many migrations: counts stay, entries go.
    pub fn summarize_histories(&mut self) {
        for iteration in std::mem::take(&mut self.iterations) {
            self.iterations_between
                .get_or_insert_default()
                .add(&iteration);
        }
        for decision in std::mem::take(&mut self.decisions) {
            self.decisions_between
                .get_or_insert_default()
                .add(&decision);
        }
        self.histories_omitted = true;
    }

    /// Where histories were left out, takes those of `known`, what was sent before.
    pub fn restore_histories(&mut self, known: Option<&Self>) {
        if !std::mem::take(&mut self.histories_omitted) {
            return;
        }
        let Some(known) = known else { return };
        self.iterations.clone_from(&known.iterations);
        self.iterations_between = known.iterations_between;
        self.decisions.clone_from(&known.decisions);
        self.decisions_between = known.decisions_between;
    }
}

fn cut(cause: &mut String) {
    if cause.len() > MAX_CAUSE {
        let end = (0..=MAX_CAUSE).rev().find(|at| cause.is_char_boundary(*at));
        cause.truncate(end.unwrap_or(0));
    }
}

/// The lesser or greater of two durations that may be unset.
fn extreme(
    a: Option<prost_types::Duration>,
    b: Option<prost_types::Duration>,
    choose: fn(Duration, Duration) -> Duration,
) -> Option<prost_types::Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(proto_duration(choose(
            std_duration(Some(&a)),
            std_duration(Some(&b)),
        ))),
        (a, b) => a.or(b),
    }
}

impl v1::IterationSummary {
    fn add(&mut self, gone: &v1::MigrationIteration) {
        if self.count == 0 {
            self.first_iteration = gone.iteration;
            self.last_iteration = gone.iteration;
            self.least_dirty_pages = gone.dirty_pages;
        }
        self.count = self.count.saturating_add(1);
        // A list is added up in any order: what was between, after the first entries.
        self.first_iteration = self.first_iteration.min(gone.iteration);
        self.last_iteration = self.last_iteration.max(gone.iteration);
        let sum = |total: &mut u64, more: u64| *total = total.saturating_add(more);
        sum(&mut self.bytes_transferred, gone.bytes_transferred);
        sum(&mut self.pages_normal, gone.pages_normal);
        sum(&mut self.pages_zero, gone.pages_zero);
        let duration = std_duration(self.duration.as_ref());
        let duration = duration.saturating_add(std_duration(gone.duration.as_ref()));
        self.duration = Some(proto_duration(duration));
        self.least_dirty_pages = self.least_dirty_pages.min(gone.dirty_pages);
        self.most_dirty_pages = self.most_dirty_pages.max(gone.dirty_pages);
        let expected = gone.expected_downtime;
        self.least_expected_downtime =
            extreme(self.least_expected_downtime, expected, Duration::min);
        self.most_expected_downtime = extreme(self.most_expected_downtime, expected, Duration::max);
    }
}

impl v1::DecisionSummary {
    fn add(&mut self, gone: &v1::MigrationDecision) {
        if self.count == 0 {
            self.first_iteration = gone.iteration;
            self.last_iteration = gone.iteration;
            self.first_time = gone.time;
            self.last_time = gone.time;
        }
        self.count = self.count.saturating_add(1);
        if gone.iteration <= self.first_iteration {
            self.first_iteration = gone.iteration;
            self.first_time = gone.time;
        }
        if gone.iteration >= self.last_iteration {
            self.last_iteration = gone.iteration;
            self.last_time = gone.time;
        }
        let resumed = gone.action() == v1::migration_decision::Action::ResumePrecopy;
        self.resumed = self.resumed.saturating_add(resumed.into());
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn iteration(number: u32) -> v1::MigrationIteration {
        v1::MigrationIteration {
            iteration: number,
            bytes_transferred: 1000,
            pages_normal: 2,
            pages_zero: 1,
            duration: Some(proto_duration(Duration::from_millis(3))),
            dirty_pages: u64::from(number % 7),
            expected_downtime: (number > 3)
                .then(|| proto_duration(Duration::from_micros(u64::from(number % 1000)))),
            ..Default::default()
        }
    }

    fn decision(number: u32) -> v1::MigrationDecision {
        v1::MigrationDecision {
            iteration: number,
            cause: "x".repeat(1000),
            ..Default::default()
        }
    }

    #[test]
    fn a_million_iterations_stay_small_and_nothing_is_lost_from_the_sums() {
        let mut progress = v1::MigrationProgress::default();
        for number in 0..1_000_000 {
            progress.push_iteration(iteration(number));
            progress.push_decision(decision(number));
        }
        assert!(
            progress.encoded_len() < 64 << 10,
            "{}",
            progress.encoded_len()
        );
        let (first, last) = HISTORY_ENDS;
        let numbers: Vec<u32> = progress
            .iterations
            .iter()
            .map(|one| one.iteration)
            .collect();
        let expected: Vec<u32> = (0..first as u32)
            .chain(1_000_000 - last as u32..1_000_000)
            .collect();
        assert_eq!(numbers, expected);
        assert_eq!(progress.iterations_done(), 1_000_000);
        let between = progress.iterations_between.unwrap();
        assert_eq!(u64::from(between.count), 1_000_000 - (first + last) as u64);
        assert_eq!(between.first_iteration as usize, first);
        assert_eq!(between.last_iteration as usize, 1_000_000 - last - 1);
        assert_eq!(between.bytes_transferred, u64::from(between.count) * 1000);
        assert_eq!(
            std_duration(between.duration.as_ref()),
            Duration::from_millis(3) * between.count
        );
        assert_eq!(
            (between.least_dirty_pages, between.most_dirty_pages),
            (0, 6)
        );
        assert_eq!(
            std_duration(between.most_expected_downtime.as_ref()),
            Duration::from_micros(999)
        );
        assert_eq!(progress.decisions.len(), first + last);
        assert_eq!(progress.decisions_between.unwrap().count, between.count);
    }

    #[test]
    fn what_another_program_sent_without_bounds_is_bounded() {
        let mut sent = v1::MigrationProgress {
            iterations: (0..5000).map(iteration).collect(),
            decisions: (0..5000).map(decision).collect(),
            ..Default::default()
        };
        sent.bound_histories();
        assert_eq!(sent.iterations_done(), 5000);
        assert!(sent.encoded_len() < 64 << 10, "{}", sent.encoded_len());
        let before = sent.clone();
        sent.bound_histories();
        assert_eq!(sent, before);
    }

    #[test]
    fn histories_that_were_left_out_are_as_last_sent() {
        let mut known = v1::MigrationProgress::default();
        (0..100).for_each(|number| known.push_iteration(iteration(number)));
        (0..3).for_each(|number| known.push_decision(decision(number)));
        let mut sent = known.clone();
        sent.omit_histories();
        assert!(sent.encoded_len() < 100, "{sent:?}");
        sent.restore_histories(Some(&known));
        assert_eq!(sent, known);
        let mut listed = known.clone();
        listed.summarize_histories();
        assert_eq!(listed.iterations_done(), 100);
        assert!(listed.encoded_len() < 200, "{listed:?}");
        let sum = listed.iterations_between.unwrap();
        assert_eq!((sum.first_iteration, sum.last_iteration), (0, 99));
        let mut whole = v1::MigrationProgress::default();
        whole.restore_histories(Some(&known));
        assert_eq!(whole.iterations_done(), 0, "what was sent whole is whole");
    }
}
