//! The end of the source's side: handed over and verified, or undone.

use std::{sync::mpsc, thread, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::Verify,
    v1::{self, TransferPhase, migration_decision::Action},
};

use super::{super::wire::encode_abort, parts::SourceDriver, work::Work};
use crate::{
    handover::{payload::Resumed, protocol::Why},
    memory::MemoryDigest,
};

/// While digests are compared, the side tells so often that it is at it.
const BEAT: Duration = Duration::from_secs(1);

impl SourceDriver {
    /// The destination has the VM: what is left to learn, then the record.
    pub(super) fn complete(&self, work: &mut Work) {
        let resumed = work.resumed.take().unwrap_or(Resumed {
            as_it_was: false,
            digests: Vec::new(),
        });
        self.publish_downtime(work, &resumed);
        let digest = work
            .blackout
            .as_mut()
            .and_then(|blackout| blackout.digest.take());
        self.verify(digest, &resumed);
        self.side
            .end(self.machine.dir(), TransferPhase::Completed, None);
    }

    /// Compares the frozen memory's digest with what the destination had when it resumed.
    fn verify(&self, before: Option<MemoryDigest>, resumed: &Resumed) {
        let ours = match self.params.verify {
            Verify::None => return,
            Verify::BeforeCommit => before,
            Verify::AfterCommit => {
                self.side
                    .update(|progress| progress.set_verification(v1::Verification::Pending));
                Some(self.digest_telling())
            }
        };
        let ours: Vec<(u32, u128)> = ours
            .iter()
            .flat_map(|digest| &digest.slots)
            .map(|slot| (slot.slot, slot.digest))
            .collect();
        let verdict = if ours == resumed.digests {
            v1::Verification::Match
        } else {
            tracing::error!(migration = %self.side.migration(), "memory digests differ after the commit");
            v1::Verification::Mismatch
        };
        self.side
            .update(|progress| progress.set_verification(verdict));
    }

    /// The digest of the frozen memory. It may take long, so the side says that it goes on: who
    /// waits for the verdict gives a silent source up.
    fn digest_telling(&self) -> MemoryDigest {
        thread::scope(|scope| {
            let (done, wait) = mpsc::channel::<()>();
            let side = &self.side;
            let beat = move || {
                while wait.recv_timeout(BEAT) == Err(mpsc::RecvTimeoutError::Timeout) {
                    side.update(|_| ());
                }
            };
            // Without the thread the comparison is as good, only quiet.
            if let Err(error) = thread::Builder::new()
                .name("digest-beat".to_owned())
                .spawn_scoped(scope, beat)
            {
                tracing::warn!(%error, migration = %self.side.migration(), "the comparison is quiet");
            }
            let digest = self.digest();
            drop(done);
            digest
        })
    }

    /// The guest first: it may be stopped.
    pub(super) fn resume_vm(&self) {
        if let Err(error) = self.machine.end_outgoing(self.side.migration()) {
            tracing::error!(%error, migration = %self.side.migration(), "the VM could not be resumed");
        }
    }

    /// Nobody here reads this cursor again.
    pub(super) fn stop_logging(&self) {
        let detached = self
            .cursor()
            .and_then(|cursor| self.machine.dirty().detach(&cursor));
        match detached {
            Ok(()) => {}
            Err(error) if error.reason == Reason::NoSuchCursor => {}
            Err(error) if self.side.machine(|machine| machine.relinquished()) => {
                tracing::debug!(%error, "dirty logging of a relinquished VM");
            }
            Err(error) => {
                tracing::error!(%error, migration = %self.side.migration(), "dirty logging could not be turned off");
            }
        }
    }

    /// Where the side was when it ended.
    fn during(&self) -> v1::MigrationPhase {
        match self.side.phase() {
            TransferPhase::Preparing => v1::MigrationPhase::Preparing,
            TransferPhase::Precopy => v1::MigrationPhase::PrecopyActive,
            _ => v1::MigrationPhase::Switchover,
        }
    }

    pub(super) fn say_abort(&self, why: Why, work: &mut Work) {
        let (_, recorded) = self.side.ending(why, work.fault.as_ref(), self.during());
        let told = ApiError::new(
            Reason::parse(&recorded.reason).unwrap_or(Reason::Internal),
            recorded.message,
        );
        if let Some(link) = &mut work.link {
            link.say_abort(&encode_abort(&told));
        }
    }

    /// Before the point of no return: the VM goes on here, and everything is as before. Unless it
    /// was ended here meanwhile.
    pub(super) fn record_kept(&self, why: Why, work: &Work) {
        if self.machine.is_over() {
            self.record_stopped();
            return;
        }
        let (phase, recorded) = self.side.ending(why, work.fault.as_ref(), self.during());
        if why == Why::Cancelled {
            self.side
                .decide(self.iteration(), Action::Cancel, "the user cancelled");
        }
        tracing::warn!(migration = %self.side.migration(), reason = recorded.reason, error = recorded.message,
            "migration ended before the commit; the VM stays here");
        self.side.update(|progress| progress.remaining_bytes = 0);
        self.side.end(self.machine.dir(), phase, Some(recorded));
    }

    /// The process was told to end its VM (SIGTERM), and did.
    fn record_stopped(&self) {
        let error = ApiError::new(
            Reason::VmStoppedDuringMigration,
            "the VM was ended at its source, whose process was told to stop (SIGTERM)",
        )
        .with("migration", self.side.migration())
        .with("vm_location", "LOST");
        tracing::warn!(migration = %self.side.migration(), "the VM was ended in mid-migration");
        let error = error.to_migration_error(self.during(), "source");
        self.side.lose_vm();
        self.side
            .end(self.machine.dir(), TransferPhase::Failed, Some(error));
    }
}
