//! The source's side: precopy, switchover, RELINQUISHED, COMMIT.
//!
//! | state | meaning | ends with |
//! |---|---|---|
//! | Connecting | connections open, the destination makes its memory | `Connected` |
//! | Precopy | the VM runs, pages flow | `SwitchoverDecided` |
//! | Switchover | vCPUs stop, last pages and state go | `StateSent`, `Overran` |
//! | GoingBack | it took too long, and the state has not gone: vCPUs run again | `WentBack` |
//! | Sent | READY is waited for | `ReadyHeard` |
//! | Journalling | RELINQUISHED is being written; no cancel any more | `Journalled` |
//! | Settling | whether RELINQUISHED is durable is being found out | `JournalSettled` |
//! | Relinquished | COMMIT is said, RESUMED waited for | `ResumedHeard`, `LinkLost` |
//! | Unanswered | no answer to COMMIT will come: the VM stays stopped | a release, `Adopt` |
//! | Adopting | ADOPTED is being written | `AdoptionWritten` |
//! | Interrupted | cancelled; the driver's work is being broken off | any word of the driver |
//! | Ended | undone, handed over, or taken back | |
//!
//! Going back is possible until the state has gone: the destination then has pages and nothing else,
//! and cannot become READY. Once `StateSent` was fed, a word of going back changes nothing.
//!
//! Undoing is one list of actions, whatever was going on: the guest first, for it may stand still.
//!
//! # Taken back
//! `Adopt` is an operator's order, and with it the assertion that no other process runs the VM.
//! This machine cannot know that; it only takes the order at the right moment: RELINQUISHED, and
//! nothing more to be heard from the destination. A source that heard RESUMED never takes it.

use super::{Settled, Why, Written};

/// What happened at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Every connection is open and the destination has all its memory.
    Connected,
    /// Precopy is over: the VM is to be handed over now.
    SwitchoverDecided,
    /// The last pages and the state are sent.
    StateSent,
    /// The limit on downtime is about to be broken, and the state is not sent.
    Overran,
    /// The vCPUs run again.
    WentBack,
    /// READY came.
    ReadyHeard,
    /// The append of RELINQUISHED returned.
    Journalled(Written),
    /// The journal was read again.
    JournalSettled(Settled),
    /// RESUMED came.
    ResumedHeard,
    /// Work of this side failed, or the destination gave up and said so.
    Failed(Why),
    /// No more will be heard from the destination.
    LinkLost,
    /// Somebody wants the end: the user, or whoever saw something fail elsewhere.
    Cancel(Why),
    /// An operator wants the VM back, and says that no other process runs it.
    Adopt,
    /// The append of ADOPTED returned.
    AdoptionWritten(Written),
}

/// What to do at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Dirty logging on, iterations over what the guest writes. Leads to `SwitchoverDecided`.
    Precopy,
    /// Stop the vCPUs, send the last pages and the state. Leads to `StateSent` or `Overran`.
    SwitchOver,
    /// Let the vCPUs run again if the switchover stopped them; the VM stays part of this. Leads to
    /// `WentBack`.
    GoBack,
    /// Wait for READY. Leads to `ReadyHeard`.
    AwaitReady,
    /// Append RELINQUISHED and sync it. Leads to `Journalled`.
    JournalRelinquished,
    /// Read the journal again and make durable what it says. Leads to `JournalSettled`.
    SettleJournal,
    /// RELINQUISHED may be told to others now.
    PublishRelinquished,
    /// Say COMMIT and wait for the answer. Leads to `ResumedHeard` or `LinkLost`.
    Commit,
    /// Break off what blocks: the driver's work then fails.
    Interrupt,
    /// Let the vCPUs run again if the switchover stopped them; the VM is no longer part of this.
    ResumeVm,
    /// Dirty logging off.
    StopLogging,
    /// Tell the destination that nothing will come, and why.
    SayAbort(Why),
    /// Keep the record of the end on disk, then tell it.
    RecordEnd(End),
    /// Append ADOPTED and sync it. Leads to `AdoptionWritten`.
    JournalAdopted,
}

/// How the source's side ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The destination has the VM.
    HandedOver,
    /// The VM stayed.
    Kept(Why),
    /// An operator took the VM back.
    TakenBack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Connecting,
    Precopy,
    Switchover,
    GoingBack,
    Sent,
    Journalling,
    Settling,
    Relinquished,
    Unanswered,
    Adopting,
    Interrupted(Why),
    Ended(End),
}

