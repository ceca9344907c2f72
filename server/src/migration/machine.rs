//! One migration as a plain state machine: no I/O, no clock, no tasks.
//!
//! [`Machine::step`] takes one [`Input`] and answers with the [`Action`]s to carry out, in order. It remembers what each
//! half last said and derives everything else from that, so an input may come twice, late or out of order.
//!
//! # Rules
//! * **Evidence only.** COMPLETED needs the destination's word (its own, or through a source that heard RESUMED);
//!   FAILED and CANCELLED need the source's word, or a source that never began. [`Input::FiguresOverdue`] is the one input
//!   a clock makes: it ends the wait for the source's figures after the outcome is known, never decides an outcome.
//! * **The point of no return.** Once the source reported RELINQUISHED or COMPLETED, or the destination COMPLETED, the
//!   phase is COMMITTED or COMPLETED, and nothing that ends the destination is asked for again. The one exception in phase
//!   is a destination that is known to have died after the commit and before it owned the VM: FAILED.
//! * **The last copy stays.** After such an end the frozen memory at the source is all that is left of the VM. The source's
//!   half is then released by the user's wish alone ([`Input::DeleteRequested`]), or when its process is gone as well.
//! * **Silence** is IN_DOUBT when a commit may have happened (the switchover was seen) and the source cannot be asked;
//!   before that, it is just waiting.
//! * **A verdict is waited for.** While a comparison of digests was asked for and has no result, a source that is merely
//!   silent does not end the migration: only its word, its absence, or [`Input::FiguresOverdue`] does.
//! * **Terminal phases stay.** After one, only the clean-up of both halves is asked for.
//!
//! # Actions
//! An action is asked for when it becomes wanted, and again at each [`Input::Retry`] while it still is. All are idempotent.
//! [`Action::Persist`] comes first: what follows it may rely on the state being stored.

use slat_proto::{
    ApiError, Reason,
    v1::{MigrationError, MigrationPhase as Phase, TransferPhase as Half, VmLocation as Location},
};

/// What one half said of itself.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) phase: Half,
    /// The source's process died before the commit.
    pub(crate) vm_lost: bool,
    /// It knows the result of the comparison of digests.
    pub(crate) verified: bool,
    pub(crate) error: Option<MigrationError>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// Carry it out.
    Begin,
    /// The destination listens.
    PrepareAnswered,
    /// The destination refused, or could not be asked.
    PrepareFailed {
        error: ApiError,
        /// Who refused: the source's agent is asked for the VM and its slots first.
        side: &'static str,
        unreachable: bool,
    },
    /// The source refused to begin and has no half.
    StartFailed(ApiError),
    /// The source's half.
    SourceReport(Report),
    /// The destination's half.
    DestinationReport(Report),
    /// The source's agent, or the VM's process behind it, does not answer.
    SourceUnreachable,
    /// The same at the destination.
    DestinationUnreachable,
    /// The source's agent knows no such half. `owner`: the VM is there, with this migration's epoch, and may run.
    SourceAbsent { owner: bool },
    /// The destination's agent knows no such half.
    DestinationAbsent,
    /// The user wants it ended.
    CancelRequested,
    /// The outcome is known and the source's last figures did not come.
    FiguresOverdue,
    /// Whether the process that holds the frozen memory at the source is known to be gone. Silence is no such knowledge.
    SourceCopy { gone: bool },
    /// The user deletes the VM whose last copy is kept at the source.
    DeleteRequested,
    /// Ask again for what is still wanted.
    Retry,
    /// The source's half is released.
    SourceReleased,
    /// The destination's half is released.
    DestinationReleased,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Store the record; nothing after it before it is on disk.
    Persist,
    /// PrepareIncoming at the destination.
    Prepare,
    /// StartOutgoing at the source.
    Start,
    /// CancelTransfer at the source, by the user's wish.
    CancelSource,
    /// CancelTransfer at the source because the destination ended.
    FailSource,
    /// CancelTransfer at the destination.
    CancelDestination,
    /// ResolveTransfer(COMMIT) at the destination.
    ResolveCommit,
    /// ResolveTransfer(ABORT) at the destination.
    ResolveAbort,
    /// Ask the source's agent whether the frozen memory is still there.
    AskSourceCopy,
    /// ReleaseTransfer at the source.
    ReleaseSource,
    /// ReleaseTransfer at the destination.
    ReleaseDestination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contact {
    Unasked,
    Silent,
    Absent { owner: bool },
    Answers,
}

