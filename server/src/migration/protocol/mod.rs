//! The server's part of a handover, pure: no I/O, no clock, no tasks, no texts.
//!
//! [`MigrationProtocol::step`] takes one [`Input`] and answers with the [`Action`]s to begin. A driver carries them out
//! and feeds how each ended. The same code runs in production, in the model checker and in the property tests.
//!
//! # What the driver guarantees
//! * Inputs are fed one at a time, as they come. None waits for an action: a cancel is taken in at once.
//! * Each action ends with exactly one input, within a bounded time: [`Input::Stored`] or [`Input::Answered`]. A call
//!   that ended with [`Answer::Silent`] may still take effect, at any later time; one that was answered may not again.
//! * What an answer says was true at some time after its action was asked for; see [`Answer`] for what more.
//! * [`Input::Stored`] comes when that state is on disk. After a crash the next life begins with the last state that is:
//!   [`MigrationProtocol::new`]. Answers to the earlier life never reach it; its calls may still take effect.
//! * Nothing is shown or answered to a user that is not [`stored`](MigrationProtocol::stored).
//!
//! # What the protocol guarantees
//! * **Disk first.** While the state differs from what is on disk, [`Action::Persist`] is the only action. What is asked
//!   for next is decided by what is known then, not when the write began.
//! * **One call of a kind.** An action that is in flight is not asked for again before it ended. After it ended it is
//!   asked for while it is wanted: at the next [`Input::Retry`], or when what is known has changed.
//!
//! # Rules
//! * **Evidence only.** COMPLETED needs the destination's word (its own, or through a source that heard RESUMED).
//!   FAILED and CANCELLED need the source's word or a source that is *out*: see below. [`Input::FiguresOverdue`] is the
//!   one input a clock makes that counts: it ends the wait for figures after the outcome is known, never decides one.
//! * **A source is out** when it was never told to begin; or when its agent knows no such side, the VM is there with its
//!   epoch, and no StartOutgoing can succeed any more. Either each one that was made has been answered, or seen to have
//!   had its effect; or the destination's listener was gone *before* the source was asked: its ticket opens nothing, so
//!   a late StartOutgoing fails by itself. Therefore CANCELLED is final: no call that is still under way can make it
//!   COMPLETED. A server that restarts knows from the disk whether a StartOutgoing was made ([`Start`]).
//! * **A cancel waits for nothing it does not need.** Before StartOutgoing it needs nobody. After it, the source's word; a
//!   source that knows no side while a StartOutgoing may be under way makes the cancel end the destination, and ask again.
//! * **An absence is dropped when it is stale**: the side was heard of while the question was under way.
//! * **The point of no return.** Once the source reported RELINQUISHED or COMPLETED, or the destination COMPLETED, the
//!   phase is COMMITTED or COMPLETED, and nothing that ends the destination is asked for again. The one exception in phase
//!   is a destination that is known to have died after the commit and before it owned the VM: FAILED.
//! * **The last copy stays.** After such an end the frozen memory at the source is all that is left of the VM. The
//!   source's side is then released by the user's wish alone ([`Input::DeleteRequested`]), or when its process is gone too.
//! * **Silence** is IN_DOUBT when a commit may have happened (the switchover was seen) and the source cannot be asked;
//!   before that, it is just waiting.
//! * **A verdict is waited for.** While a comparison of digests was asked for and has no result, a source that is merely
//!   silent does not end the migration: only its word, its absence, or [`Input::FiguresOverdue`] does.
//! * **Terminal phases stay.** After one, only the clean-up of both sides is asked for.
//! * **A release overtakes nothing.** Neither side is released, nor the destination ended, while the call that makes it is
//!   in flight. The source's record is kept while a StartOutgoing may arrive that could succeed: to a source that has the
//!   record it changes nothing.

mod facts;
mod settle;
mod view;
mod wanted;
mod words;

#[cfg(test)]
mod tests;

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase, VmLocation as Location};

use self::view::{ActionSet, View};
pub use self::words::{Action, Answer, Cause, Durable, Input, Report, Side, Start};
use crate::phase::has_ended;

