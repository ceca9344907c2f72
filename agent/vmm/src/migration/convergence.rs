//! When to switch over, go on or give up: pure arithmetic over what finished iterations measured.
//!
//! Progress is judged only here, at the end of an iteration: between those points the remaining
//! bytes are a saw tooth that says nothing. The downtime that a switchover may cost starts at 50 %
//! of what the user accepts (at most 150 ms) and ramps up to all of it, so that a guest that could
//! be moved more gently gets the chance. What it would cost is predicted by [`Estimator`]. Every
//! verdict carries its cause in words, with the figures it was based on.

use std::time::Duration;

use slat_proto::model::{MigrationParams, OnTimeout};

use super::estimate::{Estimator, Prediction};

/// The gentlest target the ramp starts from.
const RAMP_START: Duration = Duration::from_millis(150);
/// Iterations before the ramp begins.
const RAMP_AFTER: u32 = 3;
/// Iterations from the first target to the last.
const RAMP_STEPS: u32 = 7;
/// An iteration counts as progress when the least remaining so far falls by this share.
const STALL_MARGIN: f64 = 0.04;
/// Without progress for so long (and some iterations), precopy is not converging.
const STALL_WINDOW: Duration = Duration::from_secs(40);

/// A finished iteration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    /// 0 is the bulk iteration.
    pub(crate) iteration: u32,
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
    /// What a switchover costs at least, with nothing left to send, is more than the user accepts.
    Unreachable(String, Prediction),
}

