//! One iteration on its way: begun on all streams, looked after, and landed when the destination
//! has all of it.
//!
//! Nothing here blocks for longer than it is told, so that whoever waits can think better of it:
//! precopy when time is up, the switchover when its limit is about to be broken. An iteration that
//! a switchover began goes on as one of precopy when the vCPUs run again; the destination sees no
//! difference.

use std::{
    cell::Cell,
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{PAGE_SIZE, proto_duration},
    v1,
};

use super::{
    super::{
        estimate::Estimator,
        sender::{Counters, Iteration},
        wire::{Kind, WireError},
    },
    link::Link,
    parts::{SourceDriver, Started},
};

/// Figures of all senders at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    bytes: u64,
    normal: u64,
    zero: u64,
    wire_nanos: u64,
}

impl Figures {
    fn of(counters: &Counters) -> Self {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        Self {
            bytes: load(&counters.bytes),
            normal: load(&counters.pages_normal),
            zero: load(&counters.pages_zero),
            wire_nanos: load(&counters.wire_nanos),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            normal: self.normal - before.normal,
            zero: self.zero - before.zero,
            wire_nanos: self.wire_nanos - before.wire_nanos,
        }
    }
}

/// The rate of bytes over the last one to two seconds, or since it began when that is less: a
/// stream that stands still shows so, however fast it was before.
#[derive(Debug)]
struct Pace(Cell<[(Instant, u64); 2]>);

impl Pace {
    const WINDOW: Duration = Duration::from_secs(1);

    fn begin(now: Instant, bytes: u64) -> Self {
        Self(Cell::new([(now, bytes); 2]))
    }

    /// Bytes a second; `bytes` is the count at `now`.
    fn rate(&self, now: Instant, bytes: u64) -> u64 {
        let [older, newer] = self.0.get();
        let (since, count) = older;
        let seconds = now.duration_since(since).as_secs_f64().max(1e-6);
        if now.duration_since(newer.0) >= Self::WINDOW {
            self.0.set([newer, (now, bytes)]);
        }
        (bytes.saturating_sub(count) as f64 / seconds) as u64
    }
}

/// An iteration on its way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) iteration: u32,
    /// Bytes of pages it has.
    pub(super) total: u64,
    begun: Instant,
    before: Figures,
    pace: Pace,
    /// Senders that have not ended it.
    working: usize,
    landed: bool,
}

/// An iteration that the destination has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landed {
    /// On the wire, headers included.
    pub(super) bytes: u64,
    pub(super) duration: Duration,
    /// Time in which the wire alone held the senders up.
    pub(super) busy: Duration,
}

impl Flight {
    /// Bytes of pages that no sender has sent yet.
    pub(super) fn remaining(&self, link: &Link) -> u64 {
        let sent = Figures::of(&link.shared.counters).since(self.before);
        self.total
            .saturating_sub((sent.normal + sent.zero) * PAGE_SIZE)
    }
}

impl SourceDriver {
    /// Hands an iteration to all senders.
    pub(super) fn take_off(&self, link: &Link, pages: Iteration) -> Flight {
        let pages = Arc::new(pages.spread(link.senders.len()));
        let (begun, before) = (Instant::now(), Figures::of(&link.shared.counters));
        let flight = Flight {
            iteration: pages.number,
            total: pages.bytes(),
            begun,
            before,
            pace: Pace::begin(begun, before.bytes),
            working: link.senders.len(),
            landed: false,
        };
        for sender in &link.senders {
            sender.start(&pages);
        }
        self.side.update(|progress| {
            progress.iteration = flight.iteration;
            progress.remaining_bytes = flight.total;
        });
        flight
    }

    /// Goes on for `time` at most; true when the destination has all of it.
    pub(super) fn advance(
        &self,
        link: &mut Link,
        flight: &mut Flight,
        time: Duration,
    ) -> Result<bool, ApiError> {
        if flight.working > 0 {
            match link.reports.recv_timeout(time) {
                Ok((_, Ok(()))) => flight.working -= 1,
                Ok((_, Err(error))) => return Err(link.last_word(error)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(ApiError::new(Reason::Internal, "the sender threads ended"));
                }
            }
        } else if link.hears(time)? {
            let (acknowledged, _) = link.receive(Kind::IterAck)?;
            if acknowledged != flight.iteration {
                return Err(WireError::corrupt(
                    "iteration",
                    format!("{acknowledged} acknowledged, {} sent", flight.iteration),
                )
                .into());
            }
            flight.landed = true;
        }
        Ok(flight.landed)
    }

    /// Publishes how far it is. With `estimator`, what a switchover would cost now.
    pub(super) fn publish_flight(
        &self,
        link: &Link,
        flight: &Flight,
        estimator: Option<&Estimator>,
        started: Started,
    ) {
        let all = Figures::of(&link.shared.counters);
        let remaining = flight.remaining(link);
        let rate = flight.pace.rate(Instant::now(), all.bytes);
        self.side.update(|progress| {
            progress.remaining_bytes = remaining;
            progress.bytes_transferred = all.bytes;
            progress.pages_normal = all.normal;
            progress.pages_zero = all.zero;
            progress.throughput_bytes_per_second = rate;
            progress.transfer_time = Some(proto_duration(started.transfer.elapsed()));
            if let Some(estimator) = estimator {
                progress.expected_downtime =
                    estimator.expected_downtime(remaining).map(proto_duration);
            }
        });
    }

    /// Keeps what a flight measured that has landed. `last`: the VM was paused all along.
    pub(super) fn land(&self, link: &Link, flight: &Flight, last: bool) -> Landed {
        let duration = flight.begun.elapsed();
        let sent = Figures::of(&link.shared.counters).since(flight.before);
        self.side.update(|progress| {
            progress.push_iteration(v1::MigrationIteration {
                iteration: flight.iteration,
                bytes_transferred: sent.bytes,
                pages_normal: sent.normal,
                pages_zero: sent.zero,
                duration: Some(proto_duration(duration)),
                r#final: last,
                remaining_bytes_start: flight.total,
                ..Default::default()
            });
        });
        // Held up by a pacer, senders take turns: each has seen the whole wire.
        let busy = match sent.wire_nanos {
            0 => duration,
            nanos => Duration::from_nanos(nanos).min(duration),
        };
        Landed {
            bytes: sent.bytes,
            duration,
            busy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_stands_still_shows_so() {
        let begun = Instant::now();
        let at = |millis| begun + Duration::from_millis(millis);
        let pace = Pace::begin(begun, 1000);
        assert_eq!(pace.rate(at(500), 1500), 1000);
        assert_eq!(pace.rate(at(1000), 2000), 1000);
        assert_eq!(pace.rate(at(2000), 12_000), 5500);
        assert_eq!(pace.rate(at(2500), 12_000), 6666);
        // Nothing came since.
        assert_eq!(pace.rate(at(3000), 12_000), 5000);
        assert_eq!(pace.rate(at(4000), 12_000), 0);
        assert_eq!(pace.rate(at(60_000), 12_000), 0);
    }
}