#[derive(Clone, Debug)]
struct View {
    contact: Contact,
    /// The last report; only an older truth when `contact` is not `Answers`.
    last: Option<Report>,
    released: bool,
}

impl View {
    fn new(released: bool) -> Self {
        Self {
            contact: Contact::Unasked,
            last: None,
            released,
        }
    }

    fn report(&mut self, report: Report) {
        self.contact = Contact::Answers;
        self.last = Some(report);
    }

    /// The phase it reports now.
    fn at(&self) -> Option<Half> {
        match self.contact {
            Contact::Answers => self.last.as_ref().map(|report| report.phase),
            _ => None,
        }
    }

    fn ever(&self, phase: Half) -> bool {
        self.last
            .as_ref()
            .is_some_and(|report| report.phase == phase)
    }

    fn error(&self) -> Option<MigrationError> {
        self.last.as_ref().and_then(|report| report.error.clone())
    }

    fn gone(&self) -> bool {
        matches!(self.contact, Contact::Silent | Contact::Absent { .. })
    }
}

/// What is stored of a machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Durable {
    pub(crate) phase: Phase,
    pub(crate) location: Location,
    pub(crate) cancel_requested: bool,
    pub(crate) error: Option<MigrationError>,
    /// The switchover was seen: a commit may have happened.
    pub(crate) switched: bool,
    /// The commit is known to have happened.
    pub(crate) committed: bool,
    /// A comparison of digests was asked for and has no result yet.
    pub(crate) unverified: bool,
    pub(crate) source_released: bool,
    pub(crate) destination_released: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    phase: Phase,
    location: Location,
    cancel_requested: bool,
    error: Option<MigrationError>,
    /// Some half may exist.
    began: bool,
    /// Taken up again after a server's restart: an earlier life may have started the source.
    resumed: bool,
    prepared: bool,
    start_issued: bool,
    precopy: bool,
    switched: bool,
    relinquished: bool,
    destination_completed: bool,
    figures_overdue: bool,
    unverified: bool,
    /// After the destination's death: whether the source's frozen memory is gone too.
    copy_gone: Option<bool>,
    delete_requested: bool,
    /// Nothing changed since the last retry: help a handover that hangs.
    stuck: bool,
    source: View,
    destination: View,
    asked: Vec<Action>,
}

/// Whether a migration's phase is final.
pub(crate) fn is_terminal(phase: Phase) -> bool {
    matches!(phase, Phase::Completed | Phase::Cancelled | Phase::Failed)
}

/// Whether the source's host says that the VM's process is gone: an agent keeps such a VM as LOST.
fn says_lost(error: &ApiError) -> bool {
    error.reason == Reason::VmProcessDied
        || error
            .metadata
            .get("state")
            .is_some_and(|state| state == "LOST")
}

fn ended(phase: Half) -> bool {
    matches!(phase, Half::Completed | Half::Cancelled | Half::Failed)
}

fn ended_without(phase: Half) -> bool {
    matches!(phase, Half::Cancelled | Half::Failed)
}

