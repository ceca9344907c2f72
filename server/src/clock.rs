//! The wall clocks of hosts against the server's.
//!
//! Agents' clocks are whatever their hosts say. The times in what an agent sends are brought to the
//! server's clock before anything is kept or shown. What goes on to another host says what the
//! sender's clock is, and that host brings it to its own.
//!
//! # How an offset is measured
//! As NTP does it: a report says when it was sent (the agent's clock), the server notes when it
//! came and was answered, and the next report says how long the answer took (the agent's monotonic
//! clock). Half of what the way there and back took is all that the offset may be wrong by. Of all
//! measurements the one with the least error is kept. Its error grows with its age, by what two
//! clocks may drift, so that it is replaced in time; one that contradicts it replaces it at once:
//! somebody set a clock.
//!
//! The very first report of a host has no round trip. Its offset is known to a few seconds only,
//! and it corrects no less than that. The same holds for a report that no round trip of that length
//! explains: the clock was set since the one before.
//!
//! # What is corrected
//! Times are moved by an offset that is applied as a whole, from [`WORTH`] on, and changed only
//! when the measured one has moved away by as much: what is shown of one event does not tremble.
//!
//! # Locking
//! One `std` mutex around a map of small values, held for one lookup or update.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use slat_proto::{
    model::{duration_nanos, nanos_duration, nanos_timestamp, now, timestamp_nanos},
    v1,
};

/// Offsets below this are left as they are: nobody reads times of two hosts more closely.
const WORTH: i128 = 10_000_000;
/// How much two clocks may drift apart, as a part of the time between: 200 ppm.
const DRIFT: i128 = 5_000;
/// What a measurement may be wrong by in any case.
const LEAST_ERROR: i128 = 100_000;
/// Agents wait no longer than this for an answer.
const LONGEST_TRIP: i128 = 5_000_000_000;

/// A host's clock less the server's, nanoseconds, and by how much that may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    offset: i128,
    error: i128,
}

/// A report that was answered: its agent's clock when it was sent, the server's when it came, and
/// how long the server took, nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Exchange {
    sent: i128,
    came: i128,
    took: i128,
}

impl Exchange {
    /// Of one that took `round_trip` in all.
    fn sample(self, round_trip: i128) -> Sample {
        let on_the_way = (round_trip - self.took).max(0);
        Sample {
            offset: self.sent + on_the_way / 2 - self.came,
            error: on_the_way / 2 + LEAST_ERROR,
        }
    }

    /// Of one whose round trip is not known.
    fn one_way(self) -> Sample {
        Sample {
            offset: self.sent - self.came,
            error: LONGEST_TRIP,
        }
    }
}

/// What is known of one host's clock.
#[derive(Debug, Default)]
struct HostClock {
    kept: Option<(Sample, Instant)>,
    /// The kept one came from a round trip.
    measured: bool,
    /// What times are moved by.
    applied: i128,
    incarnation: String,
    last: Option<Exchange>,
}

impl HostClock {
    /// Takes a measurement of a round trip.
    fn measure(&mut self, sample: Sample, at: Instant) {
        let better = self.kept.is_none_or(|(kept, since)| {
            let age = at.saturating_duration_since(since).as_nanos();
            let error = kept.error + i128::try_from(age).unwrap_or(i128::MAX) / DRIFT;
            sample.error <= error || (sample.offset - kept.offset).abs() > sample.error + error
        });
        if better || !self.measured {
            self.measured = true;
            self.keep(sample, at);
        }
    }

    fn keep(&mut self, sample: Sample, at: Instant) {
        self.kept = Some((sample, at));
        let worth = sample.error.max(WORTH);
        if (sample.offset - self.applied).abs() > worth {
            self.applied = if sample.offset.abs() > worth {
                sample.offset
            } else {
                0
            };
        }
    }
}

/// A report that came and is not answered yet.
#[derive(Debug)]
pub(crate) struct Came {
    host: String,
    sent: i128,
    came: i128,
    at: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    hosts: Mutex<HashMap<String, HostClock>>,
}

impl Clocks {
    fn hosts(&self) -> MutexGuard<'_, HashMap<String, HostClock>> {
        // Each entry is changed as a whole.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A report of a registered incarnation has come. `None` when it does not say when it was sent.
    pub(crate) fn came(&self, report: &v1::ReportHostRequest) -> Option<Came> {
        let sent = timestamp_nanos(report.send_time.as_ref()?);
        let (came, at) = (timestamp_nanos(&now()), Instant::now());
        let mut hosts = self.hosts();
        let clock = hosts.entry(report.host.clone()).or_default();
        if clock.incarnation != report.incarnation {
            clock.incarnation.clone_from(&report.incarnation);
            clock.last = None;
        }
        if let (Some(last), Some(round_trip)) = (clock.last.take(), &report.last_round_trip) {
            clock.measure(last.sample(duration_nanos(round_trip)), at);
        }
        let took = 0;
        let one_way = Exchange { sent, came, took }.one_way();
        let contradicts =
            |(kept, _): (Sample, _)| (one_way.offset - kept.offset).abs() > LONGEST_TRIP;
        if clock.kept.is_none_or(contradicts) {
            // The first report, or the first since somebody set the clock: the times in this one
            // are of the clock as it is now, and its round trip is not over yet.
            clock.measured = false;
            clock.keep(one_way, at);
        }
        Some(Came {
            host: report.host.clone(),
            sent,
            came,
            at,
        })
    }

