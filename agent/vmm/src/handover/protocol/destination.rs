//! The destination's side: receive, check, PREPARED, READY, OWNED.
//!
//! | state | meaning | ends with |
//! |---|---|---|
//! | Preparing | memory is made, the source connects | `Populated` |
//! | Receiving | pages flow | `StateHeard` |
//! | Checking | everything has come: it is verified and loaded | `Checked` |
//! | JournallingPrepared | PREPARED is written; the last moment for a cancel | `PreparedWritten` |
//! | Ready | READY is said: only knowledge ends this | COMMIT, ABORT, an answer about the source |
//! | JournallingOwned | OWNED is written, again and again until durable | `OwnedWritten` |
//! | Aborting | ABORTED is being written | `AbortedWritten` |
//! | Ended | the VM is here, or this process ends | |
//!
//! # In doubt
//! When the source falls silent after READY, it may have relinquished or not. The VM stays here,
//! stopped. The source's agent is asked again and again: its journal decides, or the word of the
//! control plane, which had it from there. No clock does.

use super::{Why, Written};

/// What happened at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// All memory is there and the source knows it.
    Populated,
    /// The source's state came: nothing more will.
    StateHeard,
    /// Everything has arrived, digests agree, the state is loaded.
    Checked,
    /// The append of PREPARED returned.
    PreparedWritten(Written),
    /// COMMIT came.
    CommitHeard,
    /// The source gave up and said so.
    AbortHeard,
    /// No more will be heard from the source.
    LinkLost,
    /// The source's agent answered.
    SourceSays(Standing),
    /// The control plane's word.
    ControlSays(Decision),
    /// Some time has passed.
    Tick,
    /// The append of OWNED returned.
    OwnedWritten(Written),
    /// The append of ABORTED returned.
    AbortedWritten,
    /// Work of this side failed.
    Failed(Why),
    /// Somebody wants the end: the user, or whoever saw something fail elsewhere.
    Cancel(Why),
}

/// How the source's side stands, by its agent's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// RELINQUISHED is in its journal.
    Relinquished,
    /// It ended without RELINQUISHED: it kept the VM, or lost it.
    Ended,
    /// It goes on, or nobody answers: nothing that decides.
    Unknown,
}

/// What the control plane decided from the source's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The source relinquished: own the VM.
    Commit,
    /// The source keeps it or lost it: go away.
    Abort,
}

/// What to do at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Pages may come.
    Receive,
    /// Check that everything has come, compare digests, load the state. Leads to `Checked`.
    Check,
    /// Append PREPARED and sync it. Leads to `PreparedWritten`.
    JournalPrepared,
    /// Say READY. When it cannot be said: `LinkLost`.
    SayReady,
    /// Ask the source's agent how its side stands. Leads to `SourceSays`.
    AskSource,
    /// Append OWNED and sync it. Leads to `OwnedWritten`.
    JournalOwned,
    /// Run the vCPUs as they ran at the source, say RESUMED.
    RunVm,
    /// Break off what blocks.
    Interrupt,
    /// Tell the source why nothing will come of it.
    SayAbort(Why),
    /// Keep the record of the end on disk.
    RecordEnd(End),
    /// Append ABORTED; the process and its memory go. Leads to `AbortedWritten`.
    JournalAborted,
    /// Tell the end to whoever watches.
    PublishEnd(End),
}

/// How the destination's side ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The VM is owned here.
    Owned,
    /// It never came.
    GivenUp(Why),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Preparing,
    Receiving,
    Checking,
    JournallingPrepared,
    Ready { linked: bool, asking: bool },
    JournallingOwned { waiting: bool },
    Interrupted(Why),
    Aborting(Why),
    Ended(End),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    state: State,
}

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}

