//! Sizes, rates and durations, read and shown with their units.
//!
//! Each names its unit: a bare number would mean bytes to one reader and MiB to another, so it is
//! refused with an example. Only 0 needs none. A size is `512MiB`, `1.5GiB`, `64k` or `4096B`; `K`,
//! `M`, `G`, `T` alone are binary, as QEMU and systemd read them, and `kB`, `MB`, `GB`, `TB`
//! decimal. A rate is a size a second: `64MiB/s`, or `64MiB`. A duration is `300ms`, `1.5s`,
//! `1m30s`, `30d`. Showing never lies by more than rounding to the digits shown.

use std::{fmt, str::FromStr, time::Duration};

const UNITS: [(&str, u64); 17] = [
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("p", 1 << 50),
    ("pib", 1 << 50),
    ("pb", 1_000_000_000_000_000),
    ("bytes", 1),
];

/// Why a text is no size, rate or duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadUnit(String);

fn bad(message: impl Into<String>) -> BadUnit {
    BadUnit(message.into())
}

/// Splits `12.5MiB` into number and unit.
fn split(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// `number` times `scale`, rounded to a whole; exact when the number has no fraction.
fn scaled(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = |text: &str| -> Option<u128> {
        if text.is_empty() {
            Some(0)
        } else if text.len() <= 18 || !text.starts_with('0') {
            text.parse().ok()
        } else {
            None
        }
    };
    let fraction = &fraction[..fraction.len().min(15)];
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let power = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let value = digits(whole)?
        .checked_mul(power)?
        .checked_add(digits(fraction)?)?
        .checked_mul(u128::from(scale))?;
    u64::try_from((value + power / 2) / power).ok()
}

/// Why a text is no size: `what` it should have been, with `examples`.
fn no_unit(text: &str, what: &str, examples: &str) -> BadUnit {
    let bare = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if bare {
        bad(format!("\"{text}\" has no unit; write {examples}"))
    } else {
        bad(format!("\"{text}\" is no {what}; write it as {examples}"))
    }
}

fn is_zero(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b == b'0')
}

fn parse_size(text: &str) -> Result<u64, BadUnit> {
    let text = text.trim();
    if is_zero(text) {
        return Ok(0);
    }
    let (number, unit) = split(text);
    let unit = unit.to_ascii_lowercase();
    let scale = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, scale)| *scale);
    match scale {
        Some(scale) if !number.is_empty() => {
            scaled(number, scale).ok_or_else(|| bad(format!("\"{text}\" is no size of 64 bits")))
        }
        _ => Err(no_unit(text, "size", "512MiB, 2GiB or 4096B")),
    }
}

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = BadUnit;
    fn from_str(text: &str) -> Result<Self, BadUnit> {
        parse_size(text).map(Self)
    }
}

impl fmt::Display for Size {
    /// Three significant digits or more: `512 MiB`, `1.50 GiB`, `17 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let power = (self.0.ilog2() / 10) as usize;
        let unit = 1u64 << (10 * power);
        let name = steps[power - 1];
        if self.0.is_multiple_of(unit) {
            return write!(f, "{} {name}", self.0 / unit);
        }
        #[allow(clippy::cast_precision_loss, reason = "shown with three digits")]
        let value = self.0 as f64 / unit as f64;
        let digits = if value < 10.0 {
            2
        } else if value < 100.0 {
            1
        } else {
            0
        };
        write!(f, "{value:.digits$} {name}")
    }
}

/// Bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rate(pub(crate) u64);

impl FromStr for Rate {
    type Err = BadUnit;
    fn from_str(text: &str) -> Result<Self, BadUnit> {
        let text = text.trim();
        let size = text.strip_suffix("/s").unwrap_or(text);
        parse_size(size)
            .map(Self)
            .map_err(|_| no_unit(text, "rate", "64MiB/s or 1GiB/s"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = BadUnit;
    fn from_str(text: &str) -> Result<Self, BadUnit> {
        let wrong = || {
            bad(format!(
                "\"{text}\" is no duration; write it with its unit, as 300ms, 1.5s or 1m30s"
            ))
        };
        let mut rest = text.trim();
        let mut total = 0u64;
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let (number, tail) = split(rest);
            let end = tail
                .find(|c: char| c.is_ascii_digit() || c == '.' || c == ' ')
                .unwrap_or(tail.len());
            let scale = match &tail[..end] {
                "ns" => 1,
                "us" | "µs" => 1_000,
                "ms" => 1_000_000,
                "s" => 1_000_000_000,
                "m" | "min" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                "d" => 86_400_000_000_000,
                _ => return Err(wrong()),
            };
            total = scaled(number, scale)
                .and_then(|nanos| total.checked_add(nanos))
                .ok_or_else(wrong)?;
            rest = tail[end..].trim_start();
        }
        Ok(Self(Duration::from_nanos(total)))
    }
}

impl fmt::Display for Span {
    /// Three significant digits below a minute: `812 µs`, `12.3 ms`, `1.52 s`, `2m03s`, `1h05m`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        let digits = |value: f64| {
            if value < 9.995 {
                2
            } else if value < 99.95 {
                1
            } else {
                0
            }
        };
        if self.0.is_zero() {
            f.write_str("0 s")
        } else if self.0 < Duration::from_micros(1) {
            write!(f, "{} ns", self.0.as_nanos())
        } else if seconds < 0.000_999_5 {
            let value = seconds * 1e6;
            write!(f, "{value:.*} µs", digits(value))
        } else if seconds < 0.999_5 {
            let value = seconds * 1e3;
            write!(f, "{value:.*} ms", digits(value))
        } else if seconds < 59.95 {
            write!(f, "{seconds:.*} s", digits(seconds))
        } else {
            let whole = (self.0 + Duration::from_millis(500)).as_secs();
            if whole < 3600 {
                write!(f, "{}m{:02}s", whole / 60, whole % 60)
            } else {
                write!(f, "{}h{:02}m", whole / 3600, whole % 3600 / 60)
            }
        }
    }
}

