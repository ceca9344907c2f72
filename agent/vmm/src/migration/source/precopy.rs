//! Precopy: the bulk iteration, then iterations over what the guest wrote, until [`Convergence`]
//! decides. A harvest is acknowledged only when the destination has the iteration that carried it.

use std::{
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{CursorName, OnTimeout, PAGE_SIZE, proto_duration},
    v1::{self, TransferPhase, migration_decision::Action},
};

use super::{
    super::{
        convergence::{Convergence, Finished, Verdict},
        sender::Iteration,
        wire::{Kind, WireError},
    },
    link::Link,
    parts::SourceDriver,
    work::{Precopied, Started, Work},
};
use crate::memory::DirtyBatch;

/// Progress is published this often while an iteration runs.
const PUBLISH: Duration = Duration::from_millis(100);

impl SourceDriver {
    /// Until the VM is to be switched over; an error when it should rather stay.
    pub(super) fn precopy(&self, work: &mut Work) -> Result<Precopied, ApiError> {
        let started = work.started();
        let link = work.link()?;
        let cursor = self.cursor()?;
        self.machine.dirty().attach(&cursor)?;
        self.side.enter(TransferPhase::Precopy);
        let mut convergence = Convergence::new(self.params);
        let mut pages = Iteration::bulk(self.machine.memory().table().slots());
        let mut acknowledge = None;
        loop {
            let iteration = pages.number;
            let (bytes, duration) =
                self.send_iteration(link, pages, false, &convergence, started)?;
            if let Some(batch) = acknowledge.take() {
                self.machine.dirty().acknowledge(&cursor, batch)?;
            }
            let batch = self.machine.dirty().harvest(&cursor)?;
            let dirty_bytes = batch.pages * PAGE_SIZE;
            let verdict = convergence.judge(&Finished {
                iteration,
                bytes,
                duration,
                dirty_bytes,
                elapsed: started.migration.elapsed(),
            });
            self.note_dirty(iteration, &batch, duration, &convergence);
            if self.decide(iteration, verdict, dirty_bytes, &convergence)? {
                return Ok(Precopied {
                    convergence,
                    iteration: iteration + 1,
                });
            }
            acknowledge = Some(batch.batch);
            pages = self.iteration_of(iteration + 1, batch);
        }
    }

    /// Records a verdict; true when it is for the switchover.
    fn decide(
        &self,
        iteration: u32,
        verdict: Verdict,
        dirty_bytes: u64,
        convergence: &Convergence,
    ) -> Result<bool, ApiError> {
        match verdict {
            Verdict::Continue(cause) => {
                self.side.decide(iteration, Action::Continue, cause);
                Ok(false)
            }
            Verdict::Switchover(cause) => {
                self.side.decide(iteration, Action::Switchover, cause);
                Ok(true)
            }
            Verdict::ForceSwitchover(cause) => {
                self.side.decide(iteration, Action::ForceSwitchover, cause);
                Ok(true)
            }
            Verdict::TimedOut(cause) => {
                self.side.decide(iteration, Action::GiveUp, cause.clone());
                Err(ApiError::new(Reason::CompletionTimeout, cause).with(
                    "advice",
                    "raise --max-total-time or --max-downtime, or use --on-timeout force-switchover",
                ))
            }
            Verdict::NotConverging(cause) => {
                self.side.decide(iteration, Action::GiveUp, cause.clone());
                let bandwidth = convergence.bandwidth().unwrap_or(0.0) as u64;
                Err(ApiError::new(Reason::NotConverging, cause)
                    .with("dirty_bytes", dirty_bytes)
                    .with("bandwidth_bytes_per_second", bandwidth)
                    .with(
                        "advice",
                        "raise --max-downtime or --streams, or use --on-timeout force-switchover",
                    ))
            }
        }
    }

    fn iteration_of(&self, number: u32, batch: DirtyBatch) -> Iteration {
        Iteration::of(number, batch, &self.machine.memory().table())
    }

    /// Harvests what is left while the VM is paused. The last batch was not acknowledged, so this
    /// has that one and all that came since.
    pub(super) fn last_iteration(
        &self,
        cursor: &CursorName,
        iteration: u32,
    ) -> Result<Iteration, ApiError> {
        let batch = self.machine.dirty().harvest(cursor)?;
        Ok(self.iteration_of(iteration, batch))
    }

