//! The destination's driver: a coordinator thread, a control reader, a thread for each data stream.
//!
//! The coordinator alone feeds [`protocol::destination`](crate::handover::protocol::destination) and
//! carries out what it asks for; the other threads send it [`Note`]s. `link` lets the source's
//! connections in, `receive` follows the iterations, `take_over` is everything from the state's
//! arrival to the running VM, `end` gives up or completes.
//!
//! # In doubt
//! From READY on nothing but knowledge ends the side: COMMIT, the source's agent, the control plane.
//! While none is to be had the VM stays here, stopped, for as long as it takes; the source's agent is
//! asked every [`ASK_EVERY`].

mod end;
mod link;
mod receive;
mod take_over;

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, transport::Address, v1};

use self::link::Link;
use super::{
    listener::{Listener, Peer},
    populate::Populate,
    receiver::Event,
    wire::Header,
};
use crate::{
    handover::{
        protocol::{
            Why,
            destination::{Action, Decision, Destination as Protocol, End, Input},
        },
        side::Side,
    },
    machine::{Machine, Switchover},
};

/// Figures are published this often.
const PUBLISH: Duration = Duration::from_millis(100);
/// While memory is being populated, the coordinator looks at it this often.
const POPULATING: Duration = Duration::from_millis(5);
/// In doubt, the source's agent is asked this often.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// What the coordinator hears.
#[derive(Debug)]
pub(crate) enum Note {
    Connected(Peer),
    Control(Result<(Header, Vec<u8>), ApiError>),
    Data(Event),
    Decided(Decision),
    /// Look at the queue: somebody else fed the machine.
    Interrupted,
}

/// What the destination's side needs.
pub(crate) struct Destination {
    pub(crate) machine: Arc<Machine>,
    pub(crate) side: Arc<Side<Protocol>>,
    pub(crate) streams: u32,
    pub(crate) verify: bool,
    pub(crate) epoch: u64,
    pub(crate) versions: v1::ChosenVersions,
    /// The source's agent, asked when in doubt.
    pub(crate) source_agent: Option<Address>,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) listener: Listener,
    pub(crate) notes: mpsc::Receiver<Note>,
    pub(crate) sender: mpsc::Sender<Note>,
}

/// What has happened so far.
struct Work {
    started: Instant,
    link: Link,
    /// The source's state as it came.
    state: Vec<u8>,
    /// How the VM left the source.
    left: Switchover,
    /// The VM is owned here and could not be run.
    trouble: Option<ApiError>,
    /// The first thing that failed here.
    fault: Option<ApiError>,
}

impl Destination {
    /// The body of the coordinator thread: runs the side to its end.
    pub(crate) fn run(self) {
        let table = self.machine.memory().table();
        let mut work = Work {
            started: Instant::now(),
            link: Link::new(&table, self.verify),
            state: Vec::new(),
            left: Switchover {
                run: false,
                never_ran: false,
            },
            trouble: None,
            fault: None,
        };
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
        let in_doubt = self.side.machine(Protocol::in_doubt);
        let patience = if self.side.machine(Protocol::needs_ticks) {
            ASK_EVERY
        } else if in_doubt {
            // Linked: whatever comes is a note.
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
            Err(mpsc::RecvTimeoutError::Timeout) if in_doubt => Some(Input::Tick),
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
            Note::Interrupted if self.side.machine(Protocol::is_cancelled) => {
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

impl Work {
    /// Keeps what failed first, and is the input that says so.
    fn fail(&mut self, error: ApiError) -> Input {
        let told = end::was_told(&error);
        self.fault.get_or_insert(error);
        if told {
            Input::AbortHeard
        } else {
            Input::Failed(Why::Fault)
        }
    }
}

/// How the VM came to be where it is.
fn is_owned(end: End) -> bool {
    end == End::Owned
}