    /// That report is answered now.
    pub(crate) fn answered(&self, report: Came) {
        let took = i128::try_from(report.at.elapsed().as_nanos()).unwrap_or(i128::MAX);
        if let Some(clock) = self.hosts().get_mut(&report.host) {
            clock.last = Some(Exchange {
                sent: report.sent,
                came: report.came,
                took,
            });
        }
    }

    /// A host is no more.
    pub(crate) fn forget(&self, host: &str) {
        self.hosts().remove(host);
    }

    /// A host's clock less the server's, as measured; `None` before that.
    pub(crate) fn offset(&self, host: &str) -> Option<prost_types::Duration> {
        let hosts = self.hosts();
        let clock = hosts.get(host).filter(|clock| clock.measured)?;
        Some(nanos_duration(clock.kept?.0.offset))
    }

    fn applied(&self, host: &str) -> i128 {
        self.hosts().get(host).map_or(0, |clock| clock.applied)
    }

    /// A VM as its host shows it, its times by the server's clock. What would be later than now is
    /// now.
    pub(crate) fn vm_from(&self, host: &str, vm: &mut v1::Vm) {
        let applied = self.applied(host);
        let latest = timestamp_nanos(&now());
        if let Some(time) = &mut vm.create_time {
            move_by(time, -applied);
            if timestamp_nanos(time) > latest {
                *time = nanos_timestamp(latest);
            }
        }
    }

    /// A side as its host shows it, its times by the server's clock.
    pub(crate) fn side_from(&self, host: &str, side: &mut v1::Transfer) {
        let applied = self.applied(host);
        if applied == 0 {
            return;
        }
        let decisions = side.progress.iter_mut().flat_map(|p| &mut p.decisions);
        let decided = decisions.filter_map(|decision| decision.time.as_mut());
        let phases = side.phase_times.iter_mut();
        let entered = phases.filter_map(|entry| entry.time.as_mut());
        for time in decided.chain(entered) {
            move_by(time, -applied);
        }
    }
}

fn move_by(time: &mut prost_types::Timestamp, nanos: i128) {
    if nanos != 0 {
        *time = nanos_timestamp(timestamp_nanos(time) + nanos);
    }
}

