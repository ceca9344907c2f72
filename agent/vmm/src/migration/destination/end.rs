//! The end of the destination's side: the VM is here, or this process goes away.

use slat_proto::{
    ApiError, Reason,
    v1::{self, TransferPhase},
};

use super::{
    super::wire::{Kind, encode_abort},
    parts::DestinationDriver,
    work::Work,
};
use crate::handover::protocol::{Why, destination::End};

impl DestinationDriver {
    fn during(&self) -> v1::MigrationPhase {
        match self.side.phase() {
            TransferPhase::Preparing => v1::MigrationPhase::Preparing,
            TransferPhase::Precopy => v1::MigrationPhase::PrecopyActive,
            _ => v1::MigrationPhase::Switchover,
        }
    }

    /// Phase and error of the end.
    fn ending(&self, end: End, work: &Work) -> (TransferPhase, Option<v1::MigrationError>) {
        match end {
            End::Owned => {
                let trouble = work.trouble.as_ref().map(|error| {
                    error.to_migration_error(v1::MigrationPhase::Committed, "destination")
                });
                (TransferPhase::Completed, trouble)
            }
            End::GivenUp(why) => {
                let fault = work.fault.clone().or_else(|| self.source_kept());
                let (phase, error) = self.side.ending(why, fault.as_ref(), self.during());
                (phase, Some(error))
            }
        }
    }

    /// After READY, what ended the side was the source's journal.
    fn source_kept(&self) -> Option<ApiError> {
        (self.side.phase() == TransferPhase::Ready).then(|| {
            ApiError::new(
                Reason::ConnectionLost,
                "the source kept the VM: it never relinquished it",
            )
        })
    }

    /// The source learns why, if it still listens.
    pub(super) fn say_abort(&self, why: Why, work: &mut Work) {
        let (_, error) = self.ending(End::GivenUp(why), work);
        let error = error.unwrap_or_default();
        tracing::warn!(migration = %self.side.migration(), reason = error.reason, error = error.message,
            "incoming migration ended");
        let reason = Reason::parse(&error.reason).unwrap_or(Reason::Internal);
        let told = error.metadata.iter().fold(
            ApiError::new(reason, error.message),
            |told, (key, value)| told.with(key, value),
        );
        drop(work.link.say(Kind::Abort, 0, &encode_abort(&told)));
    }

    /// The record before the word: whoever hears of the end finds it on disk.
    pub(super) fn record(&self, end: End, work: &mut Work) {
        self.publish(&work.link);
        let (phase, error) = self.ending(end, work);
        self.side.keep_record(
            self.machine.dir(),
            &self.side.as_ended(phase, error.as_ref()),
        );
    }

    /// This process, and the memory it received, go.
    pub(super) fn journal_aborted(&self) {
        if let Err(error) = self.machine.abort_incoming(self.side.migration()) {
            tracing::error!(%error, migration = %self.side.migration(), "ABORTED could not be journalled");
        }
    }

    pub(super) fn publish_end(&self, end: End, work: &Work) {
        let (phase, error) = self.ending(end, work);
        if end == End::Owned {
            tracing::info!(migration = %self.side.migration(), "the VM is owned here");
        }
        self.side.publish_end(phase, error);
    }
}
