//! Times and durations between the standard library and protobuf, and times that only go forward.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Now, as a protobuf timestamp.
#[must_use]
pub fn now() -> prost_types::Timestamp {
    timestamp(SystemTime::now())
}

/// A wall-clock time as a protobuf timestamp; before 1970 becomes 1970.
#[must_use]
pub fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let duration = proto_duration(since);
    prost_types::Timestamp {
        seconds: duration.seconds,
        nanos: duration.nanos,
    }
}

/// A message's time; `None` when it is before 1970 or no time.
#[must_use]
pub fn system_time(time: &prost_types::Timestamp) -> Option<SystemTime> {
    let seconds = u64::try_from(time.seconds).ok()?;
    let nanos = u32::try_from(time.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// As a protobuf duration; longer than its range becomes its end.
#[must_use]
pub fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos().cast_signed(),
    }
}

/// From a protobuf duration; unset or negative becomes zero.
#[must_use]
pub fn std_duration(duration: Option<&prost_types::Duration>) -> Duration {
    duration
        .and_then(|value| Duration::try_from(*value).ok())
        .unwrap_or_default()
}

/// Nanoseconds since 1970.
#[must_use]
pub fn timestamp_nanos(time: &prost_types::Timestamp) -> i128 {
    i128::from(time.seconds) * NANOS_PER_SECOND + i128::from(time.nanos)
}

/// From nanoseconds since 1970; out of range becomes the range's end.
#[must_use]
pub fn nanos_timestamp(nanos: i128) -> prost_types::Timestamp {
    let (seconds, nanos) = split(nanos);
    prost_types::Timestamp { seconds, nanos }
}

/// Nanoseconds of a duration, which may be negative.
#[must_use]
pub fn duration_nanos(duration: &prost_types::Duration) -> i128 {
    i128::from(duration.seconds) * NANOS_PER_SECOND + i128::from(duration.nanos)
}

/// A duration, which may be negative; out of range becomes the range's end.
#[must_use]
pub fn nanos_duration(nanos: i128) -> prost_types::Duration {
    let (seconds, rest) = split(nanos.abs());
    let sign = if nanos < 0 { -1 } else { 1 };
    prost_types::Duration {
        seconds: seconds * sign,
        nanos: rest * i32::try_from(sign).unwrap_or(1),
    }
}

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// Whole seconds, rounded down, and the nanoseconds that are left.
fn split(nanos: i128) -> (i64, i32) {
    let seconds = nanos.div_euclid(NANOS_PER_SECOND);
    let rest = i32::try_from(nanos.rem_euclid(NANOS_PER_SECOND)).unwrap_or(0);
    let end = if seconds < 0 { -i64::MAX } else { i64::MAX };
    (i64::try_from(seconds).unwrap_or(end), rest)
}

/// What a message may take on its way between clocks that agree.
const ON_THE_WAY: i128 = NANOS_PER_SECOND / 10;

/// Brings a time to this process's clock: as far back from now as it is from `sent`, the clock that
/// it is by when the message with both was sent. To be done where the message comes in: what it
/// took on its way is lost. Where the two clocks agree but for that, and without `sent`, the time
/// stays as it is.
pub fn to_own_clock(
    time: &mut Option<prost_types::Timestamp>,
    sent: Option<&prost_types::Timestamp>,
) {
    if let (Some(time), Some(sent)) = (time, sent) {
        let ahead = timestamp_nanos(&now()) - timestamp_nanos(sent);
        if ahead.abs() > ON_THE_WAY {
            *time = nanos_timestamp(timestamp_nanos(time) + ahead);
        }
    }
}

/// Times of one process that only go forward: the wall clock is read once, and counted on by the
/// monotonic clock. Who sets the wall clock meanwhile changes no duration between two of them.
#[derive(Clone, Copy, Debug)]
pub struct Timeline {
    begin: i128,
    since: Instant,
}

impl Timeline {
    /// Begins with the wall clock's time, or with `earliest` when that is later.
    #[must_use]
    pub fn begin(earliest: Option<&prost_types::Timestamp>) -> Self {
        let wall = timestamp_nanos(&now());
        Self {
            begin: earliest.map_or(wall, |earliest| wall.max(timestamp_nanos(earliest))),
            since: Instant::now(),
        }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> prost_types::Timestamp {
        let passed = i128::try_from(self.since.elapsed().as_nanos()).unwrap_or(i128::MAX);
        nanos_timestamp(self.begin.saturating_add(passed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_by_another_clock_moves_with_it_and_one_by_an_equal_clock_not_at_all() {
        let made = timestamp_nanos(&now()) - 60 * NANOS_PER_SECOND;
        for ahead in [0, 7_200, -7_200] {
            let by = |nanos| Some(nanos_timestamp(nanos + ahead * NANOS_PER_SECOND));
            let mut time = by(made);
            to_own_clock(&mut time, by(timestamp_nanos(&now())).as_ref());
            let off = timestamp_nanos(&time.unwrap()) - made;
            if ahead == 0 {
                assert_eq!(off, 0);
            }
            assert!(off.abs() < NANOS_PER_SECOND, "{ahead}: {off}");
        }
        let mut time = Some(nanos_timestamp(made));
        to_own_clock(&mut time, None);
        assert_eq!(time, Some(nanos_timestamp(made)));
    }

    #[test]
    fn times_and_signed_durations_survive_the_way_there_and_back() {
        for nanos in [0, 1, -1, 1_500_000_000, -1_500_000_000, -2_000_000_000] {
            let duration = nanos_duration(nanos);
            assert_eq!(duration_nanos(&duration), nanos);
            // Protobuf wants both parts to have one sign.
            assert!(duration.seconds.signum() * i64::from(duration.nanos.signum()) >= 0);
            let time = nanos_timestamp(nanos);
            assert_eq!(timestamp_nanos(&time), nanos);
            assert!((0..1_000_000_000).contains(&time.nanos));
        }
        assert_eq!(nanos_timestamp(i128::MAX).seconds, i64::MAX);
        assert_eq!(nanos_duration(i128::MIN + 1).seconds, -i64::MAX);
    }

    #[test]
    fn a_timeline_never_begins_before_what_it_goes_on_from() {
        let late = nanos_timestamp(timestamp_nanos(&now()) + 7200 * NANOS_PER_SECOND);
        let timeline = Timeline::begin(Some(&late));
        let first = timestamp_nanos(&timeline.now());
        assert!(first >= timestamp_nanos(&late));
        assert!(timestamp_nanos(&timeline.now()) >= first);
        let plain = timestamp_nanos(&Timeline::begin(None).now());
        assert!(plain < timestamp_nanos(&late));
    }
}
