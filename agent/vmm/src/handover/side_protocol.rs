//! What a side needs to know of its protocol machine, whichever of the two it is.

use slat_proto::v1::TransferRole;

use super::protocol::{Why, destination, source};

/// A protocol machine.
pub(crate) trait SideProtocol: Default + Send + 'static {
    /// What it is fed.
    type Input;
    /// What it asks for.
    type Action: Send;
    /// Which side it is.
    const ROLE: TransferRole;
    /// The same, as in error metadata (`side`).
    const NAME: &'static str;

    /// One step.
    fn step(&mut self, input: Self::Input) -> Vec<Self::Action>;
    /// Whether a cancel would be accepted, or was.
    fn may_cancel(&self) -> bool;
    /// Cancelled, and its coordinator has not undone its work yet.
    fn is_cancelled(&self) -> bool;
    /// The input of a cancel.
    fn cancel(why: Why) -> Self::Input;
    /// Whether an action is to reach a coordinator that is blocked.
    fn is_interrupt(action: &Self::Action) -> bool;
}

impl SideProtocol for source::Source {
    type Input = source::Input;
    type Action = source::Action;
    const ROLE: TransferRole = TransferRole::Source;
    const NAME: &'static str = "source";

    fn step(&mut self, input: Self::Input) -> Vec<Self::Action> {
        Self::step(self, input)
    }

    fn may_cancel(&self) -> bool {
        Self::may_cancel(self)
    }

    fn is_cancelled(&self) -> bool {
        Self::is_cancelled(self)
    }

    fn cancel(why: Why) -> Self::Input {
        source::Input::Cancel(why)
    }

    fn is_interrupt(action: &Self::Action) -> bool {
        *action == source::Action::Interrupt
    }
}

impl SideProtocol for destination::Destination {
    type Input = destination::Input;
    type Action = destination::Action;
    const ROLE: TransferRole = TransferRole::Destination;
    const NAME: &'static str = "destination";

    fn step(&mut self, input: Self::Input) -> Vec<Self::Action> {
        Self::step(self, input)
    }

    fn may_cancel(&self) -> bool {
        Self::may_cancel(self)
    }

    fn is_cancelled(&self) -> bool {
        Self::is_cancelled(self)
    }

    fn cancel(why: Why) -> Self::Input {
        destination::Input::Cancel(why)
    }

    fn is_interrupt(action: &Self::Action) -> bool {
        *action == destination::Action::Interrupt
    }
}
