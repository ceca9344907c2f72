//! Brings phase and location in line with what is known.

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase as SidePhase, VmLocation as Location};

use super::{
    state::MigrationProtocol,
    view::{Contact, ended_without},
    words::{Action, Cause, Side},
};
use crate::phase::has_ended;

impl MigrationProtocol {
    pub(super) fn settle(&mut self) {
        if has_ended(self.phase) {
            return;
        }
        if self.committed() {
            self.settle_committed();
        } else {
            self.settle_uncommitted();
        }
    }

    fn end(&mut self, phase: Phase, location: Location, cause: Option<Cause>) {
        self.phase = phase;
        self.location = location;
        self.cause = cause;
        // Who was never asked has nothing to release.
        self.source.released |= !self.started;
        self.destination.released |= !self.prepare_asked;
    }

    pub(super) fn fail(&mut self, cause: Cause, location: Location) {
        self.end(Phase::Failed, location, Some(cause));
    }

    fn cancelled(&mut self, cause: Option<Cause>) {
        self.end(Phase::Cancelled, Location::Source, cause);
    }

    fn settle_committed(&mut self) {
        self.phase = Phase::Committed;
        self.location = Location::Destination;
        self.cause = None;
        if self.owner_died() {
            self.settle_without_owner();
            return;
        }
        let source_completed = self.source.said(SidePhase::Completed);
        let completed = if self.destination_completed {
            let source_over = match self.source.contact {
                _ if self.source_fenced => true,
                // One that owned the VM and had no side was asked before a late start reached it.
                Contact::Absent { owner } => !owner,
                Contact::Silent => !self.unverified,
                Contact::Answers => {
                    self.source.has_ended() || self.source.last.is_some_and(|report| report.gone)
                }
                Contact::Unasked => false,
            };
            source_over || self.figures_overdue
        } else {
            source_completed && (self.destination.has_ended() || self.destination.is_gone())
        };
        if completed {
            self.end(Phase::Completed, Location::Destination, None);
        } else if self.destination_died() {
            let gone = match self.source.contact {
                Contact::Absent { owner: false } => Some(true),
                _ => self.copy_gone,
            };
            let cause = |kept| match self.is_over(Side::Destination) {
                true => self.over_cause(Side::Destination, kept),
                false => Cause::DestinationDied,
            };
            match gone {
                Some(true) => self.fail(cause(false), Location::Lost),
                Some(false) => self.fail(cause(true), Location::Unknown),
                // Neither side can run it; whether a copy is left is being asked.
                None => self.location = Location::Unknown,
            }
        }
    }

    /// The handover is over, and the VM with it. While its source is not known to have heard that
    /// the VM ran, the frozen copy may be all that is left.
    fn settle_without_owner(&mut self) {
        let gone = match self.source.contact {
            _ if self.source.said(SidePhase::Completed) => Some(true),
            // A source that owned the VM and had no side was asked before it began: nothing of what
            // it has since is known.
            Contact::Absent { owner: false } => Some(true),
            _ => self.copy_gone,
        };
        self.location = Location::Lost;
        if let Some(gone) = gone {
            self.copy_gone = Some(gone);
            let kept = !gone;
            let cause = if self.is_over(Side::Destination) {
                self.over_cause(Side::Destination, kept)
            } else {
                Cause::OwnerDied { kept }
            };
            self.end(Phase::Completed, Location::Lost, Some(cause));
        }
    }

    /// The destination ended after the commit and never owned the VM; or its host was given up or
    /// fenced, and with it what is not known of it.
    pub(super) fn destination_died(&self) -> bool {
        self.committed()
            && !self.source.said(SidePhase::Completed)
            && !self.destination_completed
            && (self.destination.at().is_some_and(ended_without) || self.is_over(Side::Destination))
    }

