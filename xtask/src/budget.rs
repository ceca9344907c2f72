//! The time of one run of CI. Machines differ by a factor of two: what is too much on a slow one
//! is left out there, by name and with the command that makes up for it, instead of taking the
//! whole run over its bound.

use std::time::{Duration, Instant};

use crate::tally::Tally;

/// A run is to take less than an hour, with its build and the last check that fitted. Checks have
/// been seen to take half as long again as is said of them.
const TOTAL: Duration = Duration::from_secs(35 * 60);

/// How much of it is left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    begin: Instant,
    total: Duration,
}

impl Budget {
    /// Begins now.
    pub(crate) fn begin() -> Self {
        Self {
            begin: Instant::now(),
            total: TOTAL,
        }
    }

    /// How long the run takes so far.
    pub(crate) fn used(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Nothing when a check fits that takes up to `needs` on a slow machine. Else what is said of
    /// it: that it was skipped, and what to type instead.
    pub(crate) fn refuses(&self, name: &str, needs: Duration, instead: &str) -> Option<Tally> {
        let used = self.used();
        if used + needs <= self.total {
            return None;
        }
        let why = format!(
            "takes up to {} s, and the run has used {} of its {} s: {instead}",
            needs.as_secs(),
            used.as_secs(),
            self.total.as_secs(),
        );
        Some(Tally::skipped(name, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_skipped_by_name() {
        let budget = Budget {
            begin: Instant::now(),
            total: Duration::from_secs(60),
        };
        let fits = |secs| budget.refuses("lab", Duration::from_secs(secs), "cargo xtask lab");
        assert_eq!(fits(59), None);
        let skipped = fits(61).unwrap();
        assert_eq!((skipped.passed, skipped.failed), (0, 0));
        assert_eq!(skipped.skipped[0].name, "lab");
        let why = &skipped.skipped[0].why;
        assert!(why.ends_with("of its 60 s: cargo xtask lab"), "{why}");
    }
}
