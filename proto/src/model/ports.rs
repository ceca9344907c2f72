//! Which TCP ports a host takes pages on.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use crate::ApiError;

/// A range of TCP ports, `7410-7473`, one port, `7410`, or any free port, `0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Any free port, chosen by the kernel.
    pub const ANY: Self = Self { first: 0, last: 0 };

    /// The ports; `None`: any.
    #[must_use]
    pub fn ports(self) -> Option<RangeInclusive<u16>> {
        (self.first != 0).then_some(self.first..=self.last)
    }
}

impl FromStr for PortRange {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        let bad = || {
            ApiError::bad_parameter(
                "ports",
                format_args!(
                    "\"{}\" is no range of ports; write it as 7410-7473, 7410, or 0 for any",
                    text.escape_default()
                ),
            )
        };
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| bad());
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if first > last || (first == 0 && last != 0) {
            return Err(bad());
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return write!(f, "{}", self.first);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_shown_alike() {
        for text in ["7410-7473", "7410", "1-65535", "0"] {
            let range: PortRange = text.parse().unwrap();
            assert_eq!(range.to_string(), text);
        }
        let range: PortRange = "7410-7412".parse().unwrap();
        assert_eq!(range.ports(), Some(7410..=7412));
        assert_eq!(PortRange::ANY.ports(), None);
        assert_eq!("0".parse::<PortRange>().unwrap(), PortRange::ANY);
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "-",
            "a",
            "7410-",
            "-7410",
            "7411-7410",
            "0-5",
            "65536",
            "1-2-3",
        ] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }
}
