//! What the self-checking guest is told, checked.

use crate::{ApiError, v1};

/// Order in which memstress visits its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemstressPattern {
    /// One after the other.
    Sequential,
    /// Uniformly at random.
    Random,
    /// `hot_percent` of the pages get `hot_visit_percent` of the visits.
    HotCold {
        /// Share of pages, 1 to 99.
        hot_percent: u32,
        /// Share of visits, 1 to 99.
        hot_visit_percent: u32,
    },
}

/// What memory holds before the first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemstressFill {
    /// Zero, unpopulated.
    Zero,
    /// Random bytes.
    Random,
}

/// The self-checking guest's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemstressSpec {
    /// Order of visits.
    pub pattern: MemstressPattern,
    /// Share of visits that write, 0 to 100.
    pub write_percent: u32,
    /// Ceiling over all vCPUs, bytes a second; `None`: none; 0: idle.
    pub dirty_rate: Option<u64>,
    /// Contents at the start.
    pub fill: MemstressFill,
    /// Of the pattern and the fill, never 0.
    pub seed: u64,
}

impl Default for MemstressSpec {
    fn default() -> Self {
        Self {
            pattern: MemstressPattern::Sequential,
            write_percent: 100,
            dirty_rate: None,
            fill: MemstressFill::Zero,
            seed: 1,
        }
    }
}

impl MemstressSpec {
    pub(super) fn from_message(message: &v1::Memstress) -> Result<Self, ApiError> {
        use v1::memstress::{Fill, Pattern};
        let percent = |field: &str, value: u32, default: u32| match value {
            0 => Ok(default),
            1..=99 => Ok(value),
            _ => Err(ApiError::bad_parameter(field, "is 1 to 99 percent")),
        };
        let pattern = match Pattern::try_from(message.pattern) {
            Ok(Pattern::Unspecified | Pattern::Sequential) => MemstressPattern::Sequential,
            Ok(Pattern::Random) => MemstressPattern::Random,
            Ok(Pattern::HotCold) => MemstressPattern::HotCold {
                hot_percent: percent("spec.memstress.hot_percent", message.hot_percent, 10)?,
                hot_visit_percent: percent(
                    "spec.memstress.hot_visit_percent",
                    message.hot_visit_percent,
                    90,
                )?,
            },
            Err(_) => {
                return Err(ApiError::bad_parameter(
                    "spec.memstress.pattern",
                    "is no pattern",
                ));
            }
        };
        let write_percent = message.write_percent.unwrap_or(100);
        if write_percent > 100 {
            return Err(ApiError::bad_parameter(
                "spec.memstress.write_percent",
                "is 0 to 100 percent",
            ));
        }
        Ok(Self {
            pattern,
            write_percent,
            dirty_rate: message.dirty_rate_bytes_per_second,
            fill: match Fill::try_from(message.fill) {
                Ok(Fill::Unspecified | Fill::Zero) => MemstressFill::Zero,
                Ok(Fill::Random) => MemstressFill::Random,
                Err(_) => return Err(ApiError::bad_parameter("spec.memstress.fill", "is no fill")),
            },
            seed: message.seed.max(1),
        })
    }

    pub(super) fn to_message(self) -> v1::Memstress {
        use v1::memstress::{Fill, Pattern};
        let (pattern, hot_percent, hot_visit_percent) = match self.pattern {
            MemstressPattern::Sequential => (Pattern::Sequential, 0, 0),
            MemstressPattern::Random => (Pattern::Random, 0, 0),
            MemstressPattern::HotCold {
                hot_percent,
                hot_visit_percent,
            } => (Pattern::HotCold, hot_percent, hot_visit_percent),
        };
        v1::Memstress {
            pattern: pattern.into(),
            write_percent: Some(self.write_percent),
            dirty_rate_bytes_per_second: self.dirty_rate,
            hot_percent,
            hot_visit_percent,
            fill: match self.fill {
                MemstressFill::Zero => Fill::Zero,
                MemstressFill::Random => Fill::Random,
            }
            .into(),
            seed: self.seed,
        }
    }
}