impl State {
    /// Nothing was journalled and nothing is being undone: a failure or a cancel ends it.
    fn may_end(self) -> bool {
        matches!(
            self,
            Self::Connecting | Self::Precopy | Self::Switchover | Self::GoingBack | Self::Sent
        )
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    state: State,
}

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

impl Source {
    /// A side that connects.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Connecting,
        }
    }

    /// Takes one input; answers with what to do, in order.
    pub fn step(&mut self, input: Input) -> Vec<Action> {
        if let Input::Cancel(why) = input {
            return self.cancel(why);
        }
        match (self.state, input) {
            (State::Interrupted(why), _) => self.undo(why),
            (State::Connecting, Input::Connected) => self.go(State::Precopy, &[Action::Precopy]),
            (State::Precopy, Input::SwitchoverDecided) => {
                self.go(State::Switchover, &[Action::SwitchOver])
            }
            (State::Switchover, Input::StateSent) => self.go(State::Sent, &[Action::AwaitReady]),
            (State::Switchover, Input::Overran) => self.go(State::GoingBack, &[Action::GoBack]),
            (State::GoingBack, Input::WentBack) => self.go(State::Precopy, &[Action::Precopy]),
            (State::Sent, Input::ReadyHeard) => {
                self.go(State::Journalling, &[Action::JournalRelinquished])
            }
            (State::Journalling, Input::Journalled(Written::Durable))
            | (State::Settling, Input::JournalSettled(Settled::Present)) => self.go(
                State::Relinquished,
                &[Action::PublishRelinquished, Action::Commit],
            ),
            (State::Journalling, Input::Journalled(Written::Unknown)) => {
                self.go(State::Settling, &[Action::SettleJournal])
            }
            (State::Journalling, Input::Journalled(Written::Refused))
            | (State::Settling, Input::JournalSettled(Settled::Absent)) => self.undo(Why::Fault),
            (State::Relinquished, Input::ResumedHeard) => self.go(
                State::Ended(End::HandedOver),
                &[Action::StopLogging, Action::RecordEnd(End::HandedOver)],
            ),
            (State::Relinquished, Input::LinkLost | Input::Failed(_)) => {
                self.go(State::Unanswered, &[])
            }
            (State::Unanswered, Input::Adopt) => {
                self.go(State::Adopting, &[Action::JournalAdopted])
            }
            (State::Adopting, Input::AdoptionWritten(Written::Durable)) => self.go(
                State::Ended(End::TakenBack),
                &[Action::StopLogging, Action::RecordEnd(End::TakenBack)],
            ),
            // Nothing runs here before the entry is durable, whatever the file holds by now.
            (State::Adopting, Input::AdoptionWritten(_)) => self.go(State::Unanswered, &[]),
            (state, Input::Failed(why)) if state.may_end() => self.undo(why),
            (state, Input::LinkLost) if state.may_end() => self.undo(Why::Fault),
            _ => Vec::new(),
        }
    }

    /// Whether a cancel would still be accepted, or has been.
    #[must_use]
    pub(crate) fn may_cancel(&self) -> bool {
        !matches!(
            self.state,
            State::Journalling
                | State::Settling
                | State::Relinquished
                | State::Unanswered
                | State::Adopting
                | State::Ended(End::HandedOver)
        )
    }

    /// Cancelled, and what was going on is not undone yet.
    #[must_use]
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self.state, State::Interrupted(_))
    }

    /// RELINQUISHED is durable: this side never runs the VM again, unless an operator takes it
    /// back.
    #[must_use]
    pub fn relinquished(&self) -> bool {
        matches!(
            self.state,
            State::Relinquished
                | State::Unanswered
                | State::Adopting
                | State::Ended(End::HandedOver)
        )
    }

    /// How it ended.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        match self.state {
            State::Ended(end) => Some(end),
            _ => None,
        }
    }

    fn go(&mut self, state: State, actions: &[Action]) -> Vec<Action> {
        self.state = state;
        actions.to_vec()
    }

    fn cancel(&mut self, why: Why) -> Vec<Action> {
        match self.state {
            state if state.may_end() => self.go(State::Interrupted(why), &[Action::Interrupt]),
            _ => Vec::new(),
        }
    }

    fn undo(&mut self, why: Why) -> Vec<Action> {
        let end = End::Kept(why);
        self.go(
            State::Ended(end),
            &[
                Action::ResumeVm,
                Action::StopLogging,
                Action::SayAbort(why),
                Action::RecordEnd(end),
            ],
        )
    }
}
