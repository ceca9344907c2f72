//! What a switchover would cost, predicted from measured parts: pure arithmetic.
//!
//! A switchover stops the vCPUs, harvests and sends the last pages, sends the state, and hands over
//! in two more round trips with three appends to journals:
//!
//! | part | predicted as |
//! |---|---|
//! | pause | pause |
//! | final copy | harvest, bytes left over the bandwidth of all streams, a round trip |
//! | state | state, digest, a round trip, an append at the destination (PREPARED) |
//! | commit | an append at the source (RELINQUISHED) |
//! | resume | resume, a round trip, an append at the destination (OWNED) |
//!
//! Round trips, appends and harvests are measured from the first connection on and at every
//! iteration. Pause, state and resume happen in a switchover only: until this migration has tried
//! one they are what earlier migrations between the two hosts measured. A cost that nobody has
//! measured counts as nothing and is named ([`Estimator::unknown`]).
//!
//! # Invariants
//! * More bytes never cost less. The least is never more than what is predicted for nothing dirty.
//! * The bandwidth is the one that the last pages will have: time that `max_bandwidth` held the
//!   senders up does not count.

use std::{collections::VecDeque, time::Duration};

use slat_proto::{
    model::{proto_duration, std_duration},
    v1,
};

/// Weight of the newest iteration in the bandwidth.
const ALPHA: f64 = 0.4;
/// Measurements of a cost that count.
const WINDOW: usize = 5;
/// An iteration with fewer bytes says what the bandwidth is at least, no more.
const MEASURABLE: u64 = 4 << 20;
/// A bandwidth near zero would overflow a `Duration`: a day says the same.
const FOREVER: f64 = 86_400.0;

/// One cost, as measured again and again. What is typical is the median of the last few: a moment in
/// which something else had the machine is not what the next one will be like.
#[derive(Clone, Debug, Default)]
struct Cost {
    typical: Option<Duration>,
    least: Option<Duration>,
    /// The last measurements of this migration.
    last: VecDeque<Duration>,
}

impl Cost {
    fn remembered(
        typical: Option<&prost_types::Duration>,
        least: Option<&prost_types::Duration>,
    ) -> Self {
        let known =
            |cost: Option<&prost_types::Duration>| cost.map(|cost| std_duration(Some(cost)));
        Self {
            typical: known(typical),
            least: known(least),
            last: VecDeque::new(),
        }
    }

    fn measured(&mut self, now: Duration) {
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back(now);
        let mut sorted: Vec<Duration> = self.last.iter().copied().collect();
        sorted.sort_unstable();
        self.typical = sorted.get(sorted.len() / 2).copied();
        self.least = Some(self.least.map_or(now, |least| least.min(now)));
    }

    fn typical(&self) -> Duration {
        self.typical.unwrap_or_default()
    }

    fn least(&self) -> Duration {
        self.least.unwrap_or_default().min(self.typical())
    }

    fn message(&self) -> Option<prost_types::Duration> {
        self.typical.map(proto_duration)
    }
}

/// What a switchover would cost, in the parts that are measured afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prediction {
    pub(crate) pause: Duration,
    /// With the harvest.
    pub(crate) final_copy: Duration,
    pub(crate) harvest: Duration,
    pub(crate) state: Duration,
    pub(crate) commit: Duration,
    pub(crate) resume: Duration,
    /// Because earlier attempts took longer than predicted.
    pub(crate) excess: Duration,
}

impl Prediction {
    pub(crate) fn total(&self) -> Duration {
        self.pause + self.final_copy + self.after_copy() + self.excess
    }

    /// From the last harvest on until the destination has the pages.
    pub(crate) fn copy(&self) -> Duration {
        self.final_copy - self.harvest
    }

    /// Once the destination has the last pages.
    pub(crate) fn after_copy(&self) -> Duration {
        self.state + self.commit + self.resume
    }

    fn breakdown(&self) -> v1::DowntimeBreakdown {
        v1::DowntimeBreakdown {
            pause: Some(proto_duration(self.pause)),
            final_copy: Some(proto_duration(self.final_copy)),
            state: Some(proto_duration(self.state)),
            commit: Some(proto_duration(self.commit)),
            resume: Some(proto_duration(self.resume)),
        }
    }
}

