//! The server's part of a handover, pure: no I/O, no clock, no tasks, no texts.
//!
//! [`MigrationProtocol::step`] takes one [`Input`] and answers with the [`Action`]s to begin. A
//! driver carries them out and feeds how each ended. The same code runs in production, in the model
//! checker and in the property tests.
//!
//! # What the driver guarantees
//! * Inputs are fed one at a time, as they come. None waits for an action: a cancel is taken in at
//!   once.
//! * Each action ends with exactly one input, within a bounded time: [`Input::Stored`] or
//!   [`Input::Answered`]. A call that ended with [`Answer::Silent`] may still take effect, at any
//!   later time; one that was answered may not again.
//! * What an answer says was true at some time after its action was asked for; see [`Answer`] for
//!   what more.
//! * [`Input::Stored`] comes when that state is on disk. After a crash the next life begins with
//!   the last state that is: [`MigrationProtocol::new`]. Answers to the earlier life never reach
//!   it; its calls may still take effect.
//! * Nothing is shown or answered to a user that is not [`stored`](MigrationProtocol::stored).
//!
//! # What the protocol guarantees
//! * **Disk first.** While the state differs from what is on disk, [`Action::Persist`] is the only
//!   action. What is asked for next is decided by what is known then, not when the write began.
//! * **One call of a kind.** An action that is in flight is not asked for again before it ended.
//!   After it ended it is asked for while it is wanted: at the next [`Input::Retry`], or when what
//!   is known has changed.
//!
//! # Rules
//! * **Evidence only.** COMPLETED needs the destination's word (its own, or through a source that
//!   heard RESUMED). FAILED and CANCELLED need the source's word or a source that is *out*: see
//!   below. Two inputs that a clock makes count, and neither decides what became of a VM:
//!   [`Input::FiguresOverdue`] ends the wait for figures after the outcome is known,
//!   [`Input::PatienceOver`] the wait for silent hosts before anything was begun.
//! * **A source is out** when it was never told to begin; or when its agent knows no such side, the
//!   VM is there with its epoch, and no StartOutgoing can succeed any more. Either each one that
//!   was made has been answered, or seen to have had its effect; or the destination's listener was
//!   gone *before* the source was asked: its ticket opens nothing, so a late StartOutgoing fails by
//!   itself. Therefore CANCELLED is final: no call that is still under way can make it COMPLETED. A
//!   server that restarts knows from the disk whether a StartOutgoing was made ([`Start`]).
//! * **A cancel waits for nothing it does not need.** Before StartOutgoing it needs nobody. After
//!   it, the source's word; a source that knows no side while a StartOutgoing may be under way
//!   makes the cancel end the destination, and ask again.
//! * **An absence is dropped when it is stale**: the side was heard of while the question was under
//!   way.
//! * **The point of no return.** Once the source reported RELINQUISHED or COMPLETED, or the
//!   destination COMPLETED, the phase is COMMITTED or COMPLETED, and nothing that ends the
//!   destination is asked for again. The one exception in phase is a destination that is known to
//!   have died after the commit and before it owned the VM: FAILED.
//! * **The last copy stays.** After such an end the frozen memory at the source is all that is left
//!   of the VM. The source's side is then released by the user's wish alone
//!   ([`Input::DeleteRequested`]), or when its process is gone too.
//! * **An owner that died.** A destination that owned the VM and died with it before the source
//!   heard that it runs: COMPLETED, for the handover is over, and LOST. The source's copy is a last
//!   copy too. One that died after the source heard it had run for others to see: its source is
//!   released.
//! * **A host that was deleted** by order is given up with all that it holds. Of a destination's:
//!   before the commit the source is ended, whose word decides; after it, it is as if the
//!   destination had died. Of a source's: the destination is ended, and the VM is LOST, unless it
//!   was handed over. A destination that waits for the commit of such a source may hold all that is
//!   left, or what runs on where nobody can see it: IN_DOUBT until an operator takes it or ends it.
//! * **A host that was fenced** runs nothing of a migration's any more, and its word cannot end the
//!   migration: what it says later is what its journals say. Of a source's: the destination's word
//!   decides. One that is READY is told to commit, whatever the source had journalled: nobody else
//!   has the VM. One that is not is ended, and the VM is LOST. The fence is on disk before a
//!   destination is told, so no later life tells it otherwise. Of a destination's: before the
//!   commit the source is ended, whose word decides; after it, the destination has died. Of both:
//!   LOST, unless the destination had been heard to own the VM.
//! * **Silence** is IN_DOUBT when a commit may have happened (the switchover was seen) and the
//!   source cannot be asked; before that, it is just waiting.
//! * **A verdict is waited for.** While a comparison of digests was asked for and has no result, a
//!   source that is merely silent does not end the migration: only its word, its absence, the death
//!   of its process, or [`Input::FiguresOverdue`] does.
//! * **Terminal phases stay.** After one, only the clean-up of both sides is asked for.
//! * **A release overtakes nothing.** Neither side is released, nor the destination ended, while
//!   the call that makes it is in flight. The source's record is kept while a StartOutgoing may
//!   arrive that could succeed: to a source that has the record it changes nothing.

mod facts;
mod settle;
mod state;
mod view;
mod wanted;
mod words;

#[cfg(test)]
mod tests;

pub use self::{
    state::MigrationProtocol,
    words::{Action, Answer, Cause, Durable, Input, Report, Side, Start},
};
use crate::phase::has_ended;

impl MigrationProtocol {
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

    fn begin(&mut self, action: Action) {
        self.in_flight.set(action, true);
        self.stale.set(action, false);
        self.late.set(action, self.is_ticket_dead());
        // A watch that broke is begun again at once; the driver paces it. One of a side that has
        // ended is over at once, and is a question like any other.
        let follow = match action {
            Action::FollowSource => true,
            Action::FollowDestination => !self.destination.has_ended(),
            _ => false,
        };
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
}
