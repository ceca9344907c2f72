//! The destination's driver: a coordinator thread, a control reader, a thread for each data stream.
//!
//! The coordinator feeds [`protocol::destination`](crate::handover::protocol::destination) and
//! carries out what it asks for; the other threads and the control plane send it [`Note`]s. Only a
//! cancel is fed elsewhere, by the call that asks for it. `parts` is what a side is made from,
//! `link` lets the source's connections in, `work` is what has happened so far, `receive` follows
//! the iterations, `take_over` is everything from the state's arrival to the running VM, `end`
//! gives up or completes.
//!
//! # Memory
//! Once the source's state has come the data streams are closed and their threads have ended. So
//! what is checked is what will run: nothing from the network reaches the memory of a VM that is
//! PREPARED.
//!
//! # In doubt
//! From READY on nothing but knowledge ends the side: COMMIT, the source's agent, the control
//! plane. While none is to be had the VM stays here, stopped, for as long as it takes; the source's
//! agent is asked every [`ASK_EVERY`].

mod end;
mod link;
mod parts;
mod receive;
mod take_over;
mod work;

use std::{
    sync::{Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, v1};

pub(crate) use self::parts::{DestinationDriver, Note};
use self::work::Work;
use crate::{
    handover::protocol::{
        Why,
        destination::{Action, Destination, Input},
    },
    memory::Populate,
};

/// Figures are published this often.
const PUBLISH: Duration = Duration::from_millis(100);
/// While memory is being populated, the coordinator looks at it this often.
const POPULATING: Duration = Duration::from_millis(5);
/// In doubt, the source's agent is asked this often.
const ASK_EVERY: Duration = Duration::from_millis(500);

impl DestinationDriver {
    /// The body of the coordinator thread: runs the side to its end.
    pub(crate) fn run(self) {
        let table = self.machine.memory().table();
        let mut work = Work::new(&table, self.verify);
        self.wake_on_interrupt();
        match Populate::start(&table) {
            Ok(populate) => work.link.populate = Some(populate),
            Err(error) => {
                let failed = work.fail(receive::no_memory(error));
                self.side.feed(failed);
            }
        }
        loop {
            while let Some(action) = self.side.next() {
                if let Some(input) = self.carry_out(action, &mut work) {
                    self.side.feed(input);
                }
            }
            if self.side.machine(|machine| machine.ended().is_some()) {
                break;
            }
            if let Some(input) = self.listen(&mut work) {
                self.side.feed(input);
            }
        }
        work.link.close();
    }

    fn wake_on_interrupt(&self) {
        let sender = Mutex::new(self.sender.clone());
        self.side.on_interrupt(move || {
            // The coordinator may have ended already.
            drop(
                sender
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .send(Note::Interrupted),
            );
        });
    }

    fn carry_out(&self, action: Action, work: &mut Work) -> Option<Input> {
        match action {
            Action::Receive => {
                self.side.enter(v1::TransferPhase::Precopy);
                None
            }
            Action::Check => {
                let checked = self.check(work);
                self.publish(&work.link);
                Some(match checked {
                    Ok(()) => Input::Checked,
                    Err(error) => work.fail(error),
                })
            }
            Action::JournalPrepared => Some(Input::PreparedWritten(self.journal_prepared(work))),
            Action::SayReady => self.say_ready(work),
            Action::AskSource => Some(Input::SourceSays(self.ask())),
            Action::JournalOwned => Some(Input::OwnedWritten(self.journal_owned(work))),
            Action::RunVm => {
                self.run_vm(work);
                None
            }
            Action::SayAbort(why) => {
                self.say_abort(why, work);
                None
            }
            Action::RecordEnd(end) => {
                self.record(end, work);
                None
            }
            Action::JournalAborted => {
                self.journal_aborted();
                Some(Input::AbortedWritten)
            }
            Action::PublishEnd(end) => {
                self.publish_end(end, work);
                None
            }
            // Carried out where it was asked for: this thread may be what is blocked.
            Action::Interrupt => None,
        }
    }

    /// Waits for one note, no longer than there is something to look after.
    fn listen(&self, work: &mut Work) -> Option<Input> {
        let in_doubt = self.side.machine(Destination::in_doubt);
        let patience = if self.side.machine(Destination::needs_ticks) {
            // However much there is to hear: whoever talks cannot keep this side from asking.
            let left = ASK_EVERY.saturating_sub(work.ticked.elapsed());
            if left.is_zero() {
                work.ticked = Instant::now();
                return Some(Input::Tick);
            }
            left
        } else if in_doubt {
            // Linked: whatever happens is a note.
            PUBLISH * 10
        } else {
            match self.populated(work) {
                Ok(Some(input)) => return Some(input),
                Ok(None) if work.link.populate.is_some() => POPULATING,
                Ok(None) => PUBLISH,
                Err(error) => return Some(work.fail(error)),
            }
        };
        match self.notes.recv_timeout(patience) {
            Ok(note) => self.take(note, in_doubt, work),
            Err(mpsc::RecvTimeoutError::Timeout) if in_doubt => None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.publish(&work.link);
                self.check_presence(work)
                    .err()
                    .map(|error| work.fail(error))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Some(work.fail(ApiError::new(
                Reason::Internal,
                "nobody can talk to the coordinator",
            ))),
        }
    }

    fn take(&self, note: Note, in_doubt: bool, work: &mut Work) -> Option<Input> {
        match note {
            Note::Decided(decision) => Some(Input::ControlSays(decision)),
            Note::Interrupted if self.side.machine(Destination::is_cancelled) => {
                Some(Input::Failed(Why::Cancelled))
            }
            // The queue has what there is to do.
            Note::Interrupted => None,
            Note::Control(frame) if in_doubt => self.control_in_doubt(frame, work),
            // Streams close after the last iteration; more peers come too late to matter.
            Note::Connected(_) | Note::Data(_) if in_doubt => None,
            note => match self.receive(note, work) {
                Ok(input) => input,
                Err(error) => Some(work.fail(error)),
            },
        }
    }
}