/// What is known of the costs so far. See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Estimator {
    /// Bytes a second over all streams.
    bandwidth: Option<f64>,
    pause: Cost,
    harvest: Cost,
    round_trip: Cost,
    source_sync: Cost,
    destination_sync: Cost,
    state: Cost,
    resume: Cost,
    digest: Option<Duration>,
    excess: Duration,
    /// The VM's vCPUs run: they are to be stopped.
    runs: bool,
}

impl Estimator {
    /// With what earlier migrations between the two hosts measured, and how long the last pause of
    /// this VM took.
    pub(crate) fn new(remembered: Option<&v1::RememberedCosts>, paused: Option<Duration>) -> Self {
        let typical = remembered
            .and_then(|known| known.typical)
            .unwrap_or_default();
        let least = remembered.and_then(|known| known.least).unwrap_or_default();
        let mut estimator = Self {
            pause: Cost::remembered(typical.pause.as_ref(), least.pause.as_ref()),
            state: Cost::remembered(typical.state.as_ref(), least.state.as_ref()),
            resume: Cost::remembered(typical.resume.as_ref(), least.resume.as_ref()),
            runs: true,
            ..Self::default()
        };
        if let Some(paused) = paused {
            estimator.pause.measured(paused);
        }
        estimator
    }

    pub(crate) fn runs(&mut self, runs: bool) {
        self.runs = runs;
    }

    pub(crate) fn paused(&mut self, took: Duration) {
        self.pause.measured(took);
    }

    pub(crate) fn harvested(&mut self, took: Duration) {
        self.harvest.measured(took);
    }

    pub(crate) fn round_trip(&mut self, took: Duration) {
        self.round_trip.measured(took);
    }

    pub(crate) fn source_synced(&mut self, took: Duration) {
        self.source_sync.measured(took);
    }

    pub(crate) fn destination_synced(&mut self, took: Duration) {
        self.destination_sync.measured(took);
    }

    /// All memory is to be digested before the commit.
    pub(crate) fn digest(&mut self, takes: Duration) {
        self.digest = Some(takes);
    }

    /// Pages of `bytes` were sent in `busy`, in which nothing but the wire held the senders up.
    pub(crate) fn sent(&mut self, bytes: u64, busy: Duration) {
        let rate = (bytes.max(1) as f64 / busy.as_secs_f64().max(1e-6)).max(1.0);
        self.bandwidth = Some(match self.bandwidth {
            Some(before) if bytes >= MEASURABLE || rate > before => {
                before + ALPHA * (rate - before)
            }
            Some(before) => before,
            None => rate,
        });
    }

    /// An attempt to switch over would have taken `total` where less was predicted.
    pub(crate) fn overran(&mut self, total: Duration, predicted: &Prediction) {
        let without = predicted.total().saturating_sub(predicted.excess);
        self.excess = self.excess.max(total.saturating_sub(without));
    }

    /// An iteration has ended since: what disturbed an attempt may have gone.
    pub(crate) fn calm(&mut self) {
        self.excess = self.excess.mul_f64(0.75);
    }

    /// Bytes a second of page data over all streams, as estimated so far.
    pub(crate) fn bandwidth(&self) -> Option<f64> {
        self.bandwidth
    }

    /// If the VM were stopped with `bytes` left to send. Unknown costs count as nothing.
    pub(crate) fn predict(&self, bytes: u64) -> Prediction {
        let pages = match self.bandwidth {
            Some(bandwidth) => Duration::from_secs_f64((bytes as f64 / bandwidth).min(FOREVER)),
            None => Duration::ZERO,
        };
        self.sum(Cost::typical, pages, self.excess)
    }

    /// What a switchover costs at least, with nothing left to send.
    pub(crate) fn least(&self) -> Prediction {
        self.sum(Cost::least, Duration::ZERO, Duration::ZERO)
    }

    fn sum(&self, of: fn(&Cost) -> Duration, pages: Duration, excess: Duration) -> Prediction {
        // A destination that does not tell is taken to be as its source.
        let destination_sync = match self.destination_sync.typical {
            Some(_) => of(&self.destination_sync),
            None => of(&self.source_sync),
        };
        let answer = of(&self.round_trip) + destination_sync;
        Prediction {
            pause: if self.runs {
                of(&self.pause)
            } else {
                Duration::ZERO
            },
            harvest: of(&self.harvest),
            final_copy: of(&self.harvest) + pages + of(&self.round_trip),
            state: of(&self.state) + self.digest.unwrap_or_default() + answer,
            commit: of(&self.source_sync),
            resume: of(&self.resume) + answer,
            excess,
        }
    }

