//! Precopy: the bulk iteration, then iterations over what the guest wrote, until [`Convergence`]
//! decides. A harvest is acknowledged only when the destination has the iteration that carried it.
//!
//! A switchover that took too long comes back here with what it had begun: the last pages become
//! one more iteration, and their harvest is acknowledged like any other.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{CursorName, OnTimeout, PAGE_SIZE, proto_duration},
    v1::{TransferPhase, migration_decision::Action},
};

use super::{
    super::{
        convergence::{Convergence, Finished, Verdict},
        sender::Iteration,
    },
    flight::{Flight, Landed},
    link::Link,
    measure::unreachable_limit,
    parts::{SourceDriver, Started},
    work::{Course, Next, Work},
};
use crate::memory::DirtyBatch;

/// Progress is published this often while an iteration runs.
const PUBLISH: Duration = Duration::from_millis(100);

impl SourceDriver {
    /// Until the VM is to be switched over; an error when it should rather stay.
    pub(super) fn precopy(&self, work: &mut Work) -> Result<(), ApiError> {
        let cursor = self.cursor()?;
        let (started, link, course) = work.under_way()?;
        if course.next.is_bulk() {
            self.machine.dirty().attach_whole(&cursor)?;
            self.side.enter(TransferPhase::Precopy);
        }
        loop {
            let (mut flight, batch) = match std::mem::replace(&mut course.next, Next::Harvest) {
                Next::Bulk => {
                    let machine = Arc::clone(&self.machine);
                    let pages = Iteration::bulk(self.machine.memory().table().slots())
                        .protected_by(move |slot, first, pages| {
                            // The harvest that follows fails with the same error.
                            if let Err(error) = machine.dirty().protect(slot, first, pages) {
                                tracing::error!(%error, slot, "pages cannot be protected");
                            }
                        });
                    (self.take_off(link, pages), None)
                }
                Next::Iteration(pages, batch) => (self.take_off(link, pages), Some(batch)),
                Next::Flight(flight, batch) => (flight, Some(batch)),
                Next::Harvest => {
                    let batch = self.harvest(&cursor, &mut course.convergence)?;
                    let (number, id) = (course.iteration, batch.batch);
                    (self.take_off(link, self.pages_of(number, batch)), Some(id))
                }
            };
            let landed = self.follow(link, &mut flight, &course.convergence, started)?;
            if let Some(batch) = batch {
                self.machine.dirty().acknowledge(&cursor, batch)?;
            }
            course.convergence.estimator.sent(landed.bytes, landed.busy);
            let iteration = flight.iteration;
            self.measure_again(link, &mut course.meter, &mut course.convergence, iteration)?;
            let batch = self.harvest(&cursor, &mut course.convergence)?;
            course.convergence.estimator.runs(self.machine.runs());
            let dirty_bytes = batch.pages * PAGE_SIZE;
            let verdict = course.convergence.judge(&Finished {
                iteration,
                dirty_bytes,
                elapsed: started.migration.elapsed(),
            });
            self.note_dirty(iteration, batch.pages, landed.duration, &course.convergence);
            course.iteration = iteration + 1;
            course.predicted = course.convergence.estimator.predict(dirty_bytes);
            if self.decide(iteration, verdict, dirty_bytes, course)? {
                // Its bits come back with the harvest of the switchover.
                return Ok(());
            }
            let id = batch.batch;
            course.next = Next::Iteration(self.pages_of(iteration + 1, batch), id);
        }
    }

    /// Until the destination has the iteration.
    fn follow(
        &self,
        link: &mut Link,
        flight: &mut Flight,
        convergence: &Convergence,
        started: Started,
    ) -> Result<Landed, ApiError> {
        loop {
            let landed = self.advance(link, flight, PUBLISH)?;
            self.publish_flight(link, flight, Some(&convergence.estimator), started);
            if landed {
                return Ok(self.land(link, flight, false));
            }
            self.check_time(flight.iteration, started)?;
        }
    }

    /// Records a verdict; true when it is for the switchover.
    fn decide(
        &self,
        iteration: u32,
        verdict: Verdict,
        dirty_bytes: u64,
        course: &mut Course,
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
                course.forced = true;
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
                Err(self.not_converging(iteration, cause, dirty_bytes, &course.convergence))
            }
            Verdict::Unreachable(cause, least) => {
                self.side.decide(iteration, Action::GiveUp, cause.clone());
                Err(unreachable_limit(&cause, &least, &self.params))
            }
        }
    }

    /// Gives up: it does not converge.
    pub(super) fn not_converging(
        &self,
        iteration: u32,
        cause: String,
        dirty_bytes: u64,
        convergence: &Convergence,
    ) -> ApiError {
        self.side.decide(iteration, Action::GiveUp, cause.clone());
        let bandwidth = convergence.estimator.bandwidth().unwrap_or(0.0) as u64;
        ApiError::new(Reason::NotConverging, cause)
            .with("dirty_bytes", dirty_bytes)
            .with("bandwidth_bytes_per_second", bandwidth)
            .with(
                "advice",
                "raise --max-downtime or --streams, or use --on-timeout force-switchover",
            )
    }

    /// The pages of a harvest as an iteration.
    pub(super) fn pages_of(&self, number: u32, batch: DirtyBatch) -> Iteration {
        Iteration::of(number, batch, &self.machine.memory().table())
    }

    /// Harvests. A batch that was not acknowledged comes back in the next one.
    pub(super) fn harvest(
        &self,
        cursor: &CursorName,
        convergence: &mut Convergence,
    ) -> Result<DirtyBatch, ApiError> {
        let begun = Instant::now();
        let batch = self.machine.dirty().harvest(cursor)?;
        convergence.estimator.harvested(begun.elapsed());
        Ok(batch)
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
        dirty_pages: u64,
        duration: Duration,
        convergence: &Convergence,
    ) {
        let dirty_bytes = dirty_pages * PAGE_SIZE;
        let estimator = &convergence.estimator;
        let expected = estimator.expected_downtime(dirty_bytes).map(proto_duration);
        self.side.update(|progress| {
            progress.remaining_bytes = dirty_bytes;
            progress.dirty_rate_bytes_per_second =
                (dirty_bytes as f64 / duration.as_secs_f64().max(1e-6)) as u64;
            progress.expected_downtime = expected;
            progress.prediction = Some(estimator.message(iteration, dirty_bytes));
            if let Some(last) = progress
                .iterations
                .last_mut()
                .filter(|last| last.iteration == iteration)
            {
                last.dirty_pages = dirty_pages;
                last.expected_downtime = expected;
            }
        });
    }
}