    /// Sends an iteration on all streams and waits until the destination has it. Returns its bytes
    /// of pages and its duration.
    pub(super) fn send_iteration(
        &self,
        link: &mut Link,
        pages: Iteration,
        last: bool,
        convergence: &Convergence,
        started: Started,
    ) -> Result<(u64, Duration), ApiError> {
        let iteration = pages.number;
        let total = pages.bytes();
        let shared = Arc::clone(&link.shared);
        let counters = &shared.counters;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let before = (
            load(&counters.bytes),
            load(&counters.pages_normal),
            load(&counters.pages_zero),
        );
        let begin = Instant::now();
        self.side.update(|progress| {
            progress.iteration = iteration;
            progress.remaining_bytes = total;
            progress.expected_downtime = Some(proto_duration(convergence.expected_downtime(total)));
        });
        let pages = Arc::new(pages);
        for sender in &link.senders {
            sender.start(&pages);
        }
        let mut working = link.senders.len();
        while working > 0 {
            match link.reports.recv_timeout(PUBLISH) {
                Ok((_, Ok(()))) => working -= 1,
                Ok((_, Err(error))) => return Err(link.last_word(error)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(ApiError::new(Reason::Internal, "the sender threads ended"));
                }
            }
            let sent_pages =
                load(&counters.pages_normal) - before.1 + load(&counters.pages_zero) - before.2;
            let sent = sent_pages * PAGE_SIZE;
            let bytes = load(&counters.bytes) - before.0;
            let seconds = begin.elapsed().as_secs_f64().max(1e-6);
            self.side.update(|progress| {
                progress.remaining_bytes = total.saturating_sub(sent);
                progress.bytes_transferred = load(&counters.bytes);
                progress.pages_normal = load(&counters.pages_normal);
                progress.pages_zero = load(&counters.pages_zero);
                progress.throughput_bytes_per_second = (bytes as f64 / seconds) as u64;
                progress.transfer_time = Some(proto_duration(started.transfer.elapsed()));
                if !last && convergence.bandwidth().is_some() {
                    progress.expected_downtime = Some(proto_duration(
                        convergence.expected_downtime(total.saturating_sub(sent)),
                    ));
                }
            });
            if !last {
                self.check_time(iteration, started)?;
            }
        }
        let (acknowledged, _) = link.receive(Kind::IterAck)?;
        if acknowledged != iteration {
            return Err(WireError::corrupt(
                "iteration",
                format!("{acknowledged} acknowledged, {iteration} sent"),
            )
            .into());
        }
        let duration = begin.elapsed();
        let bytes = load(&counters.bytes) - before.0;
        let normal = load(&counters.pages_normal) - before.1;
        self.side.update(|progress| {
            progress.push_iteration(v1::MigrationIteration {
                iteration,
                bytes_transferred: bytes,
                pages_normal: normal,
                pages_zero: load(&counters.pages_zero) - before.2,
                duration: Some(proto_duration(duration)),
                r#final: last,
                remaining_bytes_start: total,
                ..Default::default()
            });
        });
        Ok((bytes, duration))
    }

    /// Convergence is judged at an iteration's end, but time that is up is up: on a slow wire an
    /// iteration may be hours.
    fn check_time(&self, iteration: u32, started: Started) -> Result<(), ApiError> {
        if self.params.on_timeout != OnTimeout::Cancel
            || started.migration.elapsed() <= self.params.max_total_time
        {
            return Ok(());
        }
        let cause = format!(
            "max_total_time {:.1} s passed during iteration {iteration}",
            self.params.max_total_time.as_secs_f64()
        );
        self.side.decide(iteration, Action::GiveUp, cause.clone());
        Err(ApiError::new(Reason::CompletionTimeout, cause).with(
            "advice",
            "raise --max-total-time or the bandwidth, or use --on-timeout force-switchover",
        ))
    }

    fn note_dirty(
        &self,
        iteration: u32,
        batch: &DirtyBatch,
        duration: Duration,
        convergence: &Convergence,
    ) {
        let dirty_bytes = batch.pages * PAGE_SIZE;
        let expected = convergence.expected_downtime(dirty_bytes);
        self.side.update(|progress| {
            progress.remaining_bytes = dirty_bytes;
            progress.dirty_rate_bytes_per_second =
                (dirty_bytes as f64 / duration.as_secs_f64().max(1e-6)) as u64;
            progress.expected_downtime = Some(proto_duration(expected));
            if let Some(last) = progress
                .iterations
                .last_mut()
                .filter(|last| last.iteration == iteration)
            {
                last.dirty_pages = batch.pages;
                last.expected_downtime = Some(proto_duration(expected));
            }
        });
    }
}
