//! When a VM was made, in the time of a wall clock that may be set while it lives.
//!
//! The time is kept beside what the wall clock was ahead of the monotonic one then. When somebody
//! sets the wall clock, that changes by as much, and the time that is shown moves with it: the VM's
//! age stays what it is. Differences below [`WORTH`] are left alone, so that the time does not
//! tremble.

use prost_types::Timestamp;
use slat_proto::model::{nanos_timestamp, now, timestamp_nanos};

const NANOS: i128 = 1_000_000_000;
/// Nobody sets a clock by less. The kernel slews both clocks alike.
const WORTH: i128 = NANOS / 2;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Birth {
    time: Timestamp,
    ahead: i128,
}

impl Birth {
    /// Of a VM that was made at `time`, by the wall clock as it is now.
    pub(super) fn at(time: Timestamp) -> Self {
        Self {
            time,
            ahead: wall_clock_ahead(),
        }
    }

    /// By the wall clock as it is now.
    pub(super) fn time(&self) -> Timestamp {
        self.time_when(wall_clock_ahead())
    }

    fn time_when(&self, ahead: i128) -> Timestamp {
        let set_by = ahead - self.ahead;
        if set_by.abs() < WORTH {
            return self.time;
        }
        // In tenths of a second, so that two answers are alike.
        let tenth = NANOS / 10;
        let moved = (set_by + tenth / 2).div_euclid(tenth) * tenth;
        nanos_timestamp(timestamp_nanos(&self.time) + moved)
    }
}

/// How far the wall clock is ahead of the one that nobody sets and that goes on while the machine
/// sleeps, nanoseconds.
fn wall_clock_ahead() -> i128 {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    timestamp_nanos(&now()) - (i128::from(boot.tv_sec) * NANOS + i128::from(boot.tv_nsec))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn birth(seconds: i128) -> Birth {
        Birth {
            time: nanos_timestamp(seconds * NANOS),
            ahead: 1_000 * NANOS,
        }
    }

    #[test]
    fn a_clock_that_is_set_moves_the_time_and_not_the_age() {
        let birth = birth(5_000);
        for hours in [2, -1] {
            let set_by = hours * 3_600 * NANOS;
            // The two clocks are not read at one moment.
            for off in [0, 30_000_000, -30_000_000] {
                let shown = birth.time_when(1_000 * NANOS + set_by + off);
                let moved = timestamp_nanos(&shown) - 5_000 * NANOS;
                assert_eq!(moved, set_by);
            }
        }
    }

    #[test]
    fn without_that_it_does_not_tremble() {
        let birth = birth(5_000);
        for off in [0, 1, -1, 400_000_000, -400_000_000] {
            assert_eq!(birth.time_when(1_000 * NANOS + off), birth.time);
        }
        let now = now();
        assert_eq!(Birth::at(now).time(), now);
    }
}
