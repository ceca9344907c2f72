//! What the source's actions have led to so far.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason};

use super::{
    super::{breaker::Breaker, convergence::Convergence},
    link::Link,
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
    pub(super) precopied: Option<Precopied>,
    pub(super) blackout: Option<Blackout>,
    pub(super) resumed: Option<Resumed>,
    /// The first thing that failed here.
    pub(super) fault: Option<ApiError>,
}

/// Precopy has done what it can.
pub(super) struct Precopied {
    pub(super) convergence: Convergence,
    /// Of the last pages.
    pub(super) iteration: u32,
}

/// When things began.
#[derive(Clone, Copy)]
pub(super) struct Started {
    /// This side, with the wait for the destination's memory.
    pub(super) migration: Instant,
    /// The first page.
    pub(super) transfer: Instant,
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
            precopied: None,
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
