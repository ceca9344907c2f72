//! What is known of one side, and small sets of actions.

use slat_proto::v1::TransferPhase;

use super::words::{Action, Report};
use crate::phase::side_ended;

/// What came back when a side was last asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Contact {
    Unasked,
    Silent,
    Absent { owner: bool },
    Answers,
}

/// One side as the server knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct View {
    pub(super) contact: Contact,
    /// The last report; an older truth when `contact` is not `Answers`.
    pub(super) last: Option<Report>,
    /// Released, or never there. Before the migration's end: its host was deleted by order.
    pub(super) released: bool,
}

pub(super) const fn ended_without(phase: TransferPhase) -> bool {
    matches!(phase, TransferPhase::Cancelled | TransferPhase::Failed)
}

impl View {
    pub(super) const fn new(released: bool) -> Self {
        Self {
            contact: Contact::Unasked,
            last: None,
            released,
        }
    }

    pub(super) fn report(&mut self, report: Report) {
        self.contact = Contact::Answers;
        self.last = Some(report);
    }

    /// Takes a report of a side that there is once. It may be the answer to a call, and older than
    /// what was heard meanwhile: a side that ended stays so, and so does a process that is gone.
    pub(super) fn report_once(&mut self, report: Report) {
        let gone = self.last.is_some_and(|known| known.gone) || report.gone;
        let newest = match self.last {
            Some(known) if self.has_ended() && !side_ended(report.phase) => known,
            _ => report,
        };
        self.report(Report { gone, ..newest });
    }

    /// The phase it is in now, as it says or because that was its final one.
    pub(super) fn at(&self) -> Option<TransferPhase> {
        match self.contact {
            Contact::Answers => self.last.map(|report| report.phase),
            Contact::Silent if self.has_ended() => self.last.map(|report| report.phase),
            _ => None,
        }
    }

    /// Whether the last report said this.
    pub(super) fn said(&self, phase: TransferPhase) -> bool {
        self.last.is_some_and(|report| report.phase == phase)
    }

    /// Whether the last report was its final one. A side that ended stays as it is until it is
    /// released.
    pub(super) fn has_ended(&self) -> bool {
        self.last.is_some_and(|report| side_ended(report.phase))
    }

    pub(super) fn is_absent(&self) -> bool {
        matches!(self.contact, Contact::Absent { .. })
    }

    pub(super) fn is_gone(&self) -> bool {
        matches!(self.contact, Contact::Silent | Contact::Absent { .. })
    }
}

/// A set of actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct ActionSet(u16);

impl ActionSet {
    const fn bit(action: Action) -> u16 {
        1 << action as u16
    }

    pub(super) const fn has(self, action: Action) -> bool {
        self.0 & Self::bit(action) != 0
    }

    pub(super) fn set(&mut self, action: Action, member: bool) {
        if member {
            self.0 |= Self::bit(action);
        } else {
            self.0 &= !Self::bit(action);
        }
    }
}
