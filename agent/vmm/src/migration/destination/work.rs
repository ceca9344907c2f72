//! What has happened at the destination so far.

use std::time::Instant;

use slat_proto::ApiError;

use super::{super::wire::TOLD, link::Link};
use crate::{
    handover::protocol::{Why, destination::Input},
    machine::{Switchover, SyncProbe},
    memory::SlotTable,
};

/// Whether the error is the source's own word (Abort), not a broken connection.
pub(super) fn was_told(error: &ApiError) -> bool {
    error.metadata.contains_key(TOLD)
}

/// What has happened so far.
pub(super) struct Work {
    pub(super) started: Instant,
    pub(super) link: Link,
    /// When the machine was last told that time has passed.
    pub(super) ticked: Instant,
    /// Sees how long an append to the journal takes, once the source wants to know.
    pub(super) probe: Option<SyncProbe>,
    /// The source's state as it came.
    pub(super) state: Vec<u8>,
    /// How the VM left the source.
    pub(super) left: Switchover,
    /// The VM is owned here and could not be run.
    pub(super) trouble: Option<ApiError>,
    /// The first thing that failed here.
    pub(super) fault: Option<ApiError>,
}

impl Work {
    pub(super) fn new(table: &SlotTable, verify: bool) -> Self {
        Self {
            started: Instant::now(),
            link: Link::new(table, verify),
            ticked: Instant::now(),
            probe: None,
            state: Vec::new(),
            left: Switchover {
                run: false,
                never_ran: false,
            },
            trouble: None,
            fault: None,
        }
    }

    /// Keeps what failed first, and is the input that says so.
    pub(super) fn fail(&mut self, error: ApiError) -> Input {
        let told = was_told(&error);
        self.fault.get_or_insert(error);
        if told {
            Input::AbortHeard
        } else {
            Input::Failed(Why::Fault)
        }
    }
}
