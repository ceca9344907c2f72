//! What is asked of a migration while it runs, when answers are due, and how it stands for them.

use tokio::time::Instant;

use super::{
    super::{
        protocol::{Action, Input},
        replies::{Command, Standing},
    },
    End, Reconciler,
};

impl Reconciler {
    pub(super) fn command(&mut self, command: Command) {
        let input = match command {
            Command::Fenced => return self.look_for_fences(),
            Command::Cancel(_) => Input::CancelRequested,
            Command::DeleteKept(_) => Input::DeleteRequested,
            Command::Forget(side, _) => {
                tracing::warn!(migration = %self.name(), host = self.caller.subject.host(side), "a side is given up with its host, by order");
                Input::HostForgotten(side)
            }
        };
        self.replies.push(command);
        self.feed(input);
    }

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
        let withdrawn = self.replies.give(Standing {
            migration: &self.on_disk,
            committed: stored.committed,
            may_show_end: matches!(self.end, End::Shown),
            source_released: stored.source_released,
            destination_released: stored.destination_released,
            releasing,
        });
        if withdrawn {
            self.feed(Input::DeleteWithdrawn);
        }
    }
}
