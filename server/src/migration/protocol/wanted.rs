//! What is to be done now. Whether it is under way already is `step`'s matter.

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase as SidePhase};

use super::{
    state::MigrationProtocol,
    view::{Contact, ended_without},
    words::{Action, Side, Start},
};
use crate::phase::{has_ended, side_ended};

impl MigrationProtocol {
    pub(super) fn wants(&self, action: Action) -> bool {
        match action {
            Action::Persist => false,
            _ if action.side().is_some_and(|side| self.is_forgotten(side)) => false,
            Action::FollowSource => {
                self.started && !self.source.released && !self.source.has_ended()
            }
            Action::FollowDestination => {
                (self.prepared || self.resumed)
                    && !self.destination.released
                    && (!self.destination.has_ended() || self.owner_may_have_died())
            }
            _ if has_ended(self.phase) => self.wants_after_the_end(action),
            _ if self.committed() => self.wants_after_the_commit(action),
            Action::Describe => self.may_prepare() && !self.described && !self.prepared,
            Action::Prepare => self.may_prepare() && self.described && !self.prepared,
            Action::Start => self.may_start() && self.start != Start::Never,
            Action::CancelSource => self.cancel_requested && self.started && !self.source_fenced,
            Action::FailSource => {
                let refused = self.ending.is_some() && self.started;
                let alone = self.source.contact == Contact::Answers
                    && self.stuck
                    && self.destination_is_lost();
                !self.cancel_requested && !self.source_fenced && (refused || alone)
            }
            Action::CancelDestination => {
                // A StartOutgoing that may still arrive is to find nobody; nor is anybody to wait
                // for a source that was deleted or fenced.
                let needed = self.start_may_land() && self.source.contact != Contact::Answers;
                self.is_giving_up()
                    && (needed || self.is_over(Side::Source))
                    && !self.in_flight.has(Action::Prepare)
                    && !self.is_ticket_dead()
                    && !self.destination_says(SidePhase::Ready)
            }
            // The fence is on disk by then: no later life decides otherwise.
            Action::ResolveCommit => {
                self.source_fenced
                    && self.destination_says(SidePhase::Ready)
                    && !self.in_flight.has(Action::Prepare)
            }
            Action::ResolveAbort
            | Action::AskSourceCopy
            | Action::ReleaseSource
            | Action::ReleaseDestination => false,
        }
    }

    fn is_giving_up(&self) -> bool {
        self.cancel_requested || self.ending.is_some()
    }

    /// The destination's side ended, or is not there, before any commit.
    pub(super) fn destination_is_lost(&self) -> bool {
        self.destination.at().is_some_and(ended_without) || self.destination.is_absent()
    }

    /// The destination ran the VM when it was last heard of, and the source, which should end by
    /// that, does not: it keeps its copy when it learns that the VM died there.
    fn owner_may_have_died(&self) -> bool {
        self.stuck
            && self.committed()
            && !has_ended(self.phase)
            && self.destination_says(SidePhase::Completed)
            && !self.owner_died()
            && !self.source.has_ended()
    }

    /// The source has no side yet and can be told to begin.
    fn may_prepare(&self) -> bool {
        let free = match self.source.contact {
            Contact::Answers | Contact::Absent { owner: false } => false,
            Contact::Absent { owner: true } => true,
            // An earlier life may have started it: it is asked first.
            Contact::Unasked | Contact::Silent => !(self.resumed && self.started),
        };
        free && self.phase == Phase::Preparing && !self.is_giving_up()
    }

    pub(super) fn may_start(&self) -> bool {
        self.may_prepare() && self.prepared
    }

    fn wants_after_the_commit(&self, action: Action) -> bool {
        match action {
            Action::AskSourceCopy => self.destination_died() || self.owner_died(),
            Action::ResolveCommit => {
                self.stuck && self.relinquished && self.destination_says(SidePhase::Ready)
            }
            _ => false,
        }
    }

    fn wants_after_the_end(&self, action: Action) -> bool {
        match action {
            Action::CancelDestination | Action::ResolveAbort | Action::ReleaseDestination => {
                action == self.destination_clean_up() && self.may_end_destination()
            }
            Action::CancelSource => self.source_lives_on(),
            // A restarted server does not know whether the copy that it keeps is still there.
            Action::AskSourceCopy => {
                self.phase == Phase::Completed && self.keeps_source() && self.copy_gone.is_none()
            }
            Action::ReleaseSource if self.source.released => false,
            Action::ReleaseSource if self.committed() => {
                self.delete_requested || !self.keeps_source()
            }
            Action::ReleaseSource => {
                !self.in_flight.has(Action::Start)
                    && !self.source_lives_on()
                    && (!self.start_may_land() || self.is_ticket_dead())
            }
            _ => false,
        }
    }

    fn may_end_destination(&self) -> bool {
        !self.destination.released && !self.in_flight.has(Action::Prepare)
    }

    /// The next step towards a destination that is released; Persist when nothing may be done.
    fn destination_clean_up(&self) -> Action {
        let ended = self.destination.has_ended() || self.destination.is_absent();
        if ended || self.phase == Phase::Completed {
            Action::ReleaseDestination
        } else if self.committed() {
            // Two sides that contradict each other: nothing here may end the one that perhaps runs.
            Action::Persist
        } else if self.destination_says(SidePhase::Ready) {
            Action::ResolveAbort
        } else {
            Action::CancelDestination
        }
    }

    /// A source that began late, after an end that did not need it.
    fn source_lives_on(&self) -> bool {
        !self.committed()
            && !self.source.released
            && self.source.at().is_some_and(|phase| !side_ended(phase))
    }
}
