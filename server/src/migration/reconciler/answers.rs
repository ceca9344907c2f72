//! When the answers that users wait for are due, and how the migration stands for them.

use tokio::time::Instant;

use super::{
    super::{protocol::Action, replies::Standing},
    End, Reconciler,
};

impl Reconciler {
    pub(super) fn next_answer(&self) -> Option<Instant> {
        let held = match self.end {
            End::Held { until, .. } => Some(until),
            End::NotYet | End::Shown => None,
        };
        self.replies.deadline().into_iter().chain(held).min()
    }

    pub(super) fn give_answers(&mut self) {
        if self.replies.is_empty() {
            return;
        }
        let stored = self.protocol.stored();
        let releasing =
            self.protocol.is_in_flight(Action::ReleaseSource) || !self.protocol.is_stored();
        self.replies.give(Standing {
            migration: &self.on_disk,
            committed: stored.committed,
            may_show_end: matches!(self.end, End::Shown),
            source_released: stored.source_released,
            releasing,
        });
    }
}
