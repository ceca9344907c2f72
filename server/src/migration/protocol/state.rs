//! What is known of one migration, and what follows from it without deciding anything.

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase, VmLocation as Location};

use super::{
    view::{ActionSet, Contact, View, ended_without},
    words::{Action, Cause, Durable, Report, Side, Start},
};
use crate::phase::has_ended;

/// One migration's state. See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationProtocol {
    pub(super) phase: Phase,
    pub(super) location: Location,
    pub(super) cause: Option<Cause>,
    pub(super) cancel_requested: bool,
    pub(super) unverified: bool,
    pub(super) switched: bool,
    pub(super) start: Start,

    /// Nothing is in the way any more.
    pub(super) admitted: bool,
    /// Taken up again after a restart of the server: an earlier life may have asked for anything
    /// that its phase allows.
    pub(super) resumed: bool,
    /// Silent hosts were waited for long enough.
    pub(super) impatient: bool,
    pub(super) described: bool,
    /// The destination was asked to prepare, in this life or perhaps in an earlier one.
    pub(super) prepare_asked: bool,
    pub(super) prepared: bool,
    /// StartOutgoing was made in this life or perhaps in an earlier one.
    pub(super) started: bool,
    /// The only StartOutgoing was answered, or seen to have had its effect.
    pub(super) landed: bool,
    pub(super) precopy: bool,
    pub(super) relinquished: bool,
    pub(super) destination_completed: bool,
    pub(super) figures_overdue: bool,
    /// After the destination's death: whether the source's frozen memory is gone too.
    pub(super) copy_gone: Option<bool>,
    pub(super) delete_requested: bool,
    /// A refusal that ends the migration once the source is known to be out.
    pub(super) ending: Option<Cause>,
    /// The destination was asked to end for the sake of a cancel.
    pub(super) destination_cancelled: bool,
    /// The source was asked after the destination's listener was gone, and has no side.
    pub(super) out_for_good: bool,
    /// The host of the source, and of the destination, was fenced: what ran there is gone for good.
    pub(super) source_fenced: bool,
    pub(super) destination_fenced: bool,
    /// Nothing changed since the last retry: help a handover that hangs.
    pub(super) stuck: bool,
    pub(super) source: View,
    pub(super) destination: View,

    pub(super) stored: Durable,
    pub(super) storing: Option<Durable>,
    pub(super) in_flight: ActionSet,
    /// In flight, and the side was heard of since: an absence is stale.
    pub(super) stale: ActionSet,
    /// In flight, and asked for when the destination's listener was gone.
    pub(super) late: ActionSet,
    /// Asked for since the last retry or change.
    pub(super) tried: ActionSet,
}

impl MigrationProtocol {
    /// A migration from its stored state: a new one, or one that a restarted server takes up.
    #[must_use]
    pub fn new(durable: &Durable) -> Self {
        let resumed = durable.phase != Phase::Pending;
        let precopy = durable.phase == Phase::PrecopyActive;
        let switched =
            durable.switched || matches!(durable.phase, Phase::Switchover | Phase::InDoubt);
        // A stored commit is the source's word, or the destination's that it runs: either way past
        // the point.
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
            impatient: false,
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
            copy_gone: (durable.source_released || durable.source_fenced).then_some(true),
            delete_requested: false,
            ending: taken_up_ending(durable),
            destination_cancelled: false,
            out_for_good: false,
            source_fenced: durable.source_fenced,
            destination_fenced: durable.destination_fenced,
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
            source_fenced: self.source_fenced,
            destination_fenced: self.destination_fenced,
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

    /// Taken up again before the source was told to begin, it waits for hosts that do not answer.
    #[must_use]
    pub fn awaits_hosts(&self) -> bool {
        self.resumed && !self.impatient && !self.started && self.phase == Phase::Preparing
    }

    /// Whether a side did not answer when it was last asked.
    #[must_use]
    pub fn is_silent(&self, side: Side) -> bool {
        let view = match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        };
        view.contact == Contact::Silent
    }

