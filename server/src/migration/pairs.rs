//! What switchovers between two hosts were made of, remembered for the next one.
//!
//! A source's process ends when its VM has left, so it cannot remember; an agent knows one side of
//! its pairs. Here all outcomes come together. Nothing is stored for it: the records of migrations
//! have the measurements, and at start this memory is filled from the newest of them, so the two
//! can never disagree.
//!
//! Kept are the costs that only a switchover can measure (pause, state, resume), without what is
//! measured anew each time (round trips, appends to journals). Of each pair the last [`EACH`] count.
//! What is expected is the median of those that are [`FRESH`], and the least of all where none is;
//! what a switchover costs at least is said only while [`ENOUGH`] are fresh. So a busy moment of
//! two hosts is no reason to refuse a limit for ever: a refused migration measures nothing.
//!
//! *Locking*: one mutex, held for a look-up or an insertion.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use slat_proto::{
    model::{now, proto_duration, std_duration},
    v1::{self, MigrationPhase as Phase},
};

/// Migrations remembered of each pair.
const EACH: usize = 8;
/// What was measured within this time is what the hosts are like now.
const FRESH: Duration = Duration::from_secs(600);
/// So many fresh ones say what a switchover costs at least.
const ENOUGH: usize = 3;
/// Pairs remembered; the one that was used longest ago goes.
const PAIRS: usize = 4096;
/// Records that the memory is filled from at start.
pub(super) const RECORDS: usize = 1000;

/// What one switchover measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Measured {
    pause: Option<Duration>,
    state: Option<Duration>,
    resume: Option<Duration>,
    /// Seconds since 1970, of this server's clock.
    at: i64,
}

impl Measured {
    fn of(migration: &v1::Migration) -> Option<Self> {
        let progress = migration.progress.as_ref()?;
        if migration.phase() != Phase::Completed || progress.downtime.is_none() {
            return None;
        }
        let parts = progress.downtime_breakdown.as_ref()?;
        let costs = progress.prediction.as_ref()?.costs.as_ref()?;
        let known = |cost: &Option<prost_types::Duration>| {
            cost.as_ref().map(|cost| std_duration(Some(cost)))
        };
        let answer = known(&costs.round_trip)? + known(&costs.destination_sync)?;
        let paused = known(&costs.pause) == Some(Duration::ZERO);
        let rest = |part| known(part).map(|part: Duration| part.saturating_sub(answer));
        Some(Self {
            // A VM that did not run says nothing of one that does.
            pause: known(&parts.pause).filter(|_| !paused),
            // With a digest of all memory it says nothing of one without.
            state: rest(&parts.state).filter(|_| costs.digest.is_none()),
            resume: rest(&parts.resume),
            at: migration.end_time.map_or(0, |time| time.seconds),
        })
    }
}

#[derive(Debug, Default)]
struct Known {
    last: VecDeque<Measured>,
    /// When it was added to, as a count.
    used: u64,
}

#[derive(Debug, Default)]
struct Memory {
    /// By source and destination.
    pairs: BTreeMap<(String, String), Known>,
    clock: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pairs(Mutex<Memory>);

impl Pairs {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Only whole insertions and removals happen under it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what a migration measured; no effect of one that measured nothing.
    pub(super) fn learn(&self, migration: &v1::Migration) {
        let Some(measured) = Measured::of(migration) else {
            return;
        };
        let pair = (migration.source.clone(), migration.destination.clone());
        let mut memory = self.memory();
        memory.clock += 1;
        let used = memory.clock;
        let known = memory.pairs.entry(pair).or_default();
        known.used = used;
        known.last.push_back(measured);
        if known.last.len() > EACH {
            known.last.pop_front();
        }
        if memory.pairs.len() > PAIRS {
            let oldest = memory.pairs.iter().min_by_key(|(_, known)| known.used);
            if let Some(oldest) = oldest.map(|(pair, _)| pair.clone()) {
                memory.pairs.remove(&oldest);
            }
        }
    }

    /// What is remembered of a pair.
    pub(super) fn of(&self, source: &str, destination: &str) -> Option<v1::RememberedCosts> {
        self.at(source, destination, now().seconds)
    }

