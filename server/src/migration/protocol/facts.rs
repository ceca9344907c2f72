//! Takes inputs in as facts. Nothing is decided here but whether an input counts.

use slat_proto::v1::{TransferPhase, VmLocation as Location};

use super::{
    state::MigrationProtocol,
    view::{ActionSet, Contact, View, ended_without},
    words::{Action, Answer, Cause, Input, Report, Side, Start},
};
use crate::phase::has_ended;

impl MigrationProtocol {
    pub(super) fn take(&mut self, input: Input) {
        match input {
            Input::Admitted => self.admitted |= !has_ended(self.phase) && !self.cancel_requested,
            Input::Barred => {
                if !self.admitted && !has_ended(self.phase) {
                    self.fail(Cause::Barred, Location::Source);
                }
            }
            Input::Stored => {
                if let Some(stored) = self.storing.take() {
                    self.stored = stored;
                }
            }
            Input::Heard(side, report) => self.hear(side, report),
            Input::Answered(action, answer) => {
                if self.in_flight.has(action) {
                    self.in_flight.set(action, false);
                    self.answer(action, answer);
                    self.stale.set(action, false);
                    self.late.set(action, false);
                }
            }
            Input::CancelRequested => {
                self.cancel_requested |= !has_ended(self.phase) && !self.committed();
            }
            Input::DeleteRequested => {
                self.delete_requested |= self.keeps_source();
                self.tried.set(Action::ReleaseSource, false);
            }
            Input::DeleteWithdrawn => self.delete_requested = false,
            Input::FiguresOverdue => self.figures_overdue |= self.awaits_figures(),
            Input::PatienceOver => self.impatient |= self.awaits_hosts(),
            Input::HostForgotten(side) => self.forget_host(side),
            Input::HostFenced(side) => self.fence_host(side),
            Input::Retry => {}
        }
    }