impl Machine {
    /// A migration from its stored state; a new one is PENDING.
    pub(crate) fn new(durable: &Durable) -> Self {
        let resumed = durable.phase != Phase::Pending;
        Self {
            phase: durable.phase,
            location: durable.location,
            cancel_requested: durable.cancel_requested,
            error: durable.error.clone(),
            began: resumed,
            resumed,
            prepared: false,
            start_issued: resumed,
            precopy: durable.phase == Phase::PrecopyActive,
            switched: durable.switched
                || matches!(durable.phase, Phase::Switchover | Phase::InDoubt),
            // A stored commit is the source's word, or the destination's that it runs: either way past the point.
            relinquished: durable.committed || durable.phase == Phase::Committed,
            destination_completed: durable.phase == Phase::Completed,
            figures_overdue: false,
            unverified: durable.unverified,
            copy_gone: None,
            delete_requested: false,
            stuck: false,
            source: View::new(durable.source_released),
            destination: View::new(durable.destination_released),
            asked: Vec::new(),
        }
    }

    /// What must be stored.
    pub(crate) fn durable(&self) -> Durable {
        Durable {
            phase: self.phase,
            location: self.location,
            cancel_requested: self.cancel_requested,
            error: self.error.clone(),
            switched: self.switched,
            committed: self.committed(),
            unverified: self.unverified,
            source_released: self.source.released,
            destination_released: self.destination.released,
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Past the point of no return.
    pub(crate) fn committed(&self) -> bool {
        self.relinquished || self.destination_completed
    }

    /// Terminal and both halves released: nothing is left to do.
    pub(crate) fn finished(&self) -> bool {
        is_terminal(self.phase) && self.source.released && self.destination.released
    }

    /// The outcome is known; only the source's last figures are waited for.
    pub(crate) fn awaits_figures(&self) -> bool {
        self.phase == Phase::Committed && self.destination_completed
    }

    /// A comparison of digests was asked for and nobody has told its result.
    pub(crate) fn awaits_verdict(&self) -> bool {
        self.unverified
    }

    /// The frozen memory at the source is the last copy of the VM: nothing but the user ends it.
    pub(crate) fn keeps_source(&self) -> bool {
        self.phase == Phase::Failed
            && self.committed()
            && self.location != Location::Lost
            && !self.source.released
    }

    pub(crate) fn source_released(&self) -> bool {
        self.source.released
    }

    pub(crate) fn destination_released(&self) -> bool {
        self.destination.released
    }

    /// Whether the source's half can exist, so that it is worth asking.
    pub(crate) fn source_exists(&self) -> bool {
        self.start_issued && !self.source.released
    }

    /// Whether the destination's half can exist.
    pub(crate) fn destination_exists(&self) -> bool {
        self.began && (self.prepared || self.resumed) && !self.destination.released
    }

    /// Takes one input; answers with what to do, in order.
    pub(crate) fn step(&mut self, input: Input) -> Vec<Action> {
        let before = self.durable();
        let was = (self.source.at(), self.destination.at());
        let retry = input == Input::Retry;
        self.take(input);
        self.settle();
        if retry {
            self.asked.clear();
            self.stuck = true;
        } else if before != self.durable() || was != (self.source.at(), self.destination.at()) {
            self.stuck = false;
        }
        let wanted = self.wanted();
        self.asked.retain(|action| wanted.contains(action));
        let mut actions = Vec::new();
        if before != self.durable() {
            actions.push(Action::Persist);
        }
        for action in wanted {
            if !self.asked.contains(&action) {
                self.asked.push(action);
                actions.push(action);
            }
        }
        if actions.contains(&Action::Start) {
            self.start_issued = true;
        }
        actions
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Begin => self.began |= !is_terminal(self.phase) && !self.cancel_requested,
            Input::PrepareAnswered => self.prepared = true,
            Input::PrepareFailed {
                error,
                side,
                unreachable,
            } => {
                let lost = side == "source" && says_lost(&error);
                // After a restart the destination may register later; asking again is harmless.
                let wait = unreachable && self.resumed && !lost;
                let asked = !self.resumed || self.source.contact == Contact::Absent { owner: true };
                if !wait && asked && self.is_unstarted() {
                    self.end_unstarted(error, side, lost);
                }
            }
            Input::StartFailed(error) => {
                if self.is_unstarted() {
                    let lost = says_lost(&error);
                    self.source.contact = Contact::Absent { owner: !lost };
                    self.end_unstarted(error, "source", lost);
                }
            }
            Input::SourceReport(report) => {
                self.start_issued = true;
                self.unverified &= !report.verified;
                match report.phase {
                    Half::Relinquished | Half::Completed => {
                        self.relinquished = true;
                        self.switched = true;
                    }
                    Half::Switchover => self.switched = true,
                    Half::Precopy => self.precopy = true,
                    _ => {}
                }
                self.source.report(report);
            }
            Input::DestinationReport(report) => {
                self.unverified &= !report.verified;
                match report.phase {
                    Half::Completed => {
                        self.destination_completed = true;
                        self.switched = true;
                    }
                    Half::Ready | Half::Switchover => self.switched = true,
                    _ => {}
                }
                self.destination.report(report);
            }
            Input::SourceUnreachable => self.source.contact = Contact::Silent,
            Input::DestinationUnreachable => self.destination.contact = Contact::Silent,
            Input::SourceAbsent { owner } => self.source.contact = Contact::Absent { owner },
            Input::DestinationAbsent => {
                self.destination.contact = Contact::Absent { owner: false };
            }
            Input::CancelRequested => {
                if !is_terminal(self.phase) && !self.committed() {
                    self.cancel_requested = true;
                }
            }
            Input::FiguresOverdue => self.figures_overdue = true,
            Input::SourceCopy { gone } => self.copy_gone = Some(gone),
            Input::DeleteRequested => {
                self.delete_requested |= self.keeps_source();
                self.asked.retain(|action| *action != Action::ReleaseSource);
            }
            Input::Retry => {}
            // A release before the end is a caller's mistake; ignoring it keeps the record in step.
            Input::SourceReleased => self.source.released |= is_terminal(self.phase),
            Input::DestinationReleased => self.destination.released |= is_terminal(self.phase),
        }
    }

    /// The source's half reported at least once.
    fn source_began(&self) -> bool {
        self.source.last.is_some()
    }

    /// Nothing says that the source ever had a half.
    fn is_unstarted(&self) -> bool {
        !is_terminal(self.phase)
            && !self.committed()
            && !self.precopy
            && !self.switched
            && !self.source_began()
    }

    fn end(&mut self, phase: Phase, location: Location, error: Option<MigrationError>) {
        self.phase = phase;
        self.location = location;
        self.error = error;
        if !self.began {
            self.source.released = true;
            self.destination.released = true;
        }
    }

    /// Ends a migration whose source has no half: the VM never stopped being the source's, which may have lost it.
    fn end_unstarted(&mut self, mut error: ApiError, side: &str, lost: bool) {
        let (location, word) = if lost {
            error.reason = Reason::VmProcessDied;
            (Location::Lost, "LOST")
        } else {
            (Location::Source, "SOURCE")
        };
        let error = error
            .with("vm_location", word)
            .to_migration_error(self.phase, side);
        self.end(Phase::Failed, location, Some(error));
    }

    fn made_error(&self, reason: Reason, side: &str, text: &str, advice: &str) -> MigrationError {
        ApiError::new(reason, text)
            .with("advice", advice)
            .to_migration_error(self.phase, side)
    }

    /// Brings phase and location in line with what is known.
    fn settle(&mut self) {
        if is_terminal(self.phase) {
            return;
        }
        if self.committed() {
            self.settle_committed();
        } else {
            self.settle_uncommitted();
        }
    }

    fn settle_committed(&mut self) {
        self.phase = Phase::Committed;
        self.location = Location::Destination;
        self.error = None;
        let source_completed = self.source.ever(Half::Completed);
        let destination_ended = self.destination.at().is_some_and(ended);
        let completed = if self.destination_completed {
            let source_over = match self.source.contact {
                Contact::Absent { .. } => true,
                Contact::Silent => !self.unverified,
                Contact::Answers => self.source.at().is_some_and(ended),
                Contact::Unasked => false,
            };
            source_over || self.figures_overdue
        } else {
            source_completed && (destination_ended || self.destination.gone())
        };
        if completed {
            self.end(Phase::Completed, Location::Destination, None);
        } else if self.destination_died() {
            let gone = match self.source.contact {
                Contact::Absent { .. } => Some(true),
                _ => self.copy_gone,
            };
            match gone {
                Some(gone) => self.end_without_destination(gone),
                // Neither half can run it; whether a copy is left is being asked.
                None => self.location = Location::Unknown,
            }
        }
    }

    /// The destination ended after the commit and never owned the VM.
    fn destination_died(&self) -> bool {
        self.committed()
            && !self.source.ever(Half::Completed)
            && !self.destination_completed
            && self.destination.at().is_some_and(ended_without)
    }

    /// The destination cannot know what its end means; the commit makes it the loss of what it had received.
    fn end_without_destination(&mut self, copy_gone: bool) {
        let (location, word, text, advice) = if copy_gone {
            (
                Location::Lost,
                "LOST",
                "the destination's process died after the source had handed the VM over, and the source's process is gone",
                "delete the VM and create it anew",
            )
        } else {
            (
                Location::Unknown,
                "UNKNOWN",
                "the destination's process died after the source had handed the VM over; the VM runs nowhere, its frozen \
                 memory is kept at the source host",
                "the frozen copy at the source host (state RELINQUISHED) cannot run and is kept until you delete it: \
                 `slat delete vm NAME`",
            )
        };
        let mut error = self.made_error(Reason::VmProcessDied, "destination", text, advice);
        if let Some(cause) = self.destination.error() {
            error.metadata.insert("cause".to_owned(), cause.message);
        }
        error
            .metadata
            .insert("vm_location".to_owned(), word.to_owned());
        self.end(Phase::Failed, location, Some(error));
    }

    fn settle_uncommitted(&mut self) {
        match self.source.contact {
            Contact::Answers => self.settle_by_source(),
            Contact::Absent { owner } => self.settle_without_source(owner),
            Contact::Silent if self.switched => self.doubt(),
            Contact::Silent => self.phase = self.running_phase(),
            Contact::Unasked if self.cancel_requested && !self.start_issued => {
                self.end(Phase::Cancelled, Location::Source, None);
            }
            Contact::Unasked if self.resumed => {
                if self.phase != Phase::InDoubt {
                    self.phase = self.running_phase();
                }
            }
            Contact::Unasked => self.phase = self.running_phase(),
        }
    }

    fn settle_by_source(&mut self) {
        let Some(report) = self.source.last.clone() else {
            return;
        };
        match report.phase {
            Half::Failed => {
                let (location, reason, text, advice) = if report.vm_lost {
                    (
                        Location::Lost,
                        Reason::VmProcessDied,
                        "the VM's process died at the source before the commit; its memory is lost",
                        "create the VM again",
                    )
                } else {
                    (
                        Location::Source,
                        Reason::Internal,
                        "the source failed without saying why",
                        "the VM runs on at the source; migrate again",
                    )
                };
                let error = report
                    .error
                    .unwrap_or_else(|| self.made_error(reason, "source", text, advice));
                self.end(Phase::Failed, location, Some(error));
            }
            Half::Cancelled if self.cancel_requested => {
                self.end(Phase::Cancelled, Location::Source, None);
            }
            Half::Cancelled => {
                // Somebody cancelled at the agent's door: ended all the same, and said so.
                let error = self.source.error();
                self.end(Phase::Cancelled, Location::Source, error);
            }
            _ => {
                self.phase = self.running_phase();
                self.location = Location::Source;
                self.error = None;
            }
        }
    }

    fn settle_without_source(&mut self, owner: bool) {
        let early = self.is_unstarted();
        if owner {
            // The VM is at the source with its epoch and no half: nothing can be handed over any more.
            if self.cancel_requested {
                self.end(Phase::Cancelled, Location::Source, None);
            } else if early {
                self.phase = self.running_phase();
            } else {
                let error = self.made_error(
                    Reason::PeerRestarted,
                    "source",
                    "the source keeps no record of the migration; the VM is still there",
                    "migrate again",
                );
                self.end(Phase::Failed, Location::Source, Some(error));
            }
            return;
        }
        let destination_ended = self.destination.at().is_some_and(ended_without)
            || matches!(self.destination.contact, Contact::Absent { .. });
        if early || destination_ended {
            let error = self.made_error(
                Reason::VmProcessDied,
                "source",
                "the VM is gone from the source and was not handed over",
                "create the VM again",
            );
            self.end(Phase::Failed, Location::Lost, Some(error));
        } else if self.switched {
            self.doubt();
        } else {
            self.phase = self.running_phase();
        }
    }

    fn doubt(&mut self) {
        self.phase = Phase::InDoubt;
        self.location = if self.destination.at() == Some(Half::Ready) {
            Location::PausedBoth
        } else {
            Location::Unknown
        };
        self.error = Some(
            ApiError::new(
                Reason::InDoubt,
                "the source cannot be asked whether it handed the VM over",
            )
            .with(
                "advice",
                "bring the source host's agent back: its journal decides, nothing else does",
            )
            .to_migration_error(Phase::Switchover, "server"),
        );
    }

    /// The phase of a migration that goes on. Its flags only grow, so it never goes back.
    fn running_phase(&self) -> Phase {
        if self.cancel_requested {
            Phase::Cancelling
        } else if self.switched {
            Phase::Switchover
        } else if self.precopy {
            Phase::PrecopyActive
        } else if self.began {
            Phase::Preparing
        } else {
            Phase::Pending
        }
    }

    fn wanted(&self) -> Vec<Action> {
        if is_terminal(self.phase) {
            return self.wanted_clean_up();
        }
        let mut wanted = Vec::new();
        if self.committed() {
            if self.destination_died() {
                wanted.push(Action::AskSourceCopy);
            }
            if self.stuck && self.relinquished && self.destination.at() == Some(Half::Ready) {
                wanted.push(Action::ResolveCommit);
            }
            return wanted;
        }
        if self.cancel_requested {
            wanted.push(Action::CancelSource);
            return wanted;
        }
        match self.source.contact {
            Contact::Answers => {
                let destination_ended = self.destination.at().is_some_and(ended_without)
                    || matches!(self.destination.contact, Contact::Absent { .. });
                if self.stuck && destination_ended {
                    wanted.push(Action::FailSource);
                }
            }
            // An earlier life may have started it: the source is asked first.
            Contact::Unasked | Contact::Silent if self.resumed => {}
            Contact::Unasked | Contact::Silent | Contact::Absent { owner: true } => {
                if self.phase == Phase::Preparing {
                    wanted.push(if self.prepared {
                        Action::Start
                    } else {
                        Action::Prepare
                    });
                }
            }
            Contact::Absent { owner: false } => {}
        }
        wanted
    }

    fn wanted_clean_up(&self) -> Vec<Action> {
        let mut wanted = Vec::new();
        if !self.destination.released {
            let ended = self.destination.at().is_some_and(ended)
                || matches!(self.destination.contact, Contact::Absent { .. });
            if ended || self.phase == Phase::Completed {
                wanted.push(Action::ReleaseDestination);
            } else if self.committed() {
                // Two halves that contradict each other: nothing here may end the one that perhaps runs.
            } else if self.destination.at() == Some(Half::Ready) {
                wanted.push(Action::ResolveAbort);
            } else {
                wanted.push(Action::CancelDestination);
            }
        }
        if !self.source.released && (self.delete_requested || !self.keeps_source()) {
            wanted.push(Action::ReleaseSource);
        }
        wanted
    }
}
