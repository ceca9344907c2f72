//! The blackout: vCPUs stop, the last pages and the state go, COMMIT is said. Each part is
//! measured.
//!
//! Until the state is sent the limit on downtime is watched: when the time so far and what is still
//! expected are more than the user accepts, the vCPUs run again and precopy goes on
//! (`on_overrun`). Afterwards it is too late: the destination may be READY, and only the journals
//! say who has the VM.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    model::{OnOverrun, OnTimeout, PAGE_SIZE, Verify, proto_duration},
    v1::{self, TransferPhase, migration_decision::Action},
};

use super::{
    super::{
        estimate::Prediction,
        socket::broken_off,
        wire::{Kind, WireError},
    },
    measure::threads,
    parts::SourceDriver,
    work::{Blackout, Course, Next, Work},
};
use crate::{
    cpu_time::thread_cpu_time,
    handover::{payload::Resumed, state::VmState},
    memory::MemoryDigest,
};

/// So many switchovers may go back; the next one decides as `on_timeout` says.
const MOST_WAYS_BACK: u32 = 5;
/// The limit is looked at ten times, and no more or less often than this.
const LEAST_TICK: Duration = Duration::from_millis(1);
const MOST_TICK: Duration = Duration::from_millis(20);

/// How the switchover's first half ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The destination has everything.
    StateSent,
    /// It would take too long, and the state was not sent.
    Overran,
}

/// What a switchover is held to.
struct Limit {
    begun: Instant,
    predicted: Prediction,
    on_overrun: OnOverrun,
}

impl SourceDriver {
    /// Stops the vCPUs, sends the last pages and the state; or goes no further, when the limit on
    /// downtime is about to be broken.
    pub(super) fn switch_over(&self, work: &mut Work) -> Result<Outcome, ApiError> {
        let begun = Instant::now();
        let cursor = self.cursor()?;
        let (started, link, course) = work.under_way()?;
        let runs = self.machine.runs();
        let left = self.machine.enter_switchover(self.side.migration())?;
        let paused = begun.elapsed();
        if let Some(pacer) = &link.shared.pacer {
            pacer.lift(true);
        }
        self.side.enter(TransferPhase::Switchover);
        let predicted = course.predicted;
        course.convergence.estimator.runs(runs);
        if runs {
            course.convergence.estimator.paused(paused);
        }
        let limit = Limit {
            begun,
            predicted,
            on_overrun: if course.forced {
                OnOverrun::Finish
            } else {
                self.params.on_overrun
            },
        };

        let batch = self.harvest(&cursor, &mut course.convergence)?;
        let (iteration, id, bytes) = (course.iteration, batch.batch, batch.pages * PAGE_SIZE);
        let pages = self.pages_of(iteration, batch);
        let rest = course.convergence.estimator.predict(bytes);
        if self.overruns(&limit, rest.copy() + rest.after_copy(), bytes, course)? {
            course.next = Next::Iteration(pages, id);
            return Ok(Outcome::Overran);
        }
        let mut flight = self.take_off(link, pages);
        let tick = (self.params.max_downtime / 10).clamp(LEAST_TICK, MOST_TICK);
        while !self.advance(link, &mut flight, tick)? {
            self.publish_flight(link, &flight, None, started);
            let bytes = flight.remaining(link);
            let rest = course.convergence.estimator.predict(bytes);
            if self.overruns(&limit, rest.copy() + rest.after_copy(), bytes, course)? {
                course.next = Next::Flight(flight, id);
                return Ok(Outcome::Overran);
            }
        }
        self.publish_flight(link, &flight, None, started);
        let landed = self.land(link, &flight, true);
        let copied = begun.elapsed();
        // What was sent is at the destination: only what the guest writes after a way back is new.
        self.machine.dirty().acknowledge(&cursor, id)?;
        course.iteration = iteration + 1;
        course.next = Next::Harvest;
        course.convergence.estimator.sent(landed.bytes, landed.busy);
        let rest = course.convergence.estimator.predict(0);
        if self.overruns(&limit, rest.after_copy(), 0, course)? {
            return Ok(Outcome::Overran);
        }

        let digest = match self.params.verify {
            // The VM stands still meanwhile: a cancel does not wait for its end.
            Verify::BeforeCommit => {
                let begun = Instant::now();
                let digest = MemoryDigest::unless(
                    &self.machine.memory().table(),
                    threads(),
                    link.shared.breaker.flag(),
                )
                .ok_or_else(|| WireError::Io(broken_off()))?;
                course.convergence.estimator.digest(begun.elapsed());
                Some(digest)
            }
            Verify::None | Verify::AfterCommit => None,
        };
        let vcpus = self.machine.backend()?.save_state().map_err(|error| {
            // Which call failed, and by what, stays in its metadata.
            let mut told = ApiError::from(error);
            told.reason = Reason::StateSave;
            told.message = format!("vCPU state could not be read: {}", told.message);
            told
        })?;
        let state = VmState {
            left,
            digest: digest.clone(),
            vcpus,
            // Nobody changes slots while the VM migrates.
            generation: self.machine.memory().table().generation(),
        };
        let state = state.encode();
        // The last moment: with the state the destination may become READY.
        let prepared = begun.elapsed() - copied;
        let rest = course.convergence.estimator.predict(0).after_copy();
        if self.overruns(&limit, rest.saturating_sub(prepared), 0, course)? {
            return Ok(Outcome::Overran);
        }
        link.send(Kind::State, 0, &state)?;
        work.blackout = Some(Blackout {
            begun,
            paused,
            copied,
            ready: copied,
            committed: copied,
            resumed: copied,
            digest,
        });
        Ok(Outcome::StateSent)
    }