    /// As [`Estimator::predict`], once there is a bandwidth and what every switchover costs was
    /// measured.
    pub(crate) fn expected_downtime(&self, bytes: u64) -> Option<Duration> {
        let known = self.bandwidth.is_some()
            && self.round_trip.typical.is_some()
            && self.source_sync.typical.is_some();
        known.then(|| self.predict(bytes).total())
    }

    /// Costs that nobody has measured.
    pub(crate) fn unknown(&self) -> Vec<&'static str> {
        [
            ("pause", self.runs && self.pause.typical.is_none()),
            ("harvest", self.harvest.typical.is_none()),
            ("bandwidth", self.bandwidth.is_none()),
            ("round_trip", self.round_trip.typical.is_none()),
            ("source_sync", self.source_sync.typical.is_none()),
            ("destination_sync", self.destination_sync.typical.is_none()),
            ("state", self.state.typical.is_none()),
            ("resume", self.resume.typical.is_none()),
        ]
        .into_iter()
        .filter_map(|(name, unknown)| unknown.then_some(name))
        .collect()
    }

    /// What is known, for whoever looks and whoever remembers.
    pub(crate) fn costs(&self) -> v1::DowntimeCosts {
        v1::DowntimeCosts {
            pause: if self.runs {
                self.pause.message()
            } else {
                Some(proto_duration(Duration::ZERO))
            },
            harvest: self.harvest.message(),
            round_trip: self.round_trip.message(),
            source_sync: self.source_sync.message(),
            destination_sync: self.destination_sync.message(),
            state: self.state.message(),
            resume: self.resume.message(),
            digest: self.digest.map(proto_duration),
            bandwidth_bytes_per_second: self.bandwidth.unwrap_or(0.0) as u64,
            excess: (!self.excess.is_zero()).then(|| proto_duration(self.excess)),
        }
    }

    /// The prediction at the end of `iteration` with `bytes` left to send.
    pub(crate) fn message(&self, iteration: u32, bytes: u64) -> v1::DowntimePrediction {
        let prediction = self.predict(bytes);
        v1::DowntimePrediction {
            total: Some(proto_duration(prediction.total())),
            parts: Some(prediction.breakdown()),
            costs: Some(self.costs()),
            unknown: self.unknown().into_iter().map(str::to_owned).collect(),
            iteration,
            remaining_bytes: bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// As between two processes of one machine: 100 us a round trip, 1 ms an append.
    fn local() -> Estimator {
        let mut estimator = Estimator::new(None, None);
        estimator.round_trip(micros(100));
        estimator.source_synced(MS);
        estimator.destination_synced(MS);
        estimator.harvested(micros(50));
        estimator
    }

    #[test]
    fn there_is_no_estimate_before_there_is_a_bandwidth_and_measured_parts() {
        let mut estimator = Estimator::new(None, None);
        assert_eq!(estimator.expected_downtime(0), None);
        estimator.sent(8 << 20, Duration::from_millis(8));
        assert_eq!(estimator.expected_downtime(0), None);
        estimator.round_trip(micros(100));
        assert_eq!(estimator.expected_downtime(0), None);
        estimator.source_synced(MS);
        assert!(estimator.expected_downtime(0).is_some());
        assert_eq!(
            estimator.unknown(),
            ["pause", "harvest", "destination_sync", "state", "resume"]
        );
    }

    #[test]
    fn each_part_counts_as_often_as_a_switchover_has_it() {
        let mut estimator = local();
        estimator.sent(100 << 20, Duration::from_secs(1));
        // Three round trips, three appends, one harvest, and 10 MiB at 100 MiB/s.
        let total = estimator.predict(10 << 20).total();
        assert_eq!(total, micros(300) + 3 * MS + micros(50) + 100 * MS);
        assert_eq!(estimator.least().total(), micros(300) + 3 * MS + micros(50));
    }

    #[test]
    fn what_is_remembered_counts_until_it_is_measured() {
        let costs = |ms: u32| {
            Some(v1::DowntimeCosts {
                pause: Some(proto_duration(ms * MS)),
                state: Some(proto_duration(2 * ms * MS)),
                resume: Some(proto_duration(3 * ms * MS)),
                // Measured anew each time: not taken over.
                source_sync: Some(proto_duration(100 * MS)),
                ..Default::default()
            })
        };
        let remembered = v1::RememberedCosts {
            typical: costs(2),
            least: costs(1),
            migrations: 3,
        };
        let mut estimator = Estimator::new(Some(&remembered), None);
        assert_eq!(estimator.predict(0).total(), 12 * MS);
        assert_eq!(estimator.least().total(), 6 * MS);
        estimator.paused(5 * MS);
        assert_eq!(estimator.predict(0).pause, 5 * MS);
        assert_eq!(estimator.least().pause, MS);
        estimator.runs(false);
        assert_eq!(estimator.predict(0).pause, Duration::ZERO);
        assert!(!estimator.unknown().contains(&"pause"));
    }

    #[test]
    fn an_attempt_that_overran_raises_the_estimate_for_a_while() {
        let mut estimator = local();
        estimator.sent(100 << 20, Duration::from_secs(1));
        let predicted = estimator.predict(0);
        estimator.overran(predicted.total() + 40 * MS, &predicted);
        assert_eq!(estimator.predict(0).total(), predicted.total() + 40 * MS);
        (0..40).for_each(|_| estimator.calm());
        assert!(estimator.predict(0).total() < predicted.total() + MS);
    }

    #[test]
    fn one_slow_moment_is_not_what_is_expected() {
        let mut estimator = local();
        let before = estimator.predict(0).total();
        estimator.source_synced(MS);
        estimator.source_synced(500 * MS);
        assert_eq!(estimator.predict(0).total(), before);
        (0..3).for_each(|_| estimator.source_synced(500 * MS));
        assert_eq!(
            estimator.predict(0).total(),
            before + 499 * MS,
            "but many are"
        );
        assert_eq!(estimator.least().total(), before);
    }

    #[test]
    fn small_iterations_never_lower_the_bandwidth() {
        let mut estimator = Estimator::new(None, None);
        estimator.sent(8 << 20, Duration::from_millis(10));
        let before = estimator.bandwidth().unwrap();
        estimator.sent(4096, Duration::from_millis(10));
        assert_eq!(estimator.bandwidth(), Some(before));
        estimator.sent(2 << 20, Duration::from_millis(1));
        assert!(estimator.bandwidth().unwrap() > before);
    }

    proptest! {
        /// Whatever is measured: nothing overflows, more bytes never cost less, the least is the
        /// least, and the parts add up.
        #[test]
        fn predictions_are_in_order(
            trips in proptest::collection::vec(0_u64..10_000_000, 0..20),
            syncs in proptest::collection::vec((0_u64..10_000_000, 0_u64..10_000_000), 0..20),
            sent in proptest::collection::vec((0_u64..1 << 44, 0_u64..10_000_000_000), 0..20),
            (few, more) in (0_u64..1 << 44, 0_u64..1 << 44),
            pause in proptest::option::of(0_u64..10_000_000),
        ) {
            let mut estimator = Estimator::new(None, pause.map(micros));
            trips.iter().for_each(|trip| estimator.round_trip(micros(*trip)));
            for (source, destination) in &syncs {
                estimator.source_synced(micros(*source));
                estimator.destination_synced(micros(*destination));
            }
            sent.iter().for_each(|(bytes, busy)| estimator.sent(*bytes, micros(*busy)));
            let (low, high) = (estimator.predict(few.min(more)), estimator.predict(few.max(more)));
            prop_assert!(low.total() <= high.total());
            prop_assert!(estimator.least().total() <= estimator.predict(0).total());
            prop_assert_eq!(
                high.total(),
                high.pause + high.final_copy + high.state + high.commit + high.resume
            );
            let known = !trips.is_empty() && !syncs.is_empty() && !sent.is_empty();
            prop_assert_eq!(estimator.expected_downtime(few).is_some(), known);
        }

        /// A cost that stays the same is predicted as what it is, whatever came before it.
        #[test]
        fn a_steady_cost_is_learned(first in 0_u64..1_000_000, steady in 1_u64..1_000_000) {
            let mut estimator = Estimator::new(None, None);
            estimator.round_trip(micros(first));
            (0..60).for_each(|_| estimator.round_trip(micros(steady)));
            let learned = estimator.predict(0).final_copy;
            let off = learned.abs_diff(micros(steady));
            prop_assert!(off <= micros(2), "{learned:?} for {steady} us");
        }
    }
}