/// As a number, for a gauge.
pub(crate) fn seconds(offset: &prost_types::Duration) -> f64 {
    let magnitude = Duration::new(offset.seconds.unsigned_abs(), offset.nanos.unsigned_abs());
    if duration_nanos(offset) < 0 {
        -magnitude.as_secs_f64()
    } else {
        magnitude.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MILLI: i128 = 1_000_000;
    const HOUR: i128 = 3_600_000 * MILLI;

    fn sample(offset: i128, error: i128) -> Sample {
        Sample { offset, error }
    }

    #[test]
    fn the_measurement_with_the_least_error_is_kept_until_it_is_old_or_contradicted() {
        let mut clock = HostClock::default();
        let at = Instant::now();
        let after = |seconds: u64| at + Duration::from_secs(seconds);
        let kept = |clock: &HostClock| clock.kept.unwrap().0;
        clock.measure(sample(7 * MILLI, 20 * MILLI), at);
        clock.measure(sample(3 * MILLI, 5 * MILLI), after(1));
        clock.measure(sample(-9 * MILLI, 15 * MILLI), after(2));
        assert_eq!(kept(&clock), sample(3 * MILLI, 5 * MILLI));
        // After a minute it may be wrong by 12 ms more.
        clock.measure(sample(4 * MILLI, 15 * MILLI), after(61));
        assert_eq!(kept(&clock), sample(4 * MILLI, 15 * MILLI));
        clock.measure(sample(2 * HOUR, 400 * MILLI), after(62));
        assert_eq!(kept(&clock), sample(2 * HOUR, 400 * MILLI));
    }

    #[test]
    fn what_times_are_moved_by_does_not_tremble() {
        let mut clock = HostClock::default();
        let at = Instant::now();
        let mut applied = |offset: i128| {
            clock.measure(sample(offset, MILLI), at);
            clock.applied
        };
        assert_eq!(applied(4 * MILLI), 0);
        assert_eq!(applied(-7 * MILLI), 0);
        assert_eq!(applied(500 * MILLI), 500 * MILLI);
        assert_eq!(applied(505 * MILLI), 500 * MILLI);
        assert_eq!(applied(511 * MILLI), 511 * MILLI);
        assert_eq!(applied(6 * MILLI), 0);
        // A first report that was on its way for long corrects nothing.
        for late in [-4_900 * MILLI, 100 * MILLI] {
            let mut clock = HostClock::default();
            let (sent, came, took) = (HOUR + late, HOUR, 0);
            clock.keep(Exchange { sent, came, took }.one_way(), at);
            assert_eq!(clock.applied, 0);
        }
    }

    fn report(host: &str, sent: i128, round_trip: Option<i128>) -> v1::ReportHostRequest {
        v1::ReportHostRequest {
            host: host.into(),
            incarnation: "1".into(),
            send_time: Some(nanos_timestamp(sent)),
            last_round_trip: round_trip.map(nanos_duration),
            ..Default::default()
        }
    }

    #[test]
    fn a_clock_that_is_set_is_noticed_by_the_report_that_tells_it() {
        let clocks = Clocks::default();
        let trip = Some(20 * MILLI);
        for (offset, set) in [(0, false), (0, false), (2 * HOUR, true), (2 * HOUR, false)] {
            let born = timestamp_nanos(&now()) - MILLI;
            let sent = timestamp_nanos(&now()) + offset;
            let told = clocks.came(&report("hosts/a", sent, trip)).unwrap();
            let mut vm = v1::Vm {
                create_time: Some(nanos_timestamp(born + offset)),
                ..Default::default()
            };
            clocks.vm_from("hosts/a", &mut vm);
            let off = timestamp_nanos(vm.create_time.as_ref().unwrap()) - born;
            assert!(off.abs() <= LONGEST_TRIP, "{offset}: {off}");
            clocks.answered(told);
            // It is not shown before it was measured.
            let shown = clocks.offset("hosts/a").map(|shown| duration_nanos(&shown));
            if set {
                assert_eq!(shown, None);
            } else if offset != 0 {
                assert!((shown.unwrap() - offset).abs() <= 15 * MILLI, "{shown:?}");
            }
        }
    }

    #[test]
    fn two_hours_are_corrected_from_the_first_report_on_and_shown_from_the_second() {
        let clocks = Clocks::default();
        let by_agent = |offset: i128| timestamp_nanos(&now()) + offset;
        for (host, offset) in [
            ("hosts/a", 2 * HOUR),
            ("hosts/b", -2 * HOUR),
            ("hosts/c", 0),
        ] {
            let created = timestamp_nanos(&now()) - MILLI;
            let told = clocks.came(&report(host, by_agent(offset), None)).unwrap();
            let mut vm = v1::Vm {
                create_time: Some(nanos_timestamp(created + offset)),
                ..Default::default()
            };
            clocks.vm_from(host, &mut vm);
            let off = timestamp_nanos(vm.create_time.as_ref().unwrap()) - created;
            assert!(off.abs() <= LONGEST_TRIP, "{host}: {off}");
            assert_eq!(clocks.offset(host), None);
            clocks.answered(told);

            let trip = Some(20 * MILLI);
            clocks.came(&report(host, by_agent(offset), trip)).unwrap();
            let measured = duration_nanos(&clocks.offset(host).unwrap());
            assert!(
                (measured - offset).abs() <= 15 * MILLI,
                "{host}: {measured}"
            );
            assert!((seconds(&nanos_duration(measured)) - (measured as f64) / 1e9).abs() < 1e-6);
        }
    }

    #[test]
    fn a_report_without_a_time_and_a_new_incarnation_measure_nothing() {
        let clocks = Clocks::default();
        let silent = v1::ReportHostRequest {
            host: "hosts/a".into(),
            ..Default::default()
        };
        assert!(clocks.came(&silent).is_none());
        let sent = timestamp_nanos(&now());
        clocks.answered(clocks.came(&report("hosts/a", sent, None)).unwrap());
        let restarted = v1::ReportHostRequest {
            incarnation: "2".into(),
            ..report("hosts/a", sent, Some(MILLI))
        };
        clocks.came(&restarted).unwrap();
        assert_eq!(clocks.offset("hosts/a"), None);
    }

    proptest! {
        /// Whatever the ways there and back took, the offset is wrong by no more than it says.
        #[test]
        fn the_error_is_a_bound(
            offset in -10 * HOUR..10 * HOUR,
            there in 0..3_000 * MILLI,
            took in 0..1_000 * MILLI,
            back in 0..3_000 * MILLI,
        ) {
            let came = 1_000_000 * HOUR;
            let exchange = Exchange { sent: came - there + offset, came, took };
            let sample = exchange.sample(there + took + back);
            prop_assert!((sample.offset - offset).abs() <= sample.error);
            let rough = exchange.one_way();
            prop_assert!((rough.offset - offset).abs() <= rough.error);
        }
    }
}