    /// Whether to go back to precopy: the limit is about to be broken, with `rest` still to come
    /// and `bytes` of pages left. The decision is recorded.
    ///
    /// # Errors
    /// NOT_CONVERGING when it went back often enough.
    fn overruns(
        &self,
        limit: &Limit,
        rest: Duration,
        bytes: u64,
        course: &mut Course,
    ) -> Result<bool, ApiError> {
        let elapsed = limit.begun.elapsed();
        let total = elapsed + rest;
        if limit.on_overrun == OnOverrun::Finish || total <= self.params.max_downtime {
            return Ok(false);
        }
        let iteration = course.iteration;
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        let figures = format!(
            "paused for {:.1} ms, {:.1} ms still expected with {} KiB left; {:.1} ms were predicted, max_downtime is {:.1} ms",
            millis(elapsed),
            millis(rest),
            bytes >> 10,
            millis(limit.predicted.total()),
            millis(self.params.max_downtime),
        );
        course
            .convergence
            .estimator
            .overran(total, &limit.predicted);
        if course.went_back >= MOST_WAYS_BACK {
            if self.params.on_timeout == OnTimeout::ForceSwitchover {
                let cause = format!("{MOST_WAYS_BACK} switchovers went back; {figures}");
                self.side.decide(iteration, Action::ForceSwitchover, cause);
                course.forced = true;
                return Ok(false);
            }
            let cause =
                format!("{MOST_WAYS_BACK} switchovers went back, and so would this; {figures}");
            return Err(self.not_converging(iteration, cause, bytes, &course.convergence));
        }
        course.went_back += 1;
        self.side.decide(iteration, Action::ResumePrecopy, figures);
        Ok(true)
    }

    /// The VM runs again, and precopy goes on with what the switchover left.
    pub(super) fn go_back(&self, work: &mut Work) -> Result<(), ApiError> {
        // The guest first: it stands still.
        self.machine.leave_switchover(self.side.migration())?;
        if let Some(pacer) = &work.link()?.shared.pacer {
            pacer.lift(false);
        }
        self.side.enter(TransferPhase::Precopy);
        Ok(())
    }

    pub(super) fn await_ready(&self, work: &mut Work) -> Result<(), ApiError> {
        work.link()?.receive(Kind::Ready)?;
        if let Some(blackout) = &mut work.blackout {
            blackout.ready = blackout.begun.elapsed();
        }
        Ok(())
    }

    /// Says COMMIT; the answer ends the downtime.
    pub(super) fn commit(&self, work: &mut Work) -> Result<Resumed, ApiError> {
        let link = work.link()?;
        link.send(Kind::Commit, 0, &[])?;
        let (_, payload) = link.receive(Kind::Resumed)?;
        let resumed = Resumed::decode(&payload)?;
        if let Some(blackout) = &mut work.blackout {
            blackout.resumed = blackout.begun.elapsed();
        }
        Ok(resumed)
    }

    /// Publishes what the blackout was made of.
    pub(super) fn publish_downtime(&self, work: &Work, resumed: &Resumed) {
        let (Some(blackout), Some(link)) = (&work.blackout, &work.link) else {
            return;
        };
        let cpu = link
            .shared
            .counters
            .cpu_nanos
            .load(std::sync::atomic::Ordering::Relaxed);
        self.side.update(|progress| {
            progress.remaining_bytes = 0;
            // A VM that could not be started there is still down.
            progress.downtime = resumed.as_it_was.then(|| proto_duration(blackout.resumed));
            progress.downtime_breakdown = Some(v1::DowntimeBreakdown {
                pause: Some(proto_duration(blackout.paused)),
                final_copy: Some(proto_duration(blackout.copied - blackout.paused)),
                state: Some(proto_duration(blackout.ready - blackout.copied)),
                commit: Some(proto_duration(blackout.committed - blackout.ready)),
                resume: Some(proto_duration(blackout.resumed - blackout.committed)),
            });
            progress.transfer_time = Some(proto_duration(work.transfer.elapsed()));
            progress.cpu_time = Some(proto_duration(
                Duration::from_nanos(cpu) + thread_cpu_time(),
            ));
        });
    }

    pub(super) fn digest(&self) -> MemoryDigest {
        MemoryDigest::of(&self.machine.memory().table(), threads())
    }
}
