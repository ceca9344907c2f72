//! The progress of the last migrations as points of a chart, bounded, and the bytes that they sent.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Value, json};
use slat_proto::{model::std_duration, v1};

/// Points of one migration.
const MAX_POINTS: usize = 2000;
/// Points of one migration in an answer; iterations keep their first and last one.
const SHOWN_POINTS: usize = 400;
/// Migrations that have points.
const MAX_MIGRATIONS: usize = 200;
/// Progress of one iteration closer than this in time is one point.
const POINT_STEP_MILLIS: u64 = 50;

#[derive(Clone)]
struct Point {
    at: u64,
    iteration: u32,
    remaining: u64,
    transferred: u64,
    throughput: u64,
    dirty_rate: u64,
    /// Seconds; absent before there is an estimate.
    expected_downtime: Option<f64>,
    phase: &'static str,
}

#[derive(Default)]
struct Track {
    points: VecDeque<Point>,
    last: u64,
    transferred: u64,
    /// When bytes were last seen to move.
    moved: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Progress {
    /// By migration.
    tracks: BTreeMap<String, Track>,
}

impl Progress {
    /// Keeps a migration's progress. Answers with the bytes that it has sent since it was last
    /// heard of.
    pub(super) fn keep(&mut self, migration: &v1::Migration, at: u64) -> u64 {
        let track = self.tracks.entry(migration.name.clone()).or_insert(Track {
            moved: at,
            ..Track::default()
        });
        track.last = at;
        let mut sent = 0;
        if let Some(progress) = &migration.progress {
            sent = progress.bytes_transferred.saturating_sub(track.transferred);
            if sent > 0 {
                track.moved = at;
                track.transferred = progress.bytes_transferred;
            }
            track.push(Point {
                at,
                iteration: progress.iteration,
                remaining: progress.remaining_bytes,
                transferred: progress.bytes_transferred,
                throughput: progress.throughput_bytes_per_second,
                dirty_rate: progress.dirty_rate_bytes_per_second,
                expected_downtime: progress
                    .expected_downtime
                    .as_ref()
                    .map(|duration| std_duration(Some(duration)).as_secs_f64()),
                phase: migration.phase().as_str_name(),
            });
        }
        while self.tracks.len() > MAX_MIGRATIONS {
            let oldest = self
                .tracks
                .iter()
                .filter(|(name, _)| **name != migration.name)
                .min_by_key(|(_, track)| track.last)
                .map(|(name, _)| name.clone());
            let Some(oldest) = oldest else { break };
            self.tracks.remove(&oldest);
        }
        sent
    }

    /// When a migration's bytes were last seen to move, milliseconds since 1970.
    pub(super) fn moved(&self, migration: &str) -> Option<u64> {
        self.tracks.get(migration).map(|track| track.moved)
    }

    /// One migration's points, oldest first.
    pub(super) fn json(&self, migration: &str) -> Value {
        self.tracks
            .get(migration)
            .map_or_else(|| json!([]), Track::json)
    }
}

impl Track {
    fn push(&mut self, point: Point) {
        let close = self.points.back().is_some_and(|last| {
            last.iteration == point.iteration
                && last.phase == point.phase
                && point.at.saturating_sub(last.at) < POINT_STEP_MILLIS
        });
        if !close {
            self.points.push_back(point);
        }
        if self.points.len() > MAX_POINTS {
            self.points.pop_front();
        }
    }

    fn json(&self) -> Value {
        let every = self.points.len().div_ceil(SHOWN_POINTS).max(1);
        let turns = |at: usize, other: Option<usize>| {
            let other = other.and_then(|other| self.points.get(other));
            other.is_none_or(|other| other.iteration != self.points[at].iteration)
        };
        // With very many iterations even their ends are thinned.
        let ends = self
            .points
            .iter()
            .zip(self.points.iter().skip(1))
            .filter(|(one, next)| one.iteration != next.iteration)
            .count();
        let keep_ends = ends <= SHOWN_POINTS / 4;
        self.points
            .iter()
            .enumerate()
            .filter(|(at, _)| {
                at % every == 0
                    || *at + 1 == self.points.len()
                    || (keep_ends && (turns(*at, at.checked_sub(1)) || turns(*at, Some(at + 1))))
            })
            .map(|(_, p)| {
                json!([
                    p.at,
                    p.iteration,
                    p.remaining,
                    p.transferred,
                    p.throughput,
                    p.dirty_rate,
                    p.expected_downtime,
                    p.phase
                ])
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(name: &str, iteration: u32, sent: u64) -> v1::Migration {
        v1::Migration {
            name: name.into(),
            progress: Some(v1::MigrationProgress {
                iteration,
                bytes_transferred: sent,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn points_are_bounded_and_keep_iterations_apart_and_old_migrations_go() {
        let mut progress = Progress::default();
        for (at, iteration) in [(1, 0), (2, 0), (3, 1), (100, 1)] {
            progress.keep(&migration("m", iteration, 0), at);
        }
        assert_eq!(progress.json("m").as_array().unwrap().len(), 3);
        for at in 0..10_000u32 {
            progress.keep(&migration("m", at, 0), u64::from(at) * 100);
        }
        let shown = progress.json("m").as_array().unwrap().len();
        assert!((300..=2 * SHOWN_POINTS).contains(&shown), "{shown}");
        for i in 0..MAX_MIGRATIONS {
            progress.keep(&migration(&format!("n{i}"), 0, 0), 2_000_000);
        }
        assert!(progress.json("m").as_array().unwrap().is_empty());
    }

    #[test]
    fn bytes_are_told_once() {
        let mut progress = Progress::default();
        assert_eq!(progress.keep(&migration("m", 0, 10), 1), 10);
        assert_eq!(progress.keep(&migration("m", 0, 10), 2), 0);
        assert_eq!(progress.moved("m"), Some(1));
        assert_eq!(progress.keep(&migration("m", 1, 25), 3), 15);
        // No estimate is null, never 0.
        assert!(progress.json("m")[0][6].is_null());
    }
}