    fn forget_host(&mut self, side: Side) {
        let view = match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        };
        view.released = true;
        view.contact = Contact::Silent;
        if has_ended(self.phase) {
            return;
        }
        if side == Side::Source {
            self.copy_gone = Some(true);
        } else {
            self.destination_is_over(Cause::HostForgotten { side, kept: false });
        }
    }

    /// What the agent of a fenced host says later are its journals: it is still heard.
    fn fence_host(&mut self, side: Side) {
        if has_ended(self.phase) {
            return;
        }
        if side == Side::Source {
            self.source_fenced = true;
            self.copy_gone = Some(true);
        } else {
            self.destination_fenced = true;
            self.destination_is_over(Cause::HostFenced { side, kept: false });
        }
    }

    fn destination_is_over(&mut self, cause: Cause) {
        if !self.committed() && !self.is_over(Side::Source) {
            if self.started {
                // The source decides: it may be handing the VM over at this moment.
                self.ending.get_or_insert(cause);
            } else {
                self.fail(cause, Location::Source);
            }
        }
    }

    fn hear(&mut self, side: Side, report: Report) {
        for action in Action::CALLS {
            if action.side() == Some(side) && self.in_flight.has(action) {
                self.stale.set(action, true);
            }
        }
        self.unverified &= !report.verified;
        match side {
            Side::Source => self.hear_source(report),
            Side::Destination => self.hear_destination(report),
        }
    }

    fn hear_source(&mut self, report: Report) {
        if self.start == Start::Never {
            self.start = Start::Once;
        }
        self.started = true;
        self.landed = true;
        self.out_for_good = false;
        match report.phase {
            TransferPhase::Relinquished | TransferPhase::Completed => {
                self.relinquished = true;
                self.switched = true;
            }
            TransferPhase::Switchover => self.switched = true,
            TransferPhase::Precopy => self.precopy = true,
            _ => {}
        }
        self.source.report_once(report);
    }

    fn hear_destination(&mut self, report: Report) {
        match report.phase {
            TransferPhase::Completed => {
                self.destination_completed = true;
                self.switched = true;
            }
            TransferPhase::Ready | TransferPhase::Switchover => self.switched = true,
            _ => {}
        }
        if !ended_without(report.phase) {
            // A listener again: what was asked before it does not count.
            self.out_for_good = false;
            self.late = ActionSet::default();
        }
        self.destination.report(report);
    }

    fn answer(&mut self, action: Action, answer: Answer) {
        match (action, answer) {
            (Action::Describe, Answer::Done) => self.described = true,
            // A VM that is not there may have been handed over by an earlier life's call: its side
            // tells.
            (Action::Describe, Answer::Refused { lost: true }) if self.started => {}
            (Action::Describe, Answer::Refused { lost }) => self.refuse(Side::Source, lost),
            (Action::Describe, Answer::Silent) => self.unanswered(Side::Source),
            (Action::Prepare, Answer::Side(report)) => {
                self.prepared = true;
                self.hear(Side::Destination, report);
            }
            (Action::Prepare, Answer::Refused { .. }) => {
                self.described = false;
                self.refuse(Side::Destination, false);
            }
            (Action::Prepare, Answer::Silent) => {
                self.described = false;
                if self.destination.is_absent() {
                    // That was before this call, which may have made it since.
                    self.destination.contact = Contact::Unasked;
                }
                self.unanswered(Side::Destination);
            }
            (Action::Start, Answer::Refused { lost }) => {
                self.landed = true;
                if !self.stale.has(action) {
                    self.source_absent(action, !lost);
                    self.refuse(Side::Source, lost);
                }
            }
            (Action::AskSourceCopy, Answer::Copy { gone }) => self.copy_gone = Some(gone),
            // A release before the end is nobody's wish; ignoring it keeps the record in step.
            (Action::ReleaseSource, Answer::Done) => self.source.released |= has_ended(self.phase),
            (Action::ReleaseDestination, Answer::Done) => {
                self.destination.released |= has_ended(self.phase);
            }
            // Perhaps it is another one by now, made by a PrepareIncoming that came late: it is
            // looked at again.
            (Action::ReleaseDestination, _) if !self.destination.released => {
                self.destination = View::new(false);
            }
            (Action::ReleaseSource | Action::ReleaseDestination | Action::AskSourceCopy, _)
            | (_, Answer::Nothing | Answer::Done | Answer::Copy { .. } | Answer::Refused { .. }) => {
            }
            (_, Answer::Side(report)) => {
                if let Some(side) = action.side() {
                    self.hear(side, report);
                }
            }
            (_, Answer::Silent) => match action.side() {
                Some(Side::Source) => self.source.contact = Contact::Silent,
                Some(Side::Destination) => self.destination.contact = Contact::Silent,
                None => {}
            },
            (_, Answer::Absent { owner }) => match action.side() {
                Some(Side::Source) => self.source_absent(action, owner),
                Some(Side::Destination) if !self.stale.has(action) => {
                    self.destination.contact = Contact::Absent { owner: false };
                }
                _ => {}
            },
        }
    }

    fn source_absent(&mut self, action: Action, owner: bool) {
        if self.stale.has(action) {
            return;
        }
        self.source.contact = Contact::Absent { owner };
        if owner && self.is_ticket_dead() {
            if self.late.has(action) {
                self.out_for_good = true;
            } else {
                // It was asked too early to count: again.
                self.tried.set(action, false);
            }
        }
    }

    /// A side refuses to take part: the end, once the source is known to have no side.
    fn refuse(&mut self, side: Side, lost: bool) {
        if !self.is_unstarted() {
            return;
        }
        let cause = Cause::Refused(side);
        if lost || self.is_over(Side::Source) {
            self.fail(cause, Location::Lost);
        } else if !self.started || self.is_source_out() {
            self.fail(cause, Location::Source);
        } else {
            self.ending = Some(cause);
        }
    }

    /// Silence before anything was begun. After a restart the host may register later; asking again
    /// is harmless, for a while.
    fn unanswered(&mut self, side: Side) {
        if !self.resumed || self.impatient {
            self.refuse(side, false);
        }
    }

    /// Whether a StartOutgoing is to be made, and made known to the disk first.
    pub(super) fn intend_start(&mut self) {
        if !self.may_start() || self.in_flight.has(Action::Start) || self.tried.has(Action::Start) {
            return;
        }
        match self.start {
            Start::Never => self.start = Start::Once,
            Start::Once if self.started => {
                self.start = Start::Again;
                self.landed = false;
            }
            Start::Once | Start::Again => {}
        }
    }
}
