//! Times and durations between the standard library and protobuf.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
