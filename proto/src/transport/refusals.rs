//! Callers that are not let in, for the audit.
//!
//! Each is counted. Each has a line, too, until they come faster than [`A_SECOND`] for long: then a
//! line tells how many before it have none. Who has no certificate can write no more than that into
//! a log of bounded size, and push nothing of what others did out of it.
//!
//! # Locking
//! A leaf mutex over the allowance, held for a look.

use std::sync::{Mutex, PoisonError};

use metrics::{counter, describe_counter};
use slat_trust::Refusal;
use tokio::time::Instant;

use super::tls;

/// Lines a second, in the long run.
const A_SECOND: f64 = 1.0;
/// Lines at once.
const AT_ONCE: f64 = 600.0;

#[derive(Debug)]
struct Allowance {
    left: f64,
    looked: Instant,
    untold: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Refusals(Mutex<Allowance>);

impl Default for Refusals {
    fn default() -> Self {
        Self(Mutex::new(Allowance {
            left: AT_ONCE,
            looked: Instant::now(),
            untold: 0,
        }))
    }
}

impl Refusals {
    /// A line for a caller that is not let in, if there is room for one.
    pub(super) fn tell(&self, address: &str, refusal: &Refusal) {
        counter!("slat_tls_refused_total", "cause" => refusal.word()).increment(1);
        let Some(untold) = self.room(Instant::now()) else {
            return;
        };
        tracing::info!(target: "audit", peer = address, result = tls::reason(refusal).as_str(),
            why = %refusal, untold, "a connection was refused");
    }

    /// How many before it had no line; `None` when this one has none either.
    fn room(&self, now: Instant) -> Option<u64> {
        let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(allowance.looked);
        allowance.looked = now;
        allowance.left = (allowance.left + passed.as_secs_f64() * A_SECOND).min(AT_ONCE);
        if allowance.left < 1.0 {
            allowance.untold += 1;
            return None;
        }
        allowance.left -= 1.0;
        Some(std::mem::take(&mut allowance.untold))
    }
}

pub(super) fn describe() {
    describe_counter!(
        "slat_tls_refused_total",
        "Callers that were not let in, by what is wrong with their certificate."
    );
    for cause in [
        "no_certificate",
        "unknown_ca",
        "expired",
        "not_yet_valid",
        "revoked",
        "wrong_identity",
        "bad_certificate",
        "not_tls",
        "version",
    ] {
        counter!("slat_tls_refused_total", "cause" => cause).increment(0);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_has_few_lines_and_is_counted() {
        let refusals = Refusals::default();
        let begin = Instant::now();
        let told = (0..10_000).filter(|_| refusals.room(begin).is_some());
        assert_eq!(told.count(), 600);
        let later = begin + Duration::from_millis(1_500);
        assert_eq!(refusals.room(later), Some(9_400));
        assert_eq!(refusals.room(later), None);
        let much_later = begin + Duration::from_secs(3);
        assert_eq!(refusals.room(much_later), Some(1));
    }
}