/// One migration's state. See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationProtocol {
    phase: Phase,
    location: Location,
    cause: Option<Cause>,
    cancel_requested: bool,
    unverified: bool,
    switched: bool,
    start: Start,

    /// Nothing is in the way any more.
    admitted: bool,
    /// Taken up again after a restart of the server: an earlier life may have asked for anything that its phase allows.
    resumed: bool,
    described: bool,
    /// The destination was asked to prepare, in this life or perhaps in an earlier one.
    prepare_asked: bool,
    prepared: bool,
    /// StartOutgoing was made in this life or perhaps in an earlier one.
    started: bool,
    /// The only StartOutgoing was answered, or seen to have had its effect.
    landed: bool,
    precopy: bool,
    relinquished: bool,
    destination_completed: bool,
    figures_overdue: bool,
    /// After the destination's death: whether the source's frozen memory is gone too.
    copy_gone: Option<bool>,
    delete_requested: bool,
    /// A refusal that ends the migration once the source is known to be out.
    ending: Option<Cause>,
    /// The destination was asked to end for the sake of a cancel.
    destination_cancelled: bool,
    /// The source was asked after the destination's listener was gone, and has no side.
    out_for_good: bool,
    /// Nothing changed since the last retry: help a handover that hangs.
    stuck: bool,
    source: View,
    destination: View,

    stored: Durable,
    storing: Option<Durable>,
    in_flight: ActionSet,
    /// In flight, and the side was heard of since: an absence is stale.
    stale: ActionSet,
    /// In flight, and asked for when the destination's listener was gone.
    late: ActionSet,
    /// Asked for since the last retry or change.
    tried: ActionSet,
}

impl MigrationProtocol {
    /// A migration from its stored state: a new one, or one that a restarted server takes up.
    #[must_use]
    pub fn new(durable: &Durable) -> Self {
        let resumed = durable.phase != Phase::Pending;
        let precopy = durable.phase == Phase::PrecopyActive;
        let switched =
            durable.switched || matches!(durable.phase, Phase::Switchover | Phase::InDoubt);
        // A stored commit is the source's word, or the destination's that it runs: either way past the point.
        let relinquished = durable.committed || durable.phase == Phase::Committed;
        Self {
            phase: durable.phase,
            location: durable.location,
            cause: None,
            cancel_requested: durable.cancel_requested,
            unverified: durable.unverified,
            switched,
            start: durable.start,
            admitted: resumed,
            resumed,
            described: false,
            prepare_asked: resumed,
            prepared: false,
            started: durable.start != Start::Never,
            // These phases were reached by the source's word.
            landed: durable.start == Start::Once && (precopy || switched || relinquished),
            precopy,
            relinquished,
            destination_completed: durable.phase == Phase::Completed,
            figures_overdue: false,
            copy_gone: None,
            delete_requested: false,
            ending: None,
            destination_cancelled: false,
            out_for_good: false,
            stuck: false,
            source: View::new(durable.source_released),
            destination: View::new(durable.destination_released),
            stored: *durable,
            storing: None,
            in_flight: ActionSet::default(),
            stale: ActionSet::default(),
            late: ActionSet::default(),
            tried: ActionSet::default(),
        }
    }

    /// What must be stored of it as it is now.
    #[must_use]
    pub fn durable(&self) -> Durable {
        Durable {
            phase: self.phase,
            location: self.location,
            cancel_requested: self.cancel_requested,
            switched: self.switched,
            committed: self.committed(),
            unverified: self.unverified,
            start: self.start,
            source_released: self.source.released,
            destination_released: self.destination.released,
        }
    }

    /// What is on disk. Nothing else may be shown.
    #[must_use]
    pub fn stored(&self) -> &Durable {
        &self.stored
    }

