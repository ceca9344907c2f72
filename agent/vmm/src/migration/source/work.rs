//! What the source's actions have led to so far.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason};

use super::{
    super::{breaker::Breaker, convergence::Convergence, estimate::Prediction, sender::Iteration},
    flight::Flight,
    link::Link,
    measure::Meter,
    parts::Started,
};
use crate::{
    handover::{
        payload::Resumed,
        protocol::{Why, source::Input},
    },
    memory::MemoryDigest,
};

/// What the actions have led to so far.
pub(super) struct Work {
    /// Ends what blocks.
    pub(super) breaker: Arc<Breaker>,
    /// When the side began, with the wait for the destination's memory.
    pub(super) begun: Instant,
    /// When the first page went.
    pub(super) transfer: Instant,
    pub(super) link: Option<Link>,
    pub(super) course: Option<Course>,
    pub(super) blackout: Option<Blackout>,
    pub(super) resumed: Option<Resumed>,
    /// The first thing that failed here.
    pub(super) fault: Option<ApiError>,
}

/// How precopy stands, across switchovers that were tried.
pub(super) struct Course {
    pub(super) convergence: Convergence,
    pub(super) meter: Meter,
    /// Number of the next iteration.
    pub(super) iteration: u32,
    /// What it has.
    pub(super) next: Next,
    /// The downtime as predicted when the switchover was decided.
    pub(super) predicted: Prediction,
    /// The user prefers the move, whatever the downtime.
    pub(super) forced: bool,
    /// Switchovers that went back.
    pub(super) went_back: u32,
}

/// What the next iteration has.
#[derive(Debug)]
pub(super) enum Next {
    /// All memory.
    Bulk,
    /// The pages of a batch.
    Iteration(Iteration, u64),
    /// It is under way, with the pages of a batch.
    Flight(Flight, u64),
    /// What a harvest will bring.
    Harvest,
}

impl Next {
    pub(super) fn is_bulk(&self) -> bool {
        matches!(self, Self::Bulk)
    }
}

/// What is known of the blackout so far.
pub(super) struct Blackout {
    pub(super) begun: Instant,
    pub(super) paused: Duration,
    pub(super) copied: Duration,
    pub(super) ready: Duration,
    pub(super) committed: Duration,
    pub(super) resumed: Duration,
    pub(super) digest: Option<MemoryDigest>,
}

impl Blackout {
    /// RELINQUISHED is durable.
    pub(super) fn committed(&mut self) {
        self.committed = self.begun.elapsed();
    }
}

impl Work {
    pub(super) fn new(begun: Instant, breaker: Arc<Breaker>) -> Self {
        Self {
            breaker,
            begun,
            transfer: begun,
            link: None,
            course: None,
            blackout: None,
            resumed: None,
            fault: None,
        }
    }

    pub(super) fn started(&self) -> Started {
        Started {
            migration: self.begun,
            transfer: self.transfer,
        }
    }

    pub(super) fn link(&mut self) -> Result<&mut Link, ApiError> {
        self.link
            .as_mut()
            .ok_or_else(|| ApiError::new(Reason::Internal, "there is no connection"))
    }

    /// What precopy and switchover work with.
    pub(super) fn under_way(&mut self) -> Result<(Started, &mut Link, &mut Course), ApiError> {
        let started = self.started();
        match (&mut self.link, &mut self.course) {
            (Some(link), Some(course)) => Ok((started, link, course)),
            _ => Err(ApiError::new(Reason::Internal, "there is no connection")),
        }
    }

    /// Keeps what failed first; later failures follow from it.
    pub(super) fn note(&mut self, error: ApiError) {
        self.fault.get_or_insert(error);
    }

    /// The input that a result is.
    pub(super) fn input(&mut self, result: Result<Input, ApiError>) -> Input {
        result.unwrap_or_else(|error| {
            self.note(error);
            Input::Failed(Why::Fault)
        })
    }
}
