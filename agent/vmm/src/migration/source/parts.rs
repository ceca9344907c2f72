//! What the source's side is made from.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use slat_proto::{
    ApiError,
    model::{CursorName, MigrationParams},
    v1,
};

use super::super::{channel::Channel, filter::PageFilter};
use crate::{
    handover::{protocol::source::Source, side::Side},
    machine::Machine,
};

/// What the source's side needs.
pub(crate) struct SourceDriver {
    pub(crate) machine: Arc<Machine>,
    pub(crate) side: Arc<Side<Source>>,
    pub(crate) address: SocketAddr,
    /// How its connections are protected, and what they show.
    pub(crate) channel: Channel,
    pub(crate) params: MigrationParams,
    pub(crate) epoch: u64,
    pub(crate) versions: v1::ChosenVersions,
    pub(crate) filter: Arc<dyn PageFilter>,
    /// What earlier migrations between the two hosts measured.
    pub(crate) remembered: Option<v1::RememberedCosts>,
}

/// When things began.
#[derive(Clone, Copy)]
pub(super) struct Started {
    /// This side, with the wait for the destination's memory.
    pub(super) migration: Instant,
    /// The first page.
    pub(super) transfer: Instant,
}

/// The migration's reader of dirty pages.
pub(super) fn cursor() -> Result<CursorName, ApiError> {
    // Cursors of API callers have a name space of their own: a caller's of the same name is
    // another.
    CursorName::from_id("slat-migration")
}

impl SourceDriver {
    pub(super) fn cursor(&self) -> Result<CursorName, ApiError> {
        cursor()
    }

    pub(super) fn iteration(&self) -> u32 {
        self.side
            .transfer()
            .progress
            .map_or(0, |progress| progress.iteration)
    }
}
