//! Certificates and roots as rows, lines and documents.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    roles::{Issued, RootInfo},
    term::table::{Cell, NONE, Tone},
};

/// Days that are few: a renewal is due.
const FEW_DAYS: u64 = 14;
const DAY: u64 = 24 * 3600;

/// In UTC, to the second.
pub(super) fn clock(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH);
    let seconds = seconds.ok().and_then(|it| i64::try_from(it.as_secs()).ok());
    seconds
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .map_or_else(|| NONE.to_owned(), |time| time.to_string())
}

/// `agent/host-a`.
pub(super) fn short(issued: &Issued) -> String {
    let identity = &issued.identity;
    format!("{}/{}", identity.kind(), identity.name())
}

/// What a certificate is at a time.
pub(super) fn state(issued: &Issued, now: SystemTime) -> &'static str {
    if issued.revoked.is_some() {
        "revoked"
    } else if issued.not_after < now {
        "expired"
    } else if issued.replaced_by.is_some() {
        "renewed"
    } else if issued.not_before > now {
        "not yet valid"
    } else {
        "valid"
    }
}

fn left(end: SystemTime, now: SystemTime) -> Option<Duration> {
    end.duration_since(now).ok()
}

/// Days until an end, in words.
pub(super) fn left_words(end: SystemTime, now: SystemTime) -> String {
    match left(end, now) {
        None => "over".to_owned(),
        Some(left) if left.as_secs() >= 2 * DAY => format!("{} days", left.as_secs() / DAY),
        Some(left) => crate::term::units::Span(left).to_string(),
    }
}

pub(super) const HEADS: &[&str] = &["IDENTITY", "STATE", "LEFT", "ENDS", "SERIAL"];
pub(super) const WIDE: &[&str] = &["BEGINS", "ROOT", "REVOKED"];

pub(super) fn row(issued: &Issued, wide: bool, now: SystemTime) -> Vec<Cell> {
    let state = state(issued, now);
    let is_good = issued.is_in_use(now);
    let seconds = left(issued.not_after, now).map_or(0, |left| left.as_secs());
    let words = left_words(issued.not_after, now);
    let tone = if !is_good {
        Tone::Plain
    } else if seconds < FEW_DAYS * DAY {
        Tone::Warn
    } else {
        Tone::Good
    };
    let mut row = vec![
        Cell::from(short(issued)),
        Cell::toned(state, if state == "expired" { Tone::Bad } else { tone }),
        Cell::number(seconds, words).tone(tone),
        Cell::from(clock(issued.not_after)),
        Cell::from(issued.serial.clone()),
    ];
    if wide {
        let revoked = issued
            .revoked
            .map_or_else(Cell::none, |at| clock(at).into());
        row.push(Cell::from(clock(issued.not_before)));
        row.push(Cell::from(issued.root.clone()));
        row.push(revoked);
    }
    row
}

/// One certificate for programs.
pub(super) fn document(issued: &Issued, now: SystemTime) -> Value {
    let days = left(issued.not_after, now).map_or(0, |left| left.as_secs() / DAY);
    let mut value = json!({
        "identity": issued.identity.to_string(),
        "serial": issued.serial,
        "root": issued.root,
        "notBefore": clock(issued.not_before),
        "notAfter": clock(issued.not_after),
        "daysLeft": days,
        "state": state(issued, now),
    });
    if let (Some(revoked), Some(fields)) = (issued.revoked, value.as_object_mut()) {
        fields.insert("revoked".to_owned(), clock(revoked).into());
    }
    value
}

/// One root for programs.
pub(super) fn root_document(root: &RootInfo) -> Value {
    json!({
        "serial": root.serial,
        "notBefore": clock(root.not_before),
        "notAfter": clock(root.not_after),
        "issues": root.issues,
    })
}