/// Judges iterations of one migration.
#[derive(Debug)]
pub(crate) struct Convergence {
    params: MigrationParams,
    /// What a switchover would cost.
    pub(crate) estimator: Estimator,
    least: Option<(u64, Duration)>,
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Convergence {
    pub(crate) fn new(params: MigrationParams, estimator: Estimator) -> Self {
        Self {
            params,
            estimator,
            least: None,
        }
    }

    /// Downtime that a switchover after iteration `iteration` may cost. Never less than it costs
    /// with nothing left to send: no gentler moment comes.
    pub(crate) fn target(&self, iteration: u32) -> Duration {
        let most = self.params.max_downtime;
        let first = RAMP_START.min(most / 2);
        let step = iteration.saturating_sub(RAMP_AFTER).min(RAMP_STEPS);
        let ramp = first + (most - first) * step / RAMP_STEPS;
        ramp.max(self.estimator.predict(0).total()).min(most)
    }

    /// Why the limit cannot be met at all, as far as is known, and the least that a switchover
    /// costs. `None` when it can, and when the user prefers the move.
    pub(crate) fn out_of_reach(&self) -> Option<(String, Prediction)> {
        let least = self.estimator.least();
        let most = self.params.max_downtime;
        if least.total() <= most || self.params.on_timeout == OnTimeout::ForceSwitchover {
            return None;
        }
        let cause = format!(
            "a switchover takes at least {:.1} ms between these hosts with nothing left to send, max_downtime is {:.1} ms",
            millis(least.total()),
            millis(most),
        );
        Some((cause, least))
    }

    /// Takes a finished iteration in and decides.
    pub(crate) fn judge(&mut self, finished: &Finished) -> Verdict {
        self.estimator.calm();
        let expected = self.estimator.predict(finished.dirty_bytes).total();
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
            millis(expected),
            millis(target),
            millis(self.params.max_downtime),
        );
        if let Some((cause, least)) = self.out_of_reach() {
            return Verdict::Unreachable(format!("{cause}; {figures}"), least);
        }
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
            // Not the guest is in the way, but what a switchover costs all along.
            OnTimeout::Cancel if self.estimator.predict(0).total() > self.params.max_downtime => {
                Verdict::Unreachable(cause, self.estimator.predict(0))
            }
            OnTimeout::Cancel => Verdict::NotConverging(cause),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Between two processes of one machine.
    fn new(params: MigrationParams) -> Convergence {
        let mut estimator = Estimator::new(None, None);
        estimator.round_trip(Duration::from_micros(100));
        estimator.source_synced(Duration::from_millis(1));
        estimator.destination_synced(Duration::from_millis(1));
        Convergence::new(params, estimator)
    }

    fn judge(
        convergence: &mut Convergence,
        iteration: u32,
        bytes: u64,
        millis: u64,
        dirty: u64,
        elapsed: u64,
    ) -> Verdict {
        convergence
            .estimator
            .sent(bytes, Duration::from_millis(millis));
        convergence.judge(&Finished {
            iteration,
            dirty_bytes: dirty,
            elapsed: Duration::from_millis(elapsed),
        })
    }

    #[test]
    fn five_milliseconds_are_kept_where_a_switchover_takes_less() {
        let params = MigrationParams {
            max_downtime: Duration::from_millis(5),
            ..MigrationParams::default()
        };
        let mut convergence = new(params);
        let verdict = judge(&mut convergence, 0, 1024 * MIB, 1000, 0, 1000);
        assert!(matches!(verdict, Verdict::Switchover(_)), "{verdict:?}");
        // 100 KiB at 1 GiB/s are another 0.1 ms: no gentler moment is waited for in vain.
        let mut convergence = new(params);
        let verdict = (0..=RAMP_AFTER + RAMP_STEPS)
            .map(|i| judge(&mut convergence, i, 1024 * MIB, 1000, 100 << 10, 1000))
            .find(|verdict| !matches!(verdict, Verdict::Continue(_)));
        assert!(
            matches!(verdict, Some(Verdict::Switchover(_))),
            "{verdict:?}"
        );
    }

    #[test]
    fn a_limit_below_what_a_switchover_costs_is_refused_with_the_figure() {
        let params = MigrationParams {
            max_downtime: Duration::from_millis(2),
            ..MigrationParams::default()
        };
        let mut convergence = new(params);
        let (cause, least) = convergence.out_of_reach().unwrap();
        assert_eq!(least.total(), Duration::from_micros(3300));
        assert!(cause.contains("3.3 ms"), "{cause}");
        let verdict = judge(&mut convergence, 0, 1024 * MIB, 1000, 0, 1000);
        assert!(matches!(verdict, Verdict::Unreachable(..)), "{verdict:?}");
        // Who prefers the move gets it when iterations are up.
        let forced = new(MigrationParams {
            on_timeout: OnTimeout::ForceSwitchover,
            ..params
        });
        assert!(forced.out_of_reach().is_none());
    }

    #[test]
    fn an_idle_guest_switches_over_after_the_bulk_iteration() {
        let mut convergence = new(MigrationParams::default());
        let verdict = judge(&mut convergence, 0, 1024 * MIB, 1000, 0, 1000);
        assert!(matches!(verdict, Verdict::Switchover(_)), "{verdict:?}");
    }

    #[test]
    fn an_idle_guest_that_cannot_be_moved_in_time_is_not_blamed() {
        let params = MigrationParams {
            max_downtime: Duration::from_millis(3),
            max_iterations: 2,
            ..MigrationParams::default()
        };
        let mut convergence = new(params);
        // Sometimes it would do, mostly not.
        convergence
            .estimator
            .source_synced(Duration::from_micros(100));
        let verdict = judge(&mut convergence, 0, 1024 * MIB, 1000, 0, 1000);
        assert!(matches!(verdict, Verdict::Continue(_)), "{verdict:?}");
        let verdict = judge(&mut convergence, 1, 1024 * MIB, 1000, 0, 1000);
        assert!(matches!(verdict, Verdict::Unreachable(..)), "{verdict:?}");
    }

    #[test]
    fn the_target_ramps_to_what_the_user_accepts_and_no_further() {
        let convergence = new(MigrationParams::default());
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
            let mut convergence = new(params);
            let verdict = (0..)
                .map(|i| judge(&mut convergence, i, 1024 * MIB, 1000, 1024 * MIB, 1000))
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
        let mut convergence = new(params);
        let go_on = judge(&mut convergence, 0, 1024 * MIB, 1000, 1024 * MIB, 1000);
        assert!(matches!(go_on, Verdict::Continue(_)));
        let over = judge(&mut convergence, 1, 1024 * MIB, 1000, 1024 * MIB, 2000);
        assert!(matches!(over, Verdict::TimedOut(_)));
    }

    #[test]
    fn no_progress_over_the_window_is_a_stall_but_a_falling_minimum_is_not() {
        let params = MigrationParams {
            max_iterations: 1000,
            ..MigrationParams::default()
        };
        let mut convergence = new(params);
        let mut falling = new(params);
        for i in 0..200_u64 {
            let elapsed = (i + 1) * 1000;
            let verdict = judge(
                &mut falling,
                i as u32,
                1024 * MIB,
                1000,
                1000 * MIB * 90_u64.pow(1) / 100 - i * 4 * MIB,
                elapsed,
            );
            if i < 40 {
                assert!(matches!(verdict, Verdict::Continue(_)), "{i}: {verdict:?}");
            }
            let verdict = judge(
                &mut convergence,
                i as u32,
                1024 * MIB,
                1000,
                1000 * MIB + i % 7,
                elapsed,
            );
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
            let mut convergence = new(params);
            for (i, (bytes, millis, dirty)) in iterations.into_iter().enumerate() {
                if let Verdict::Switchover(_) = judge(&mut convergence, i as u32, bytes, millis, dirty, 0) {
                    prop_assert!(convergence.estimator.predict(dirty).total() <= params.max_downtime);
                }
            }
        }
    }
}
