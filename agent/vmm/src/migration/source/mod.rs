//! The source's driver: carries out what the protocol asks for, one action after the other, on a
//! coordinator thread, with one sender thread for each stream.
//!
//! What comes after what is decided by [`protocol::source`](crate::handover::protocol::source);
//! this is how it is done. `parts` is what a side is made from, `link` holds the connections that
//! `connect` opens, `work` is what the actions have led to, `measure` sees what a switchover will
//! cost, `flight` is one iteration on its way, `precopy` runs the iterations, `switchover` is the
//! blackout, `end` undoes or completes, `adopt` takes a VM back that was given away.
//!
//! # Undoing
//! Any failure before RELINQUISHED ends with the vCPUs resumed, dirty logging off, the destination
//! told if it can be, and the end recorded. After it nothing is undone: when the answer to COMMIT
//! is lost the side stays RELINQUISHED, with the VM stopped here, until the server releases it.
//!
//! # Cancelling
//! The coordinator may be blocked when a cancel comes: on a connection, between two attempts, in a
//! digest. All of that is broken off by one [`Breaker`], which the side's interrupt reaches.

mod adopt;
mod connect;
mod end;
mod flight;
mod link;
mod measure;
mod parts;
mod precopy;
mod switchover;
mod work;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::v1::TransferPhase;

pub(crate) use self::{adopt::take_back, parts::SourceDriver};
use self::{switchover::Outcome, work::Work};
use super::breaker::Breaker;
use crate::{
    handover::protocol::{
        Settled, Written,
        source::{Action, End, Input},
    },
    machine::RelinquishError,
};

/// A journal that cannot be settled is tried again this often.
const SETTLE_EVERY: Duration = Duration::from_millis(500);

/// What a source waits for whose append failed, for `Transfer.waiting_for`.
const UNSETTLED: &str =
    "its journal to be read and written again (RELINQUISHED; the VM stands still meanwhile)";

impl SourceDriver {
    /// The body of the coordinator thread: runs the side to a terminal phase, or to RELINQUISHED.
    pub(crate) fn run(self) {
        let breaker = Arc::new(Breaker::default());
        let mut work = Work::new(Instant::now(), Arc::clone(&breaker));
        self.side.on_interrupt(move || breaker.break_off());
        let connected = self.connect(&mut work).map(|()| {
            work.transfer = Instant::now();
            Input::Connected
        });
        self.side.feed(work.input(connected));
        while let Some(action) = self.side.next() {
            if let Some(input) = self.carry_out(action, &mut work) {
                self.side.feed(input);
            }
        }
        if let Some(link) = work.link {
            link.close();
        }
        if self.side.phase() == TransferPhase::Relinquished {
            // No answer to COMMIT: what is known is kept all the same.
            self.side
                .keep_record(self.machine.dir(), &self.side.transfer());
        }
        self.side.leave();
    }

    fn carry_out(&self, action: Action, work: &mut Work) -> Option<Input> {
        match action {
            Action::Precopy => {
                let decided = self.precopy(work);
                Some(work.input(decided.map(|()| Input::SwitchoverDecided)))
            }
            Action::SwitchOver => {
                let blackout = self.switch_over(work);
                Some(work.input(blackout.map(|outcome| match outcome {
                    Outcome::StateSent => Input::StateSent,
                    Outcome::Overran => Input::Overran,
                })))
            }
            Action::GoBack => {
                let back = self.go_back(work);
                Some(work.input(back.map(|()| Input::WentBack)))
            }
            Action::AwaitReady => {
                let ready = self.await_ready(work);
                Some(work.input(ready.map(|()| Input::ReadyHeard)))
            }
            Action::JournalRelinquished => Some(Input::Journalled(self.relinquish(work))),
            Action::SettleJournal => Some(Input::JournalSettled(self.settle())),
            Action::PublishRelinquished => {
                self.side.enter(TransferPhase::Relinquished);
                if let Some(blackout) = &mut work.blackout {
                    blackout.committed();
                }
                None
            }
            Action::Commit => Some(match self.commit(work) {
                Ok(resumed) => {
                    work.resumed = Some(resumed);
                    Input::ResumedHeard
                }
                Err(error) => {
                    tracing::warn!(%error, migration = %self.side.migration(),
                        "no answer to COMMIT: the VM stays stopped here; the destination asks the journal");
                    Input::LinkLost
                }
            }),
            Action::ResumeVm => {
                self.resume_vm();
                None
            }
            Action::StopLogging => {
                self.stop_logging();
                None
            }
            Action::SayAbort(why) => {
                self.say_abort(why, work);
                None
            }
            Action::RecordEnd(End::HandedOver) => {
                self.complete(work);
                None
            }
            Action::RecordEnd(End::Kept(why)) => {
                self.record_kept(why, work);
                None
            }
            // Carried out where they are asked for: this thread may be what is blocked, or gone.
            Action::Interrupt | Action::JournalAdopted | Action::RecordEnd(End::TakenBack) => None,
        }
    }

    fn relinquish(&self, work: &mut Work) -> Written {
        match self.machine.relinquish(self.side.migration()) {
            Ok(()) => Written::Durable,
            Err(RelinquishError::Refused(error)) => {
                work.note(error);
                Written::Refused
            }
            Err(RelinquishError::Unknown(error)) => {
                tracing::error!(%error, migration = %self.side.migration(),
                    "RELINQUISHED may not be durable: the VM stays stopped until the journal can be read again");
                work.note(error);
                Written::Unknown
            }
        }
    }

    /// Until the journal can be read and written again: neither COMMIT nor a resumed VM is safe
    /// before.
    fn settle(&self) -> Settled {
        loop {
            match self.machine.settle_relinquished(self.side.migration()) {
                Ok(present) => {
                    self.side.wait_for(None);
                    return if present {
                        Settled::Present
                    } else {
                        Settled::Absent
                    };
                }
                Err(error) => {
                    self.side.wait_for(Some((UNSETTLED, &error)));
                    tracing::error!(%error, migration = %self.side.migration(), "the journal is not settled yet");
                    std::thread::sleep(SETTLE_EVERY);
                }
            }
        }
    }
}