    /// Before the end: whether that side's host was deleted by order.
    #[must_use]
    pub fn is_forgotten(&self, side: Side) -> bool {
        let view = match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        };
        view.released && !has_ended(self.phase)
    }

    /// Before the end: whether nothing of that side can act any more, whatever its agent says. Its
    /// host was deleted or fenced.
    pub(super) fn is_over(&self, side: Side) -> bool {
        let fenced = match side {
            Side::Source => self.source_fenced,
            Side::Destination => self.destination_fenced,
        };
        self.is_forgotten(side) || (fenced && !has_ended(self.phase))
    }

    /// Why a side that [is over](Self::is_over) is so.
    pub(super) fn over_cause(&self, side: Side, kept: bool) -> Cause {
        let fenced = match side {
            Side::Source => self.source_fenced,
            Side::Destination => self.destination_fenced,
        };
        if fenced {
            Cause::HostFenced { side, kept }
        } else {
            Cause::HostForgotten { side, kept }
        }
    }

    /// Whether the source was told to begin, perhaps without having heard it.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// The outcome is known; only the source's last figures are waited for.
    #[must_use]
    pub fn awaits_figures(&self) -> bool {
        self.phase == Phase::Committed && self.destination_completed && !self.owner_died()
    }

    /// A comparison of digests was asked for and nobody has told its result.
    #[must_use]
    pub fn awaits_verdict(&self) -> bool {
        self.unverified
    }

    /// The frozen memory at the source is the last copy of the VM: nothing but the user ends it.
    /// Once an operator has taken the VM back there, it is no copy, and the side ends like any
    /// other.
    #[must_use]
    pub fn keeps_source(&self) -> bool {
        let last = match self.phase {
            Phase::Failed => self.location != Location::Lost,
            // What died at the destination had begun as this copy.
            Phase::Completed => {
                self.location == Location::Lost
                    && self.copy_gone != Some(true)
                    && !self.source.said(TransferPhase::Completed)
            }
            _ => false,
        };
        last && self.committed()
            && !self.source.released
            && !self.source.said(TransferPhase::Cancelled)
    }

    /// The destination owned the VM, and its process died with it, or its host was given up or
    /// fenced with it.
    pub(super) fn owner_died(&self) -> bool {
        let ran = self.destination_completed || self.source.said(TransferPhase::Completed);
        let died = |report: Report| report.phase == TransferPhase::Completed && report.vm_lost;
        self.destination.last.is_some_and(died) || (ran && self.is_over(Side::Destination))
    }

    /// What changes what is wanted.
    pub(super) fn known(&self) -> impl PartialEq + use<> {
        let side = |view: &View| (view.contact, view.at(), view.released);
        (
            self.durable(),
            side(&self.source),
            side(&self.destination),
            self.admitted,
            self.delete_requested,
        )
    }

    /// StartOutgoing was made and may arrive at a source that has no record of it.
    pub(super) fn start_may_land(&self) -> bool {
        self.started && !(self.start == Start::Once && self.landed)
    }

    /// No data connection can be opened with what a StartOutgoing of before carries.
    pub(super) fn is_ticket_dead(&self) -> bool {
        let ended = self
            .destination
            .last
            .is_some_and(|report| ended_without(report.phase));
        let gone = self.destination.is_absent() || self.destination.released;
        !self.prepare_asked || ended || gone || self.destination_fenced
    }

    /// The VM is at the source, which has no side and will have none that works. See the module.
    pub(super) fn is_source_out(&self) -> bool {
        self.source.contact == Contact::Absent { owner: true }
            && (!self.start_may_land() || self.out_for_good)
    }

    /// Nothing says that the source ever had a side.
    pub(super) fn is_unstarted(&self) -> bool {
        !has_ended(self.phase)
            && !self.committed()
            && !self.precopy
            && !self.switched
            && self.source.last.is_none()
    }

    pub(super) fn destination_says(&self, phase: TransferPhase) -> bool {
        self.destination.at() == Some(phase)
    }
}

/// What ends a migration that is taken up again although its source decides.
fn taken_up_ending(durable: &Durable) -> Option<Cause> {
    let (side, kept) = (Side::Destination, false);
    match durable.phase {
        phase if has_ended(phase) => None,
        _ if durable.destination_fenced => Some(Cause::HostFenced { side, kept }),
        _ if durable.destination_released => Some(Cause::HostForgotten { side, kept }),
        _ => None,
    }
}
