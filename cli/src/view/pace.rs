//! How far a migration is and how it gets on: percent, what is left, rate, time left, what it waits
//! for; and how iterations are counted.
//!
//! **Iterations** are counted in one way everywhere, in tables, pages, the demo and the metric: the
//! rounds over memory that have begun, the one that sends everything (number 0) and the one that
//! sends the rest while the VM is paused included. A migration without a writing guest has 2.
//!
//! **Percent** is the share of guest memory that the destination holds as it was at the last look
//! at the dirty log. It rises to 100 in iteration 0 and falls back a little at each later one, by
//! what the guest wrote meanwhile.

use std::time::Duration;

use slat_proto::v1;

use super::words::per_second;
use crate::term::{
    table::NONE,
    units::{Rate, Size, Span},
};

/// Iterations that have begun; `None` before the first.
pub(crate) fn iterations(progress: &v1::MigrationProgress) -> Option<u32> {
    let last = progress.iterations.last().map(|last| last.iteration);
    let begun = last.is_some() || progress.total_bytes > 0 || progress.bytes_transferred > 0;
    begun.then(|| last.unwrap_or(0).max(progress.iteration).saturating_add(1))
}

/// Whether pages are being sent.
fn sends(phase: v1::MigrationPhase) -> bool {
    use v1::MigrationPhase::{Cancelling, PrecopyActive, Switchover};
    matches!(phase, PrecopyActive | Switchover | Cancelling)
}

/// Share of memory that the destination holds; `None` where that says nothing.
pub(crate) fn percent(migration: &v1::Migration) -> Option<u64> {
    use v1::MigrationPhase::{Committed, Completed};
    if matches!(migration.phase(), Committed | Completed) {
        return Some(100);
    }
    let progress = migration.progress.as_ref()?;
    let total = progress.total_bytes;
    if !sends(migration.phase()) || total == 0 {
        return None;
    }
    let over = total.saturating_sub(progress.remaining_bytes);
    u64::try_from(u128::from(over) * 100 / u128::from(total)).ok()
}

/// Until what is left of this iteration is sent, at the present rate; `None` where nobody can know.
pub(crate) fn time_left(migration: &v1::Migration) -> Option<Duration> {
    let progress = migration.progress.as_ref()?;
    let rate = progress.throughput_bytes_per_second;
    if !sends(migration.phase()) || rate == 0 {
        return None;
    }
    let nanos = u128::from(progress.remaining_bytes) * 1_000_000_000 / u128::from(rate);
    Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
}

/// What it waits for, and how far that is: `hosts/b (destination) to populate its memory, 25 %`.
pub(super) fn waiting(migration: &v1::Migration) -> Option<String> {
    if migration.waiting_for.is_empty() {
        return None;
    }
    let mut words = migration.waiting_for.clone();
    let total = migration
        .progress
        .as_ref()
        .map_or(0, |progress| progress.total_bytes);
    let there = migration.populated_bytes;
    if there > 0 && (total == 0 || there < total) {
        words.push_str(
            &match (u128::from(there) * 100).checked_div(u128::from(total)) {
                Some(percent) => format!(", {percent} % of {} is there", Size(total)),
                None => format!(", {} is there", Size(there)),
            },
        );
    }
    Some(words)
}

/// Lines of a running migration's page; none for one that has ended.
pub(super) fn lines(migration: &v1::Migration) -> Vec<(&'static str, String)> {
    let since = super::words::since(migration.waiting_since.as_ref());
    let since = since.map_or_else(String::new, |since| format!(" (for {})", Span(since)));
    let waits = waiting(migration).map(|words| ("waits for", format!("{words}{since}")));
    waits.into_iter().chain(sending(migration)).collect()
}