    /// Whether the state is on disk as it is.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        self.storing.is_none() && self.stored == self.durable()
    }

    /// The phase, on disk or not yet.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it ended in this life, or is in doubt.
    #[must_use]
    pub fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// Whether a call is under way.
    #[must_use]
    pub fn is_in_flight(&self, action: Action) -> bool {
        match action {
            Action::Persist => self.storing.is_some(),
            call => self.in_flight.has(call),
        }
    }

    /// Past the point of no return.
    #[must_use]
    pub fn committed(&self) -> bool {
        self.relinquished || self.destination_completed
    }

    /// Terminal, both sides released, and that is on disk: nothing is left to do.
    #[must_use]
    pub fn finished(&self) -> bool {
        has_ended(self.phase)
            && self.source.released
            && self.destination.released
            && self.is_stored()
    }

    /// The outcome is known; only the source's last figures are waited for.
    #[must_use]
    pub fn awaits_figures(&self) -> bool {
        self.phase == Phase::Committed && self.destination_completed
    }

    /// A comparison of digests was asked for and nobody has told its result.
    #[must_use]
    pub fn awaits_verdict(&self) -> bool {
        self.unverified
    }

    /// The frozen memory at the source is the last copy of the VM: nothing but the user ends it.
    #[must_use]
    pub fn keeps_source(&self) -> bool {
        self.phase == Phase::Failed
            && self.committed()
            && self.location != Location::Lost
            && !self.source.released
    }

    /// Takes one input; answers with what to begin, in order.
    pub fn step(&mut self, input: Input) -> Vec<Action> {
        let before = self.known();
        self.take(input);
        self.settle();
        let retry = input == Input::Retry;
        if retry || before != self.known() {
            self.stuck = retry;
            self.try_again(retry);
        }
        self.intend_start();
        if self.storing.is_some() {
            return Vec::new();
        }
        if self.stored != self.durable() {
            self.storing = Some(self.durable());
            return vec![Action::Persist];
        }
        let mut actions = Vec::new();
        for action in Action::CALLS {
            if self.wants(action) && !self.in_flight.has(action) && !self.tried.has(action) {
                self.begin(action);
                actions.push(action);
            }
        }
        actions
    }

    /// What changes what is wanted.
    fn known(&self) -> impl PartialEq + use<> {
        let side = |view: &View| (view.contact, view.at(), view.released);
        (
            self.durable(),
            side(&self.source),
            side(&self.destination),
            self.admitted,
            self.delete_requested,
        )
    }

    fn begin(&mut self, action: Action) {
        self.in_flight.set(action, true);
        self.stale.set(action, false);
        self.late.set(action, self.is_ticket_dead());
        // A watch that broke is begun again at once; the driver paces it.
        let follow = matches!(action, Action::FollowSource | Action::FollowDestination);
        self.tried.set(action, !follow);
        match action {
            Action::Prepare => self.prepare_asked = true,
            Action::Start => {
                self.started = true;
                self.out_for_good = false;
            }
            Action::CancelDestination if !has_ended(self.phase) => {
                self.destination_cancelled = true;
            }
            _ => {}
        }
    }

    /// Forgets what was tried. What begins a migration is begun again by the clock alone.
    fn try_again(&mut self, everything: bool) {
        let tried = std::mem::take(&mut self.tried);
        if !everything {
            for action in [Action::Describe, Action::Prepare, Action::Start] {
                self.tried.set(action, tried.has(action));
            }
        }
    }

    /// StartOutgoing was made and may arrive at a source that has no record of it.
    fn start_may_land(&self) -> bool {
        self.started && !(self.start == Start::Once && self.landed)
    }

    /// No data connection can be opened with what a StartOutgoing of before carries.
    fn is_ticket_dead(&self) -> bool {
        let ended = self
            .destination
            .last
            .is_some_and(|report| view::ended_without(report.phase));
        !self.prepare_asked || ended || self.destination.is_absent() || self.destination.released
    }

    /// The VM is at the source, which has no side and will have none that works. See the module.
    fn is_source_out(&self) -> bool {
        self.source.contact == view::Contact::Absent { owner: true }
            && (!self.start_may_land() || self.out_for_good)
    }

    /// Nothing says that the source ever had a side.
    fn is_unstarted(&self) -> bool {
        !has_ended(self.phase)
            && !self.committed()
            && !self.precopy
            && !self.switched
            && self.source.last.is_none()
    }

    fn destination_says(&self, phase: TransferPhase) -> bool {
        self.destination.at() == Some(phase)
    }
}