    fn at(&self, source: &str, destination: &str, now: i64) -> Option<v1::RememberedCosts> {
        let pair = (source.to_owned(), destination.to_owned());
        let memory = self.memory();
        let all = &memory.pairs.get(&pair)?.last;
        // A clock that was set back makes nothing old.
        let fresh: Vec<&Measured> = all
            .iter()
            .filter(|one| now - one.at < FRESH.as_secs().cast_signed())
            .collect();
        let least = costs(|of| all.iter().filter_map(of).min());
        let typical = costs(|of| {
            let mut sorted: Vec<Duration> = fresh.iter().filter_map(|one| of(one)).collect();
            sorted.sort_unstable();
            let median = sorted.get(sorted.len() / 2).copied();
            median.or_else(|| all.iter().filter_map(of).min())
        });
        Some(v1::RememberedCosts {
            typical: Some(typical),
            least: (fresh.len() >= ENOUGH).then_some(least),
            migrations: u32::try_from(all.len()).unwrap_or(u32::MAX),
        })
    }
}

/// The three costs, each chosen by `choose` from what `of` is of a measurement.
fn costs(
    choose: impl Fn(fn(&Measured) -> Option<Duration>) -> Option<Duration>,
) -> v1::DowntimeCosts {
    let cost = |of| choose(of).map(proto_duration);
    v1::DowntimeCosts {
        pause: cost(|one| one.pause),
        state: cost(|one| one.state),
        resume: cost(|one| one.resume),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn ms(millis: u32) -> Option<prost_types::Duration> {
        Some(proto_duration(millis * MS))
    }

    /// A migration whose switchover took `extra` ms for each part, beside 1 ms a round trip and
    /// 2 ms an append.
    fn migration(destination: &str, extra: u32) -> v1::Migration {
        v1::Migration {
            source: "hosts/a".into(),
            destination: destination.into(),
            phase: Phase::Completed.into(),
            end_time: Some(now()),
            progress: Some(v1::MigrationProgress {
                downtime: ms(100),
                downtime_breakdown: Some(v1::DowntimeBreakdown {
                    pause: ms(extra),
                    final_copy: ms(50),
                    state: ms(3 + extra),
                    commit: ms(2),
                    resume: ms(3 + 2 * extra),
                }),
                prediction: Some(v1::DowntimePrediction {
                    costs: Some(v1::DowntimeCosts {
                        round_trip: ms(1),
                        destination_sync: ms(2),
                        source_sync: ms(2),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pair_remembers_what_only_a_switchover_measures() {
        let pairs = Pairs::default();
        assert_eq!(pairs.of("hosts/a", "hosts/b"), None);
        for extra in [5, 40, 6] {
            pairs.learn(&migration("hosts/b", extra));
        }
        let known = pairs.of("hosts/a", "hosts/b").unwrap();
        assert_eq!(known.migrations, 3);
        let (typical, least) = (known.typical.unwrap(), known.least.unwrap());
        assert_eq!(
            (typical.pause, typical.state, typical.resume),
            (ms(6), ms(6), ms(12))
        );
        assert_eq!(
            (least.pause, least.state, least.resume),
            (ms(5), ms(5), ms(10))
        );
        assert_eq!(typical.round_trip, None, "measured anew each time");
        assert_eq!(
            pairs.of("hosts/b", "hosts/a"),
            None,
            "the way back is another"
        );
    }

    #[test]
    fn what_was_measured_long_ago_refuses_nothing() {
        let pairs = Pairs::default();
        for extra in [9, 5, 7, 40] {
            pairs.learn(&migration("hosts/b", extra));
        }
        let now = now().seconds;
        let fresh = pairs.at("hosts/a", "hosts/b", now).unwrap();
        assert_eq!(fresh.typical.unwrap().pause, ms(9));
        assert_eq!(fresh.least.unwrap().pause, ms(5));
        let later = now + FRESH.as_secs().cast_signed() + 60;
        let old = pairs.at("hosts/a", "hosts/b", later).unwrap();
        assert_eq!(old.typical.unwrap().pause, ms(5), "better than nothing");
        assert_eq!(old.least, None);
        // One or two may have been bad moments.
        let few = Pairs::default();
        few.learn(&migration("hosts/b", 9));
        assert_eq!(few.of("hosts/a", "hosts/b").unwrap().least, None);
    }

    #[test]
    fn one_that_failed_or_did_not_run_teaches_nothing_false() {
        let pairs = Pairs::default();
        let mut failed = migration("hosts/b", 5);
        failed.phase = Phase::Failed.into();
        pairs.learn(&failed);
        assert_eq!(pairs.of("hosts/a", "hosts/b"), None);
        let mut paused = migration("hosts/b", 5);
        let prediction = paused.progress.as_mut().unwrap().prediction.as_mut();
        prediction.unwrap().costs.as_mut().unwrap().pause = ms(0);
        pairs.learn(&paused);
        let known = pairs.of("hosts/a", "hosts/b").unwrap().typical.unwrap();
        assert_eq!((known.pause, known.state), (None, ms(5)));
    }

    #[test]
    fn the_memory_is_bounded() {
        let pairs = Pairs::default();
        for host in 0..PAIRS + 10 {
            for _ in 0..2 {
                pairs.learn(&migration(&format!("hosts/h{host}"), 1));
            }
        }
        (0..100).for_each(|extra| pairs.learn(&migration("hosts/b", extra)));
        assert_eq!(pairs.memory().pairs.len(), PAIRS);
        assert_eq!(pairs.of("hosts/a", "hosts/h0"), None, "the oldest went");
        let known = pairs.of("hosts/a", "hosts/b").unwrap();
        assert_eq!(known.migrations as usize, EACH);
        assert_eq!(known.least.unwrap().pause, ms(92));
    }
}