    fn settle_uncommitted(&mut self) {
        match self.source.contact {
            _ if self.is_over(Side::Source) => self.settle_without_source_host(),
            Contact::Answers => self.settle_by_source(),
            Contact::Absent { owner: false } => self.settle_without_vm(),
            _ if self.cancel_requested && !self.started => self.cancelled(None),
            Contact::Absent { owner: true } => self.settle_without_source(),
            Contact::Silent if self.switched => self.doubt(),
            // Taken up again in doubt, it stays that until somebody answers.
            Contact::Unasked if self.phase == Phase::InDoubt => self.cause = Some(Cause::Doubt),
            Contact::Silent | Contact::Unasked => self.go_on(),
        }
    }

    fn settle_by_source(&mut self) {
        let Some(report) = self.source.last else {
            return;
        };
        match report.phase {
            SidePhase::Failed if report.vm_lost => self.fail(Cause::SourceDied, Location::Lost),
            // It failed because the cancel took its destination away.
            SidePhase::Failed if self.cancel_requested && self.destination_cancelled => {
                self.cancelled(None);
            }
            SidePhase::Failed => self.fail(Cause::SourceFailed, Location::Source),
            SidePhase::Cancelled => {
                let ours = self.cancel_requested;
                self.cancelled((!ours).then_some(Cause::CancelledAtSource));
            }
            _ => self.go_on(),
        }
    }

    /// The VM is at the source with its epoch, and was there without a side when asked.
    fn settle_without_source(&mut self) {
        if self.is_source_out() {
            if self.cancel_requested {
                self.cancelled(None);
            } else if let Some(cause) = self.ending {
                self.fail(cause, Location::Source);
            } else if self.is_unstarted() {
                self.go_on();
            } else {
                self.fail(Cause::SourceForgot, Location::Source);
            }
            return;
        }
        if !self.is_unstarted() && self.ending.is_none() {
            self.ending = Some(Cause::SourceForgot);
        }
        self.go_on();
    }

    /// The source's host was deleted or fenced, with the VM unless that was handed over: the
    /// destination's word ends it. One that holds all of the VM and waits for a commit is told to
    /// take it when the source was fenced, for nothing of that runs on. Of a deleted one nobody
    /// knows that: an operator decides.
    fn settle_without_source_host(&mut self) {
        let cause = self.over_cause(Side::Source, false);
        let nobody =
            !self.prepare_asked || self.is_over(Side::Destination) || self.destination_is_lost();
        if nobody && !self.in_flight.has(Action::Prepare) {
            self.fail(cause, Location::Lost);
            return;
        }
        self.ending = Some(cause);
        if self.switched {
            self.doubt();
            self.cause = Some(cause);
        } else {
            self.go_on();
        }
    }

    /// The VM is not at the source, and there is no side.
    fn settle_without_vm(&mut self) {
        if self.is_unstarted() || self.is_ticket_dead() {
            self.fail(Cause::SourceGone, Location::Lost);
        } else if self.switched {
            self.doubt();
        } else {
            self.go_on();
        }
    }

    /// The source lets its VM run again after a switchover that it began. What was switched stays
    /// so: when the source falls silent it may have begun another.
    fn source_went_back(&self) -> bool {
        self.source.at() == Some(SidePhase::Precopy)
            && !self.destination_says(SidePhase::Ready)
            && !self.destination_says(SidePhase::Completed)
    }

    fn doubt(&mut self) {
        self.phase = Phase::InDoubt;
        self.location = if self.destination_says(SidePhase::Ready) && !self.source_fenced {
            Location::PausedBoth
        } else {
            Location::Unknown
        };
        self.cause = Some(Cause::Doubt);
    }

    /// The phase of a migration that goes on. Its flags only grow; the one way back is that of a
    /// source whose switchover would have taken too long, and which says so.
    fn go_on(&mut self) {
        self.location = Location::Source;
        self.cause = None;
        self.phase = if self.cancel_requested {
            Phase::Cancelling
        } else if self.switched && !self.source_went_back() {
            Phase::Switchover
        } else if self.precopy {
            Phase::PrecopyActive
        } else if self.admitted {
            Phase::Preparing
        } else {
            Phase::Pending
        };
    }
}
