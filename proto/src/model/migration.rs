//! What a migration may do and must reach, checked, with every default filled in (with the names
//! and defaults that QEMU, libvirt and Cloud Hypervisor use).

use std::time::Duration;

use super::time::proto_duration;
use crate::{ApiError, v1};

const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_millis(300);
const DEFAULT_MAX_TOTAL: Duration = Duration::from_secs(3600);
const DEFAULT_STREAMS: u32 = 2;
const DEFAULT_MAX_ITERATIONS: u32 = 30;
/// Most data streams of one migration.
const MAX_STREAMS: u32 = 16;
/// Most iterations of one migration.
const MAX_ITERATIONS: u32 = 1_000_000;

/// When to compare memory digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Never.
    None,
    /// Before the commit; a mismatch fails the migration.
    BeforeCommit,
    /// After the commit; a mismatch is reported.
    AfterCommit,
}

/// What to do when time or iterations are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTimeout {
    /// Give up; the VM runs on at the source.
    Cancel,
    /// Switch over whatever the downtime.
    ForceSwitchover,
}

/// What to do when the VM is paused and the accepted downtime is about to be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOverrun {
    /// Back to precopy: the VM runs again at the source.
    Resume,
    /// The switchover goes on.
    Finish,
}

/// Checked parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationParams {
    /// Accepted downtime, 1 ms to 2000 s.
    pub max_downtime: Duration,
    /// Of the whole migration.
    pub max_total_time: Duration,
    /// Data streams, 1 to 16.
    pub streams: u32,
    /// Bytes a second over all streams; `None`: no limit.
    pub max_bandwidth: Option<u64>,
    /// Iterations after which precopy counts as not converging, 1 to 1,000,000.
    pub max_iterations: u32,
    /// When to compare digests.
    pub verify: Verify,
    /// What to do when time or iterations are used up.
    pub on_timeout: OnTimeout,
    /// What to do when the blackout is about to last too long.
    pub on_overrun: OnOverrun,
}

impl Default for MigrationParams {
    fn default() -> Self {
        Self {
            max_downtime: DEFAULT_MAX_DOWNTIME,
            max_total_time: DEFAULT_MAX_TOTAL,
            streams: DEFAULT_STREAMS,
            max_bandwidth: None,
            max_iterations: DEFAULT_MAX_ITERATIONS,
            verify: Verify::None,
            on_timeout: OnTimeout::Cancel,
            on_overrun: OnOverrun::Resume,
        }
    }
}

/// A protobuf duration that is not negative and in its normal form.
fn duration(
    field: &str,
    value: Option<&prost_types::Duration>,
) -> Result<Option<Duration>, ApiError> {
    value
        .map(|value| {
            Duration::try_from(*value)
                .map_err(|_| ApiError::bad_parameter(field, "must not be negative"))
        })
        .transpose()
}

impl MigrationParams {
    /// Checks a message and fills defaults in. `None` is all defaults.
    ///
    /// # Errors
    /// BAD_PARAMETER with the field at fault.
    pub fn from_message(message: Option<&v1::MigrationParams>) -> Result<Self, ApiError> {
        use v1::migration_params as wire;
        let Some(message) = message else {
            return Ok(Self::default());
        };
        let max_downtime = duration("params.max_downtime", message.max_downtime.as_ref())?
            .unwrap_or(DEFAULT_MAX_DOWNTIME);
        if !(Duration::from_millis(1)..=Duration::from_secs(2000)).contains(&max_downtime) {
            return Err(ApiError::bad_parameter(
                "params.max_downtime",
                "is 1 ms to 2000 s",
            ));
        }
        let max_total_time = duration("params.max_total_time", message.max_total_time.as_ref())?
            .unwrap_or(DEFAULT_MAX_TOTAL);
        if max_total_time < Duration::from_secs(1) {
            return Err(ApiError::bad_parameter(
                "params.max_total_time",
                "is at least 1 s",
            ));
        }
        if message.streams > MAX_STREAMS {
            return Err(ApiError::bad_parameter(
                "params.streams",
                format_args!("{} is not between 1 and {MAX_STREAMS}", message.streams),
            ));
        }
        if message.max_iterations > MAX_ITERATIONS {
            return Err(ApiError::bad_parameter(
                "params.max_iterations",
                format_args!(
                    "{} is not between 1 and {MAX_ITERATIONS}",
                    message.max_iterations
                ),
            ));
        }
        Ok(Self {
            max_downtime,
            max_total_time,
            streams: if message.streams == 0 {
                DEFAULT_STREAMS
            } else {
                message.streams
            },
            max_bandwidth: (message.max_bandwidth_bytes_per_second != 0)
                .then_some(message.max_bandwidth_bytes_per_second),
            max_iterations: if message.max_iterations == 0 {
                DEFAULT_MAX_ITERATIONS
            } else {
                message.max_iterations
            },
            verify: match wire::Verify::try_from(message.verify) {
                Ok(wire::Verify::Unspecified | wire::Verify::None) => Verify::None,
                Ok(wire::Verify::BeforeCommit) => Verify::BeforeCommit,
                Ok(wire::Verify::AfterCommit) => Verify::AfterCommit,
                Err(_) => return Err(ApiError::bad_parameter("params.verify", "is no such value")),
            },
            on_timeout: match wire::OnTimeout::try_from(message.on_timeout) {
                Ok(wire::OnTimeout::Unspecified | wire::OnTimeout::Cancel) => OnTimeout::Cancel,
                Ok(wire::OnTimeout::ForceSwitchover) => OnTimeout::ForceSwitchover,
                Err(_) => {
                    return Err(ApiError::bad_parameter(
                        "params.on_timeout",
                        "is no such value",
                    ));
                }
            },
            on_overrun: match wire::OnOverrun::try_from(message.on_overrun) {
                Ok(wire::OnOverrun::Unspecified | wire::OnOverrun::Resume) => OnOverrun::Resume,
                Ok(wire::OnOverrun::Finish) => OnOverrun::Finish,
                Err(_) => {
                    return Err(ApiError::bad_parameter(
                        "params.on_overrun",
                        "is no such value",
                    ));
                }
            },
        })
    }