/// A guest-physical address: hexadecimal with `0x`, or a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestAddress(pub(crate) u64);

impl FromStr for GuestAddress {
    type Err = BadUnit;
    fn from_str(text: &str) -> Result<Self, BadUnit> {
        let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        match hex {
            Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16)
                .map(Self)
                .map_err(|_| bad(format!("\"{text}\" is no address of 64 bits"))),
            None => parse_size(text)
                .map(Self)
                .map_err(|_| no_unit(text, "guest-physical address", "0x100000000 or 4GiB")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        let read = |text: &str| text.parse::<Size>().map(|size| size.0);
        assert_eq!(read("512MiB"), Ok(512 << 20));
        assert_eq!(read("512 MiB"), Ok(512 << 20));
        assert_eq!(read("512M"), Ok(512 << 20));
        assert_eq!(read("512MB"), Ok(512_000_000));
        assert_eq!(read("1.5gib"), Ok(3 << 29));
        assert_eq!(read("4096B"), Ok(4096));
        assert_eq!(read("0"), Ok(0));
        for text in [
            "",
            "MiB",
            "-1",
            "1.2.3M",
            "12 parsecs",
            "99999999T",
            ".",
            "1e9",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bare_number_is_refused_with_an_example() {
        let size = "4096".parse::<Size>().unwrap_err().to_string();
        assert_eq!(size, "\"4096\" has no unit; write 512MiB, 2GiB or 4096B");
        let rate = "64".parse::<Rate>().unwrap_err().to_string();
        assert_eq!(rate, "\"64\" has no unit; write 64MiB/s or 1GiB/s");
        let address = "4096".parse::<GuestAddress>().unwrap_err().to_string();
        assert_eq!(address, "\"4096\" has no unit; write 0x100000000 or 4GiB");
        assert!("64/s".parse::<Rate>().is_err());
        assert!("0.5".parse::<Rate>().is_err());
    }

    #[test]
    fn rates_are_sizes_a_second() {
        let read = |text: &str| text.parse::<Rate>().map(|rate| rate.0);
        assert_eq!(read("0"), Ok(0));
        assert_eq!(read("64MiB/s"), Ok(64 << 20));
        assert_eq!(read("1GiB"), Ok(1 << 30));
        assert_eq!(read("100B/s"), Ok(100));
        assert!(read("/s").is_err());
        assert!(read("fast").is_err());
    }

    #[test]
    fn durations_need_a_unit() {
        let read = |text: &str| text.parse::<Span>().map(|span| span.0);
        assert_eq!(read("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(read("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(read("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(read("30d"), Ok(Duration::from_secs(30 * 24 * 3600)));
        assert_eq!(read("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(read("250us"), Ok(Duration::from_micros(250)));
        for text in ["", "300", "s", "1x", "-1s", "1m30", "999999999999h", "1s,"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_read_hexadecimal_and_sizes() {
        let read = |text: &str| text.parse::<GuestAddress>().map(|address| address.0);
        assert_eq!(read("0x1_0000_0000"), Ok(1 << 32));
        assert_eq!(read("4GiB"), Ok(1 << 32));
        assert!(read("0x").is_err());
        assert!(read("high").is_err());
    }

    #[test]
    fn what_is_shown_has_few_digits() {
        let size = |bytes| Size(bytes).to_string();
        assert_eq!(size(17), "17 B");
        assert_eq!(size(512 << 20), "512 MiB");
        assert_eq!(size((3 << 29) + 1), "1.50 GiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
        let span = |nanos| Span(Duration::from_nanos(nanos)).to_string();
        assert_eq!(span(0), "0 s");
        assert_eq!(span(812_000), "812 µs");
        assert_eq!(span(12_345_678), "12.3 ms");
        assert_eq!(span(1_523_000_000), "1.52 s");
        assert_eq!(span(59_999_000_000), "1m00s");
        assert_eq!(span(3_900_000_000_000), "1h05m");
    }

    proptest! {
        #[test]
        fn a_shown_size_reads_back_within_its_digits(bits in any::<u64>(), shift in 4u32..64) {
            // Every magnitude as often as any other, up to 2^60: no unit above PiB is read.
            let bytes = bits >> shift;
            let shown = Size(bytes).to_string();
            let back = shown.parse::<Size>().unwrap().0;
            prop_assert!(back.abs_diff(bytes) <= bytes / 100, "{bytes} {shown} {back}");
        }

        #[test]
        fn plain_bytes_read_exactly(bytes in any::<u64>()) {
            prop_assert_eq!(format!("{bytes}B").parse::<Size>().unwrap().0, bytes);
        }

        #[test]
        fn a_shown_span_reads_back_within_its_digits(nanos in 0u64..100_000_000_000_000) {
            let shown = Span(Duration::from_nanos(nanos)).to_string();
            let back = shown.parse::<Span>().unwrap().0.as_nanos();
            prop_assert!(back.abs_diff(u128::from(nanos)) <= u128::from(nanos) / 50 + 1, "{} {} {}", nanos, shown, back);
        }

        #[test]
        fn nothing_panics_a_reader(text in "\\PC*") {
            let _ = text.parse::<Size>();
            let _ = text.parse::<Rate>();
            let _ = text.parse::<Span>();
            let _ = text.parse::<GuestAddress>();
        }
    }
}
