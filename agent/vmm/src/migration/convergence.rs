//! When to switch over, go on or give up: pure arithmetic over what finished iterations measured.
//!
//! Progress is judged only here, at the end of an iteration: between those points the remaining
//! bytes are a saw tooth that says nothing. The downtime that a switchover may cost starts at 50 %
//! of what the user accepts (at most 150 ms) and ramps up to all of it, so that a guest that could
//! be moved more gently gets the chance. Every verdict carries its cause in words, with the figures
//! it was based on.

use std::time::Duration;

use slat_proto::model::{MigrationParams, OnTimeout};

/// The gentlest target the ramp starts from.
const RAMP_START: Duration = Duration::from_millis(150);
/// Iterations before the ramp begins.
const RAMP_AFTER: u32 = 3;
/// Iterations from the first target to the last.
const RAMP_STEPS: u32 = 7;
/// Weight of the newest iteration in the bandwidth estimate.
const EWMA_ALPHA: f64 = 0.4;
/// An iteration shorter than this says little about bandwidth.
const MEASURABLE: u64 = 4 << 20;
/// Pause, harvest, vCPU state, two journal syncs and the round trips between: what a switchover
/// costs besides its pages.
const FIXED_COST: Duration = Duration::from_millis(10);
/// An iteration counts as progress when the least remaining so far falls by this share.
const STALL_MARGIN: f64 = 0.04;
/// Without progress for so long (and some iterations), precopy is not converging.
const STALL_WINDOW: Duration = Duration::from_secs(40);

/// A finished iteration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    /// 0 is the bulk iteration.
    pub(crate) iteration: u32,
    /// Bytes of pages it sent.
    pub(crate) bytes: u64,
    /// How long it took.
    pub(crate) duration: Duration,
    /// Bytes found dirty at its end.
    pub(crate) dirty_bytes: u64,
    /// Since the migration began.
    pub(crate) elapsed: Duration,
}

/// What to do after an iteration, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Another iteration.
    Continue(String),
    /// The estimate fits.
    Switchover(String),
    /// Time or iterations are up and the user prefers the move.
    ForceSwitchover(String),
    /// Time is up and the user prefers the VM where it is.
    TimedOut(String),
    /// Iterations are up, or nothing gets better, and the user prefers the VM where it is.
    NotConverging(String),
}

/// Judges iterations of one migration.
#[derive(Debug)]
pub(crate) struct Convergence {
    params: MigrationParams,
    bandwidth: Option<f64>,
    least: Option<(u64, Duration)>,
}

impl Convergence {
    pub(crate) fn new(params: MigrationParams) -> Self {
        Self {
            params,
            bandwidth: None,
            least: None,
        }
    }

    /// Bytes a second of page data, as estimated so far.
    pub(crate) fn bandwidth(&self) -> Option<f64> {
        self.bandwidth
    }

    /// Downtime if the VM were stopped with `bytes` left to send.
    pub(crate) fn expected_downtime(&self, bytes: u64) -> Duration {
        let copy = self
            .bandwidth
            .map_or(0.0, |bandwidth| bytes as f64 / bandwidth);
        // A bandwidth near zero would overflow a Duration: a day says the same.
        FIXED_COST + Duration::from_secs_f64(copy.min(86_400.0))
    }

    /// Downtime that a switchover after iteration `iteration` may cost.
    pub(crate) fn target(&self, iteration: u32) -> Duration {
        let most = self.params.max_downtime;
        let first = RAMP_START.min(most / 2);
        let step = iteration.saturating_sub(RAMP_AFTER).min(RAMP_STEPS);
        first + (most - first) * step / RAMP_STEPS
    }

