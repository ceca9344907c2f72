//! How long a pager has said nothing. A pager tells its state every second, so one that is silent
//! is frozen: stopped by a signal, or stuck. Its guest waits at its next fault, and nobody else
//! would ever say so.
//!
//! Silence is counted in looks of this process, each for no more than [`LOOK`]: while this process
//! itself does not run, no pager gets older.
//!
//! *Locking*: behind the desk's lock.

use std::time::{Duration, Instant};

/// A look counts for no more than this.
const LOOK: Duration = Duration::from_millis(500);
/// Silence that is worth a word: the guest may be waiting.
const SHOWN: Duration = Duration::from_secs(3);
/// One that is not through with its setup reads the heads of its source's files, which may be slow.
const SETS_UP: Duration = Duration::from_secs(60);
/// After which a pager that served is given up, and another takes its place.
const GIVEN_UP: Duration = Duration::from_secs(6);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Silence {
    looked: Option<Instant>,
    lasts: Duration,
}

impl Silence {
    /// The pager said something, or another pager came.
    pub(super) fn broken(&mut self) {
        *self = Self::default();
    }

    /// Somebody looks. `true` once: the pager is to be given up. `serves`: it is through with its
    /// setup.
    pub(super) fn look(&mut self, now: Instant, serves: bool) -> bool {
        let bound = if serves { GIVEN_UP } else { SETS_UP };
        let since = self.looked.replace(now);
        let more = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let before = self.lasts;
        self.lasts += more.min(LOOK);
        before < bound && self.lasts >= bound
    }

    /// How long it lasts, if that is worth a word.
    pub(super) fn shown(&self) -> Option<Duration> {
        (self.lasts >= SHOWN).then_some(self.lasts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_pager_is_shown_and_then_given_up_once() {
        let (mut silence, begin) = (Silence::default(), Instant::now());
        let mut given_up = Vec::new();
        for tick in 0..40_u32 {
            if silence.look(begin + tick * LOOK / 2, true) {
                given_up.push(tick);
            }
            assert_eq!(silence.shown().is_some(), tick >= 12, "{tick}");
        }
        assert_eq!(given_up, [24]);
        silence.broken();
        assert_eq!(silence.shown(), None);
    }

    #[test]
    fn one_that_opens_a_slow_source_has_a_minute() {
        let (mut silence, begin) = (Silence::default(), Instant::now());
        for tick in 0..110_u32 {
            assert!(!silence.look(begin + tick * LOOK, false), "{tick}");
        }
        assert!((110..130).any(|tick| silence.look(begin + tick * LOOK, false)));
    }

    #[test]
    fn while_this_process_does_not_run_no_pager_gets_older() {
        let (mut silence, begin) = (Silence::default(), Instant::now());
        assert!(!silence.look(begin, true));
        assert!(!silence.look(begin + Duration::from_secs(600), true));
        assert_eq!(silence.shown(), None);
    }
}
