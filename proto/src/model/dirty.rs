//! How a VM's dirty rate is to be measured, checked.

use std::time::Duration;

use crate::{
    ApiError,
    v1::{self, measure_dirty_rate_request::Mode},
};

/// Measured for so long when nothing is said.
const DEFAULT: Duration = Duration::from_secs(1);
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);
const DEFAULT_SAMPLE: u32 = 512;

/// A measurement as it was ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRateOrder {
    /// How; UNSPECIFIED: by the VM's own engine.
    pub mode: Mode,
    /// 100 ms to 60 s.
    pub duration: Duration,
    /// Sampling: pages for each GiB, 16 to 16,384.
    pub sample_pages_per_gib: u32,
}

impl DirtyRateOrder {
    /// Checks a message and fills defaults in.
    ///
    /// # Errors
    /// BAD_PARAMETER with the field at fault.
    pub fn from_message(message: &v1::MeasureDirtyRateRequest) -> Result<Self, ApiError> {
        let mode = Mode::try_from(message.mode).map_err(|_| {
            ApiError::bad_parameter("mode", format_args!("{} is no mode", message.mode))
        })?;
        let duration = match &message.duration {
            None => DEFAULT,
            Some(duration) => Duration::try_from(*duration)
                .ok()
                .filter(|duration| (SHORTEST..=LONGEST).contains(duration))
                .ok_or_else(|| ApiError::bad_parameter("duration", "is 100 ms to 60 s"))?,
        };
        let sample = match message.sample_pages_per_gib {
            0 => DEFAULT_SAMPLE,
            pages @ 16..=16_384 => pages,
            pages => {
                return Err(ApiError::bad_parameter(
                    "sample_pages_per_gib",
                    format_args!("{pages} is not between 16 and 16384"),
                )
                .with("value", pages));
            }
        };
        Ok(Self {
            mode,
            duration,
            sample_pages_per_gib: sample,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_filled_and_limits_are_named() {
        let order = DirtyRateOrder::from_message(&Default::default()).unwrap();
        assert_eq!(order.mode, Mode::Unspecified);
        assert_eq!(order.duration, Duration::from_secs(1));
        assert_eq!(order.sample_pages_per_gib, 512);
        let refused = |message: v1::MeasureDirtyRateRequest| {
            DirtyRateOrder::from_message(&message).unwrap_err().metadata["field"].clone()
        };
        for (seconds, nanos) in [(0, 1), (61, 0), (-1, 0), (0, -5)] {
            let duration = Some(prost_types::Duration { seconds, nanos });
            let message = v1::MeasureDirtyRateRequest {
                duration,
                ..Default::default()
            };
            assert_eq!(refused(message), "duration");
        }
        let message = v1::MeasureDirtyRateRequest {
            mode: 9,
            ..Default::default()
        };
        assert_eq!(refused(message), "mode");
        let message = v1::MeasureDirtyRateRequest {
            sample_pages_per_gib: 15,
            ..Default::default()
        };
        assert_eq!(refused(message), "sample_pages_per_gib");
    }
}