    /// Takes a finished iteration in and decides.
    pub(crate) fn judge(&mut self, finished: &Finished) -> Verdict {
        let seconds = finished.duration.as_secs_f64().max(1e-6);
        if finished.bytes >= MEASURABLE || self.bandwidth.is_none() {
            let measured = (finished.bytes.max(1) as f64 / seconds).max(1.0);
            self.bandwidth = Some(match self.bandwidth {
                Some(before) => before + EWMA_ALPHA * (measured - before),
                None => measured,
            });
        }
        let expected = self.expected_downtime(finished.dirty_bytes);
        // The ramp waits for a gentler moment; where nothing is dirty there is none gentler.
        let target = if finished.dirty_bytes == 0 {
            self.params.max_downtime
        } else {
            self.target(finished.iteration)
        };
        let figures = format!(
            "{} KiB dirty after iteration {}, estimated downtime {:.1} ms, target {:.1} ms of {:.1} ms",
            finished.dirty_bytes >> 10,
            finished.iteration,
            expected.as_secs_f64() * 1e3,
            target.as_secs_f64() * 1e3,
            self.params.max_downtime.as_secs_f64() * 1e3,
        );
        if expected <= target {
            return Verdict::Switchover(figures);
        }
        let progress = self.least.is_none_or(|(least, _)| {
            (finished.dirty_bytes as f64) < least as f64 * (1.0 - STALL_MARGIN)
        });
        if progress {
            self.least = Some((finished.dirty_bytes, finished.elapsed));
        }
        let stalled = self
            .least
            .filter(|(_, since)| finished.elapsed.saturating_sub(*since) >= STALL_WINDOW)
            .filter(|_| finished.iteration > RAMP_AFTER + RAMP_STEPS);
        let timeout = finished.elapsed >= self.params.max_total_time;
        let cause = if timeout {
            format!(
                "max_total_time {:.1} s has passed; {figures}",
                self.params.max_total_time.as_secs_f64()
            )
        } else if finished.iteration + 1 >= self.params.max_iterations {
            format!(
                "max_iterations {} reached; {figures}",
                self.params.max_iterations
            )
        } else if let Some((least, _)) = stalled {
            format!(
                "no iteration left less than {} KiB for {} s; {figures}",
                least >> 10,
                STALL_WINDOW.as_secs()
            )
        } else {
            return Verdict::Continue(figures);
        };
        match self.params.on_timeout {
            OnTimeout::ForceSwitchover => Verdict::ForceSwitchover(cause),
            OnTimeout::Cancel if timeout => Verdict::TimedOut(cause),
            OnTimeout::Cancel => Verdict::NotConverging(cause),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn finished(iteration: u32, bytes: u64, millis: u64, dirty: u64, elapsed: u64) -> Finished {
        Finished {
            iteration,
            bytes,
            duration: Duration::from_millis(millis),
            dirty_bytes: dirty,
            elapsed: Duration::from_millis(elapsed),
        }
    }

    #[test]
    fn an_idle_guest_switches_over_after_the_bulk_iteration() {
        let mut convergence = Convergence::new(MigrationParams::default());
        let verdict = convergence.judge(&finished(0, 1024 * MIB, 1000, 0, 1000));
        assert!(matches!(verdict, Verdict::Switchover(_)), "{verdict:?}");
    }

    #[test]
    fn the_target_ramps_to_what_the_user_accepts_and_no_further() {
        let convergence = Convergence::new(MigrationParams::default());
        assert_eq!(convergence.target(0), Duration::from_millis(150));
        assert_eq!(convergence.target(3), Duration::from_millis(150));
        assert!(convergence.target(5) > convergence.target(4));
        assert_eq!(convergence.target(10), Duration::from_millis(300));
        assert_eq!(convergence.target(1000), Duration::from_millis(300));
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_wire_ends_as_the_user_chose() {
        for (on_timeout, forced) in [
            (OnTimeout::Cancel, false),
            (OnTimeout::ForceSwitchover, true),
        ] {
            let params = MigrationParams {
                on_timeout,
                ..MigrationParams::default()
            };
            let mut convergence = Convergence::new(params);
            let verdict = (0..)
                .map(|i| convergence.judge(&finished(i, 1024 * MIB, 1000, 1024 * MIB, 1000)))
                .find(|verdict| !matches!(verdict, Verdict::Continue(_)))
                .unwrap();
            match verdict {
                Verdict::ForceSwitchover(cause) if forced => {
                    assert!(cause.contains("max_iterations 30"))
                }
                Verdict::NotConverging(cause) if !forced => {
                    assert!(cause.contains("max_iterations 30"))
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn total_time_is_judged_at_the_end_of_an_iteration() {
        let params = MigrationParams {
            max_total_time: Duration::from_secs(2),
            ..MigrationParams::default()
        };
        let mut convergence = Convergence::new(params);
        let go_on = convergence.judge(&finished(0, 1024 * MIB, 1000, 1024 * MIB, 1000));
        assert!(matches!(go_on, Verdict::Continue(_)));
        let over = convergence.judge(&finished(1, 1024 * MIB, 1000, 1024 * MIB, 2000));
        assert!(matches!(over, Verdict::TimedOut(_)));
    }

    #[test]
    fn no_progress_over_the_window_is_a_stall_but_a_falling_minimum_is_not() {
        let params = MigrationParams {
            max_iterations: 1000,
            ..MigrationParams::default()
        };
        let mut convergence = Convergence::new(params);
        let mut falling = Convergence::new(params);
        for i in 0..200_u64 {
            let elapsed = (i + 1) * 1000;
            let verdict = falling.judge(&finished(
                i as u32,
                1024 * MIB,
                1000,
                1000 * MIB * 90_u64.pow(1) / 100 - i * 4 * MIB,
                elapsed,
            ));
            if i < 40 {
                assert!(matches!(verdict, Verdict::Continue(_)), "{i}: {verdict:?}");
            }
            let verdict = convergence.judge(&finished(
                i as u32,
                1024 * MIB,
                1000,
                1000 * MIB + i % 7,
                elapsed,
            ));
            if let Verdict::NotConverging(cause) = verdict {
                assert!(
                    i >= 40 && cause.contains("no iteration left less"),
                    "{i}: {cause}"
                );
                return;
            }
        }
        panic!("a stall went unnoticed");
    }

    proptest! {
        /// Whatever is measured, a switchover that was not forced has an estimate within what the
        /// user accepts.
        #[test]
        fn unforced_switchovers_fit(max_ms in 1_u64..2_000_000, iterations in proptest::collection::vec((0_u64..1 << 44, 0_u64..10_000_000, 0_u64..1 << 44), 1..40)) {
            let params = MigrationParams { max_downtime: Duration::from_millis(max_ms), ..MigrationParams::default() };
            let mut convergence = Convergence::new(params);
            for (i, (bytes, millis, dirty)) in iterations.into_iter().enumerate() {
                if let Verdict::Switchover(_) = convergence.judge(&finished(i as u32, bytes, millis, dirty, 0)) {
                    prop_assert!(convergence.expected_downtime(dirty) <= params.max_downtime);
                }
            }
        }
    }
}