impl Destination {
    /// A side that waits for its source.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Preparing,
        }
    }

    /// Takes one input; answers with what to do, in order.
    pub fn step(&mut self, input: Input) -> Vec<Action> {
        match self.state {
            State::Preparing | State::Receiving => self.receiving(input),
            State::Checking | State::JournallingPrepared => self.preparing(input),
            State::Ready { linked, asking } => self.ready(linked, asking, input),
            State::JournallingOwned { waiting } => self.owning(waiting, input),
            State::Interrupted(why) => match input {
                Input::Cancel(_) | Input::Tick | Input::ControlSays(_) => Vec::new(),
                _ => self.abort(why),
            },
            State::Aborting(why) => match input {
                Input::AbortedWritten => {
                    let end = End::GivenUp(why);
                    self.go(State::Ended(end), &[Action::PublishEnd(end)])
                }
                _ => Vec::new(),
            },
            State::Ended(_) => Vec::new(),
        }
    }

    /// Whether a cancel would still be accepted, or has been.
    #[must_use]
    pub(crate) fn may_cancel(&self) -> bool {
        !matches!(
            self.state,
            State::Ready { .. } | State::JournallingOwned { .. } | State::Ended(End::Owned)
        )
    }

    /// Cancelled, and the coordinator has not noticed yet.
    #[must_use]
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self.state, State::Interrupted(_))
    }

    /// READY may have been said: only the source's journal says what happens.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        matches!(
            self.state,
            State::Ready { .. } | State::JournallingOwned { .. }
        )
    }

    /// Nothing comes from the source any more: its agent is to be asked from time to time.
    #[must_use]
    pub fn needs_ticks(&self) -> bool {
        matches!(
            self.state,
            State::Ready { linked: false, .. } | State::JournallingOwned { .. }
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

    /// Nothing was promised yet: any failure ends this side.
    fn receiving(&mut self, input: Input) -> Vec<Action> {
        match (self.state, input) {
            (State::Preparing, Input::Populated) => self.go(State::Receiving, &[Action::Receive]),
            (State::Receiving, Input::StateHeard) => self.go(State::Checking, &[Action::Check]),
            (_, Input::Cancel(why)) => self.go(State::Interrupted(why), &[Action::Interrupt]),
            (_, Input::Failed(why)) => self.abort(why),
            (_, Input::AbortHeard) => self.abort(Why::Elsewhere),
            (_, Input::LinkLost) => self.abort(Why::Fault),
            (_, Input::ControlSays(Decision::Abort)) => {
                self.go(State::Interrupted(Why::Cancelled), &[Action::Interrupt])
            }
            // A COMMIT before READY mistakes the migration: nothing was promised.
            _ => Vec::new(),
        }
    }

    /// READY is not said yet, so the source cannot have relinquished: the end is still free. What
    /// is being done goes on; the actions of the end come after it.
    fn preparing(&mut self, input: Input) -> Vec<Action> {
        match (self.state, input) {
            (State::Checking, Input::Checked) => {
                self.go(State::JournallingPrepared, &[Action::JournalPrepared])
            }
            (State::JournallingPrepared, Input::PreparedWritten(Written::Durable)) => {
                let ready = State::Ready {
                    linked: true,
                    asking: false,
                };
                self.go(ready, &[Action::SayReady])
            }
            // READY was never said, so the source never commits, whatever the journal holds.
            (State::JournallingPrepared, Input::PreparedWritten(_)) => self.abort(Why::Fault),
            (_, Input::Failed(why) | Input::Cancel(why)) => self.abort(why),
            (_, Input::AbortHeard) => self.abort(Why::Elsewhere),
            (_, Input::LinkLost) => self.abort(Why::Fault),
            (_, Input::ControlSays(Decision::Abort)) => self.abort(Why::Cancelled),
            _ => Vec::new(),
        }
    }

    fn ready(&mut self, linked: bool, asking: bool, input: Input) -> Vec<Action> {
        let ask = |this: &mut Self| {
            let asks = State::Ready {
                linked: false,
                asking: true,
            };
            this.go(asks, &[Action::AskSource])
        };
        match input {
            Input::CommitHeard if linked => self.own(),
            Input::SourceSays(Standing::Relinquished) | Input::ControlSays(Decision::Commit) => {
                self.own()
            }
            Input::AbortHeard if linked => self.abort(Why::Elsewhere),
            Input::SourceSays(Standing::Ended) | Input::ControlSays(Decision::Abort) => {
                self.abort(Why::Elsewhere)
            }
            Input::SourceSays(Standing::Unknown) => {
                let waits = State::Ready {
                    linked,
                    asking: false,
                };
                self.go(waits, &[])
            }
            Input::LinkLost | Input::Failed(_) if linked => ask(self),
            Input::Tick if !linked && !asking => ask(self),
            _ => Vec::new(),
        }
    }

    /// The source will never run the VM again: an append that failed is tried again.
    fn owning(&mut self, waiting: bool, input: Input) -> Vec<Action> {
        match input {
            Input::OwnedWritten(Written::Durable) => self.go(
                State::Ended(End::Owned),
                &[
                    Action::RunVm,
                    Action::RecordEnd(End::Owned),
                    Action::PublishEnd(End::Owned),
                ],
            ),
            Input::OwnedWritten(_) => self.go(State::JournallingOwned { waiting: true }, &[]),
            Input::Tick if waiting => self.own(),
            _ => Vec::new(),
        }
    }

    fn own(&mut self) -> Vec<Action> {
        self.go(
            State::JournallingOwned { waiting: false },
            &[Action::JournalOwned],
        )
    }

    /// The record comes before the journal, the journal before the word: whoever hears of the end
    /// finds it on disk.
    fn abort(&mut self, why: Why) -> Vec<Action> {
        self.go(
            State::Aborting(why),
            &[
                Action::SayAbort(why),
                Action::RecordEnd(End::GivenUp(why)),
                Action::JournalAborted,
            ],
        )
    }
}
