//! Says before each batch whether a vCPU may go on: keeps pages written under the ceiling, lets an idle guest wait.
//!
//! A pacer belongs to one vCPU of one process. It measures from when it first saw the vCPU (or from when the ceiling
//! changed), so it needs nothing from the process that ran the vCPU before.

use std::time::{Duration, Instant};

use slat_proto::model::PAGE_SIZE;

use super::{
    control::{NONE, control_page, offset},
    step::GuestAccess,
};

/// Unused allowance older than this is lost: a vCPU that was stopped does not catch up.
const CREDIT: Duration = Duration::from_millis(100);
/// Longest single wait; the answer after it is worked out anew.
const MAX_WAIT: Duration = Duration::from_secs(1);

/// What a vCPU may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Run a batch.
    Go,
    /// Wait that long, or until told to pause, then ask again.
    Wait(Duration),
    /// Wait until told to pause.
    Idle,
}

/// Paces one vCPU.
#[derive(Debug)]
pub(crate) struct Pacer {
    rate: u64,
    since: Instant,
    written: u64,
}

impl Default for Pacer {
    fn default() -> Self {
        Self::new()
    }
}

impl Pacer {
    /// For a vCPU about to run in this process.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self {
            rate: NONE,
            since: Instant::now(),
            written: 0,
        }
    }

    /// What vCPU `vcpu` may do at `now`, by its control page.
    ///
    /// # Errors
    /// When the control page cannot be read.
    pub(crate) fn turn<M: GuestAccess>(
        &mut self,
        memory: &mut M,
        vcpu: u32,
        now: Instant,
    ) -> Result<Turn, M::Error> {
        let mut word = |at: u64| memory.read_u64(control_page(vcpu) + at);
        let rate = word(offset::RATE)?;
        if rate == 0 || word(offset::VISITS)? >= word(offset::VISIT_LIMIT)? {
            return Ok(Turn::Idle);
        }
        if rate == NONE {
            self.rate = NONE;
            return Ok(Turn::Go);
        }
        let (written, vcpus) = (word(offset::PAGES_WRITTEN)?, word(offset::VCPUS)?);
        Ok(self.paced(rate, written, vcpus, now))
    }

    fn paced(&mut self, rate: u64, written: u64, vcpus: u64, now: Instant) -> Turn {
        if self.rate != rate || written < self.written {
            *self = Self {
                rate,
                since: now,
                written,
            };
        }
        let bytes = u128::from(written - self.written) * u128::from(PAGE_SIZE);
        let nanos = bytes * u128::from(vcpus.max(1)) * 1_000_000_000 / u128::from(rate.max(1));
        let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let elapsed = now.saturating_duration_since(self.since);
        if due > elapsed {
            return Turn::Wait((due - elapsed).min(MAX_WAIT));
        }
        if elapsed - due > CREDIT {
            // `now - CREDIT` may lie before the clock's start; then there is nothing to give up.
            if let Some(since) = now.checked_sub(CREDIT) {
                self.since = since;
                self.written = written;
            }
        }
        Turn::Go
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_stay_under_the_ceiling_and_a_stopped_vcpu_does_not_catch_up() {
        let start = Instant::now();
        let mut pacer = Pacer {
            rate: NONE,
            since: start,
            written: 0,
        };
        // 100 pages a second for each of 2 vCPUs.
        let rate = 2 * 100 * PAGE_SIZE;
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(pacer.paced(rate, 1000, 2, at(0)), Turn::Go);
        assert_eq!(
            pacer.paced(rate, 1010, 2, at(40)),
            Turn::Wait(Duration::from_millis(60))
        );
        assert_eq!(pacer.paced(rate, 1010, 2, at(100)), Turn::Go);
        // An hour later only the credit of 100 ms, 10 pages, is left.
        assert_eq!(pacer.paced(rate, 1010, 2, at(3_600_000)), Turn::Go);
        assert_eq!(
            pacer.paced(rate, 1021, 2, at(3_600_000)),
            Turn::Wait(Duration::from_millis(10))
        );
    }
}
