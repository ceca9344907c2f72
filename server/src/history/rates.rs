//! From counters to rates, and from all lines to the busiest.
//!
//! A counter's growth between two samples of one run is spread evenly over the time between them; a
//! point of a chart is what falls into its step, by the time that the step's samples cover. Two
//! samples too far apart say nothing about the time between: that is a gap, not a rate. Two runs of
//! one line that overlap (source and destination of a migration) add up.

use super::{
    rate::Rate,
    ring::{ABSENT, Ring, Sample},
};

/// The times of a chart's points.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Beginning of the first step, milliseconds since 1970.
    pub(super) start: u64,
    /// Length of a step, milliseconds.
    pub(super) step: u64,
    /// Steps.
    pub(super) len: usize,
    /// Samples farther apart than this are a gap, milliseconds.
    pub(super) gap: u64,
}

impl Grid {
    fn end(&self) -> u64 {
        self.start + self.step * u64::try_from(self.len).unwrap_or(0)
    }
}

/// Pairs of neighbouring samples of one run that end after `since`, newest first, with the growth
/// between them.
fn growths(
    ring: &Ring,
    rate: Rate,
    since: u64,
    gap: u64,
    mut each: impl FnMut(&Sample, &Sample, u64),
) {
    // The oldest sample seen so far, by run: a few at most.
    let mut later: Vec<Sample> = Vec::new();
    for sample in ring.samples().iter().rev() {
        // Bytes that migrations sent are counted by the line, not by its processes.
        let run = if rate == Rate::Sent { 0 } else { sample.run };
        let counter = sample.counters[rate as usize];
        let known = later.iter_mut().find(|known| known.run == run);
        let current = Sample { run, ..*sample };
        match known {
            Some(next) => {
                let grown = next.counters[rate as usize];
                let near = next.at > sample.at && next.at - sample.at <= gap;
                if near && counter != ABSENT && grown != ABSENT && grown >= counter {
                    each(sample, next, grown - counter);
                }
                *next = current;
            }
            None => later.push(current),
        }
        // The pair that crosses the beginning has been seen for the run that is newest here.
        if sample.at < since && later.iter().all(|known| known.at < since) {
            return;
        }
    }
}

/// What of `growth` between `from` and `to` lies after `since`.
fn part_after(from: u64, to: u64, growth: u64, since: u64) -> f64 {
    let inside = to.saturating_sub(from.max(since));
    growth_of(growth) * millis(inside) / millis(to - from)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a figure for a chart; counters below 2^53 are exact"
)]
fn growth_of(growth: u64) -> f64 {
    growth as f64
}

fn millis(span: u64) -> f64 {
    growth_of(span)
}

/// Mean rate a second since `since`, over `window` milliseconds. `None` when no growth can be told.
pub(super) fn mean(ring: &Ring, rate: Rate, since: u64, window: u64, gap: u64) -> Option<f64> {
    let (mut sum, mut any) = (0.0, false);
    growths(ring, rate, since, gap, |from, to, growth| {
        if to.at > since {
            sum += part_after(from.at, to.at, growth, since);
            any = true;
        }
    });
    any.then(|| sum * 1000.0 / millis(window.max(1)))
}

/// The rate over the last `window` milliseconds that samples cover.
pub(super) fn current(ring: &Ring, rate: Rate, now: u64, window: u64, gap: u64) -> Option<f64> {
    let (mut sum, mut first, mut last) = (0.0, u64::MAX, 0);
    growths(
        ring,
        rate,
        now.saturating_sub(window),
        gap,
        |from, to, growth| {
            if to.at + gap > now && to.at > now.saturating_sub(window) {
                sum += growth_of(growth);
                first = first.min(from.at);
                last = last.max(to.at);
            }
        },
    );
    (last > first).then(|| sum * 1000.0 / millis(last - first))
}

/// The rate a second in each step; `None` where samples cover nothing of it.
pub(super) fn on_grid(ring: &Ring, rate: Rate, grid: Grid) -> Vec<Option<f64>> {
    let mut growth = vec![0.0; grid.len];
    let mut covered = vec![0u64; grid.len];
    let end = grid.end();
    growths(ring, rate, grid.start, grid.gap, |from, to, grown| {
        let (begin, stop) = (from.at.max(grid.start), to.at.min(end));
        if begin >= stop {
            return;
        }
        let per_milli = growth_of(grown) / millis(to.at - from.at);
        let mut at = begin;
        while at < stop {
            let index = usize::try_from((at - grid.start) / grid.step).unwrap_or(usize::MAX);
            let next = (at - (at - grid.start) % grid.step + grid.step).min(stop);
            if let (Some(sum), Some(time)) = (growth.get_mut(index), covered.get_mut(index)) {
                *sum += per_milli * millis(next - at);
                // Overlapping runs cover the same time.
                *time = (*time + (next - at)).min(grid.step);
            }
            at = next;
        }
    });
    growth
        .into_iter()
        .zip(covered)
        .map(|(sum, time)| (time > 0).then(|| sum * 1000.0 / millis(time)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(samples: &[(u64, &str, u64)]) -> Ring {
        let mut ring = Ring::default();
        for (at, process, faults) in samples {
            let run = ring.run(process);
            let counters = [*faults, ABSENT, ABSENT, ABSENT, 0];
            let sample = Sample {
                at: *at,
                run,
                counters,
            };
            ring.push(sample, 1000, 0);
        }
        ring
    }

    const GRID: Grid = Grid {
        start: 10_000,
        step: 1000,
        len: 4,
        gap: 5000,
    };

    #[test]
    fn growth_is_spread_over_the_time_between_its_samples() {
        let ring = ring(&[(9_500, "p", 0), (11_500, "p", 200), (12_000, "p", 300)]);
        assert_eq!(
            on_grid(&ring, Rate::Faults, GRID),
            [Some(100.0), Some(150.0), None, None]
        );
        assert_eq!(mean(&ring, Rate::Faults, 10_000, 2000, 5000), Some(125.0));
        assert_eq!(current(&ring, Rate::Faults, 12_000, 400, 5000), Some(200.0));
        // Not offered is nothing, never 0.
        assert_eq!(mean(&ring, Rate::Flushes, 10_000, 2000, 5000), None);
    }

    #[test]
    fn another_process_and_a_long_silence_are_gaps_and_no_falls() {
        let moved = ring(&[
            (10_000, "p", 1000),
            (11_000, "p", 1100),
            (11_500, "q", 0),
            (12_500, "q", 50),
        ]);
        let rates = on_grid(&moved, Rate::Faults, GRID);
        assert_eq!(rates, [Some(100.0), Some(50.0), Some(50.0), None]);
        let silent = ring(&[(5_000, "p", 0), (12_000, "p", 7000)]);
        assert_eq!(on_grid(&silent, Rate::Faults, GRID), [None; 4]);
        assert_eq!(mean(&silent, Rate::Faults, 10_000, 2000, 5000), None);
    }
}