    /// As a message.
    #[must_use]
    pub fn to_message(&self) -> v1::MigrationParams {
        use v1::migration_params as wire;
        v1::MigrationParams {
            max_downtime: Some(proto_duration(self.max_downtime)),
            max_total_time: Some(proto_duration(self.max_total_time)),
            streams: self.streams,
            max_bandwidth_bytes_per_second: self.max_bandwidth.unwrap_or(0),
            max_iterations: self.max_iterations,
            verify: match self.verify {
                Verify::None => wire::Verify::None,
                Verify::BeforeCommit => wire::Verify::BeforeCommit,
                Verify::AfterCommit => wire::Verify::AfterCommit,
            }
            .into(),
            on_timeout: match self.on_timeout {
                OnTimeout::Cancel => wire::OnTimeout::Cancel,
                OnTimeout::ForceSwitchover => wire::OnTimeout::ForceSwitchover,
            }
            .into(),
            on_overrun: match self.on_overrun {
                OnOverrun::Resume => wire::OnOverrun::Resume,
                OnOverrun::Finish => wire::OnOverrun::Finish,
            }
            .into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_survive_the_wire() {
        let params = MigrationParams::from_message(None).unwrap();
        assert_eq!(params, MigrationParams::default());
        assert_eq!(
            MigrationParams::from_message(Some(&params.to_message())).unwrap(),
            params
        );
    }

    #[test]
    fn ranges_are_kept() {
        let field = |message: v1::MigrationParams| {
            MigrationParams::from_message(Some(&message))
                .unwrap_err()
                .metadata["field"]
                .clone()
        };
        let zero = Some(prost_types::Duration {
            seconds: 0,
            nanos: 0,
        });
        let negative = Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        });
        for bad in [zero, negative] {
            let message = v1::MigrationParams {
                max_downtime: bad,
                ..Default::default()
            };
            assert_eq!(field(message), "params.max_downtime");
        }
        assert_eq!(
            field(v1::MigrationParams {
                streams: 17,
                ..Default::default()
            }),
            "params.streams"
        );
        assert_eq!(
            field(v1::MigrationParams {
                verify: 77,
                ..Default::default()
            }),
            "params.verify"
        );
        assert_eq!(
            field(v1::MigrationParams {
                on_overrun: 77,
                ..Default::default()
            }),
            "params.on_overrun"
        );
    }

    #[test]
    fn iterations_have_an_upper_bound() {
        let params = |max_iterations| {
            let message = v1::MigrationParams {
                max_iterations,
                ..Default::default()
            };
            MigrationParams::from_message(Some(&message))
        };
        assert_eq!(params(1_000_000).unwrap().max_iterations, 1_000_000);
        let refused = params(1_000_001).unwrap_err();
        assert_eq!(refused.metadata["field"], "params.max_iterations");
        assert!(refused.message.contains("1000000"), "{refused}");
    }
}