fn sending(migration: &v1::Migration) -> Vec<(&'static str, String)> {
    let Some(progress) = &migration.progress else {
        return Vec::new();
    };
    if !sends(migration.phase()) {
        return Vec::new();
    }
    let words = |rate: u64| match rate {
        0 => NONE.to_owned(),
        rate => Rate(rate).to_string(),
    };
    vec![
        (
            "progress",
            format!(
                "{} % of {} is at the destination; iteration {}: {} left",
                percent(migration).unwrap_or(0),
                Size(progress.total_bytes),
                progress.iteration,
                Size(progress.remaining_bytes),
            ),
        ),
        ("rate", words(progress.throughput_bytes_per_second)),
        (
            "time left",
            time_left(migration).map_or_else(
                || "not known yet".to_owned(),
                |left| format!("{} in this iteration, at this rate", Span(left)),
            ),
        ),
        ("dirty rate", words(progress.dirty_rate_bytes_per_second)),
        (
            "expected downtime",
            progress.expected_downtime.as_ref().map_or_else(
                || "not known yet".to_owned(),
                |expected| super::words::span(Some(expected)),
            ),
        ),
    ]
}

/// Bytes over the time of an iteration, as a rate; `-` for no time.
pub(super) fn rate(bytes: u64, time: Duration) -> String {
    per_second(bytes, time).map_or_else(|| NONE.to_owned(), |rate| Rate(rate).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sends_now(remaining: u64, rate: u64) -> v1::Migration {
        v1::Migration {
            phase: v1::MigrationPhase::PrecopyActive.into(),
            progress: Some(v1::MigrationProgress {
                total_bytes: 512 << 20,
                remaining_bytes: remaining,
                throughput_bytes_per_second: rate,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn percent_rate_and_time_left_are_known_only_while_pages_are_sent() {
        let migration = sends_now(128 << 20, 64 << 20);
        assert_eq!(percent(&migration), Some(75));
        assert_eq!(time_left(&migration), Some(Duration::from_secs(2)));
        assert_eq!(time_left(&sends_now(1, 0)), None, "before there is a rate");
        let mut ended = sends_now(1 << 20, 1);
        ended.phase = v1::MigrationPhase::Failed.into();
        assert_eq!((percent(&ended), time_left(&ended)), (None, None));
        ended.phase = v1::MigrationPhase::Completed.into();
        assert_eq!(percent(&ended), Some(100));
    }

    #[test]
    fn what_a_migration_waits_for_is_said_and_how_far_it_is() {
        let mut migration = v1::Migration {
            phase: v1::MigrationPhase::Preparing.into(),
            waiting_for: "hosts/b (destination) to populate its memory".into(),
            populated_bytes: 128 << 20,
            ..Default::default()
        };
        let text = "hosts/b (destination) to populate its memory";
        assert_eq!(
            waiting(&migration),
            Some(format!("{text}, 128 MiB is there"))
        );
        migration.progress = Some(v1::MigrationProgress {
            total_bytes: 512 << 20,
            ..Default::default()
        });
        let words = format!("{text}, 25 % of 512 MiB is there");
        assert_eq!(waiting(&migration), Some(words.clone()));
        assert_eq!(lines(&migration), [("waits for", words)]);
        migration.waiting_for.clear();
        assert_eq!(waiting(&migration), None);
    }

    #[test]
    fn iterations_count_the_first_and_the_paused_one() {
        let mut progress = v1::MigrationProgress::default();
        assert_eq!(iterations(&progress), None);
        progress.total_bytes = 1;
        assert_eq!(iterations(&progress), Some(1), "the first has begun");
        progress.iteration = 1;
        progress.iterations = vec![v1::MigrationIteration::default()];
        assert_eq!(
            iterations(&progress),
            Some(2),
            "as many as begun, not as ended"
        );
        // A long history is kept in part: numbers count, not entries.
        progress.iterations.push(v1::MigrationIteration {
            iteration: 7,
            r#final: true,
            ..Default::default()
        });
        assert_eq!(iterations(&progress), Some(8));
    }
}
