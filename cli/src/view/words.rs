//! Short words for the enums and figures of the API, as tables and pages show them.

use std::time::{Duration, SystemTime};

use slat_proto::{
    model::{Format as TableFormat, std_duration},
    v1,
};

use crate::{
    escape,
    term::{
        table::{Cell, NONE, Tone},
        units::{Size, Span},
    },
};

/// The bare id of a resource name.
pub(crate) fn id(name: &str) -> &str {
    let id = name.rsplit_once('/').map_or(name, |(_, id)| id);
    if id.is_empty() { NONE } else { id }
}

pub(crate) fn short<'a>(name: &'a str, prefix: &str) -> &'a str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// `RUNNING`, `PAUSED`...
pub(crate) fn vm_state(state: v1::vm::State) -> &'static str {
    short(state.as_str_name(), "STATE_")
}

/// `PRECOPY_ACTIVE`, `COMPLETED`...
pub(crate) fn phase(phase: v1::MigrationPhase) -> &'static str {
    short(phase.as_str_name(), "MIGRATION_PHASE_")
}

/// `MATCH`, `NONE`...
pub(crate) fn verification(verification: v1::Verification) -> &'static str {
    short(verification.as_str_name(), "VERIFICATION_")
}

/// `kvm`, or `software (sv48x4)`.
pub(crate) fn backend(spec: &v1::VmSpec) -> String {
    match spec.backend() {
        v1::Backend::Unspecified => NONE.to_owned(),
        v1::Backend::Kvm => "kvm".to_owned(),
        v1::Backend::Software => match format(spec) {
            Some(format) => format!("software ({format})"),
            None => "software".to_owned(),
        },
    }
}

/// `ept4`...; `None` where the kernel chose.
pub(crate) fn format(spec: &v1::VmSpec) -> Option<String> {
    Some(TableFormat::from_field(spec.format).ok()??.to_string())
}

/// Whether a migration has ended for good. IN_DOUBT has not.
pub(crate) fn ended(phase: v1::MigrationPhase) -> bool {
    use v1::MigrationPhase::{Cancelled, Completed, Failed};
    matches!(phase, Completed | Cancelled | Failed)
}

/// How long ago that was, on this machine's clock; `None` when unset or yet to come.
pub(super) fn since(time: Option<&prost_types::Timestamp>) -> Option<Duration> {
    time.and_then(|time| SystemTime::try_from(*time).ok())
        .and_then(|time| SystemTime::now().duration_since(time).ok())
}

pub(super) fn age(time: Option<&prost_types::Timestamp>) -> Cell {
    since(time).map_or_else(Cell::none, |age| {
        let words = if age < Duration::from_secs(60) {
            format!("{}s", age.as_secs())
        } else if age < Duration::from_secs(2 * 86_400) {
            Span(age).to_string()
        } else {
            format!("{}d", age.as_secs() / 86_400)
        };
        Cell::number(age.as_millis(), words)
    })
}

/// As a cell that sorts by its length.
pub(super) fn span_cell(duration: Option<&prost_types::Duration>) -> Cell {
    duration.map_or_else(Cell::none, |duration| {
        let duration = std_duration(Some(duration));
        Cell::number(duration.as_nanos(), Span(duration).to_string())
    })
}

pub(super) fn size_cell(bytes: u64) -> Cell {
    Cell::number(bytes, Size(bytes).to_string())
}

pub(super) fn count(number: impl Into<u64>) -> Cell {
    let number: u64 = number.into();
    Cell::number(number, number.to_string())
}

/// Words joined for a NOTE column; `-` for none.
pub(super) fn notes(notes: Vec<String>) -> Cell {
    if notes.is_empty() {
        Cell::none()
    } else {
        Cell::toned(notes.join("; "), Tone::Warn)
    }
}

pub(super) fn clock(time: Option<&prost_types::Timestamp>) -> String {
    time.and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok())
        .map_or_else(|| NONE.to_owned(), |time| format!("{time:.0}"))
}

/// A duration that may be unset.
pub(crate) fn span(duration: Option<&prost_types::Duration>) -> String {
    duration.map_or_else(
        || NONE.to_owned(),
        |duration| Span(std_duration(Some(duration))).to_string(),
    )
}

/// A difference of clocks, with its sign; `-` when it is not known.
pub(super) fn signed_span(duration: Option<&prost_types::Duration>) -> String {
    duration.map_or_else(
        || NONE.to_owned(),
        |duration| {
            let behind = duration.seconds < 0 || duration.nanos < 0;
            let length = prost_types::Duration {
                seconds: duration.seconds.saturating_abs(),
                nanos: duration.nanos.saturating_abs(),
            };
            let sign = if behind { '-' } else { '+' };
            format!("{sign}{}", Span(std_duration(Some(&length))))
        },
    )
}

pub(super) fn pages(pages: u64) -> String {
    Size(pages.saturating_mul(4096)).to_string()
}

/// Lines of `label value`, labels padded; those without a value are left out.
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, _)| label.len())
        .max()
        .unwrap_or(0);
    fields
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, value)| format!("  {label:width$}  {}", escape::one_line(value)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// An amount over a time as a rate a second; `None` for no time.
pub(crate) fn per_second(amount: u64, duration: Duration) -> Option<u64> {
    let nanos = duration.as_nanos();
    (nanos > 0)
        .then(|| u64::try_from(u128::from(amount) * 1_000_000_000 / nanos).unwrap_or(u64::MAX))
}
