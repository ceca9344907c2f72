//! What both sides share: the published [`v1::Transfer`], and the gate between cancel and the point of no return.
//!
//! # Locking
//! One mutex guards the transfer and the gate; it is held for field updates only, never across I/O. Watchers learn of changes
//! by a version number. The gate has three states: open (may be cancelled), cancelled, committing. [`Side::close_gate`] moves
//! open → committing and [`Side::cancel`] open → cancelled, under the same lock: exactly one of them wins, so a migration that
//! was reported as cancelled never commits and one that commits was never reported as cancelled.
//!
//! A second mutex guards the side's record on disk, across the file's writing and removing, and is never held together with
//! the first: a side is seen to have ended before its thread has written the last record, so the release may come first. Once
//! released, a record is not written again: nobody would remove it.
//!
//! Cancelling also runs the interrupt that the side's thread registered (it shuts the sockets), so that blocked I/O ends.

use std::sync::{Mutex, MutexGuard, PoisonError};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, VmName, now},
    v1::{self, TransferPhase, TransferRole},
};
use slat_record::dir::VmDir;
use tokio::sync::watch;

type Interrupt = Box<dyn Fn() + Send>;

#[derive(Debug)]
enum Gate {
    Open,
    Cancelled(Option<v1::MigrationError>),
    Committing,
}

struct Inner {
    transfer: v1::Transfer,
    gate: Gate,
    interrupt: Option<Interrupt>,
}

/// One side of a migration as seen from outside its threads.
pub(crate) struct Side {
    inner: Mutex<Inner>,
    version: watch::Sender<u64>,
    /// Whether the side was released; guards its record.
    released: Mutex<bool>,
    migration: MigrationName,
    role: TransferRole,
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side")
            .field("migration", &self.migration)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

impl Side {
    pub(crate) fn new(
        migration: &MigrationName,
        vm: &VmName,
        role: TransferRole,
        epoch: u64,
        total_bytes: u64,
    ) -> Self {
        let transfer = v1::Transfer {
            migration: migration.to_string(),
            vm: vm.to_string(),
            role: role.into(),
            phase: TransferPhase::Preparing.into(),
            epoch,
            progress: Some(v1::MigrationProgress {
                total_bytes,
                verification: v1::Verification::None.into(),
                ..Default::default()
            }),
            phase_times: vec![v1::TransferPhaseTime {
                phase: TransferPhase::Preparing.into(),
                time: Some(now()),
            }],
            ..Default::default()
        };
        Self {
            inner: Mutex::new(Inner {
                transfer,
                gate: Gate::Open,
                interrupt: None,
            }),
            version: watch::Sender::new(0),
            released: Mutex::new(false),
            migration: migration.clone(),
            role,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn migration(&self) -> &MigrationName {
        &self.migration
    }

    /// The side now.
    pub(crate) fn transfer(&self) -> v1::Transfer {
        self.lock().transfer.clone()
    }

    pub(crate) fn phase(&self) -> TransferPhase {
        self.lock().transfer.phase()
    }

    /// Changes whenever the side does.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Publishes figures.
    pub(crate) fn update(&self, change: impl FnOnce(&mut v1::MigrationProgress)) {
        change(self.lock().transfer.progress.get_or_insert_default());
        self.version.send_modify(|version| *version += 1);
    }

    /// Enters a phase.
    pub(crate) fn enter(&self, phase: TransferPhase) {
        let mut inner = self.lock();
        inner.transfer.phase = phase.into();
        inner.transfer.phase_times.push(v1::TransferPhaseTime {
            phase: phase.into(),
            time: Some(now()),
        });
        drop(inner);
        self.version.send_modify(|version| *version += 1);
    }

    /// Ends the side: its record first, durable, then the word. Whoever hears of the end finds it on disk.
    pub(crate) fn end(&self, dir: &VmDir, phase: TransferPhase, error: Option<v1::MigrationError>) {
        self.keep_record(dir, &self.as_ended(phase, error.as_ref()));
        self.publish_end(phase, error);
    }

    /// Enters a terminal phase with what was wrong, if anything.
    pub(crate) fn publish_end(&self, phase: TransferPhase, error: Option<v1::MigrationError>) {
        self.lock().transfer.error = error;
        self.enter(phase);
    }

    /// Writes `transfer` as the side's record in `dir`, unless the side was released.
    pub(crate) fn keep_record(&self, dir: &VmDir, transfer: &v1::Transfer) {
        let released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        if *released {
            return;
        }
        if let Err(error) = dir.save_transfer(transfer) {
            tracing::error!(%error, migration = %self.migration, "could not keep the transfer's record");
        }
    }

    /// The side is released: removes its record from `dir`, for good.
    ///
    /// # Errors
    /// When the file cannot be removed; the side then counts as released all the same.
    pub(crate) fn release_record(&self, dir: &VmDir) -> std::io::Result<()> {
        let mut released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        *released = true;
        dir.remove_transfer(&self.migration, self.role)
    }

    /// The side as [`Side::publish_end`] would publish it.
    pub(crate) fn as_ended(
        &self,
        phase: TransferPhase,
        error: Option<&v1::MigrationError>,
    ) -> v1::Transfer {
        let mut transfer = self.transfer();
        transfer.phase = phase.into();
        transfer.error = error.cloned();
        transfer.phase_times.push(v1::TransferPhaseTime {
            phase: phase.into(),
            time: Some(now()),
        });
        transfer
    }

    /// Records a decision.
    pub(crate) fn decide(
        &self,
        iteration: u32,
        action: v1::migration_decision::Action,
        cause: impl Into<String>,
    ) {
        let cause = cause.into();
        tracing::info!(migration = %self.migration, iteration, action = action.as_str_name(), cause, "decided");
        self.update(|progress| {
            progress.decisions.push(v1::MigrationDecision {
                time: Some(now()),
                iteration,
                action: action.into(),
                cause,
            });
        });
    }

    /// Registers what ends blocked I/O of this side's threads; runs it at once when the side is cancelled already.
    pub(crate) fn on_interrupt(&self, interrupt: impl Fn() + Send + 'static) {
        let mut inner = self.lock();
        if matches!(inner.gate, Gate::Cancelled(_)) {
            interrupt();
        }
        inner.interrupt = Some(Box::new(interrupt));
    }

    /// Asks for the end. `error` is set when something failed elsewhere rather than the user cancelled. Idempotent.
    ///
    /// # Errors
    /// PAST_POINT_OF_NO_RETURN when the gate is closed.
    pub(crate) fn cancel(&self, error: Option<v1::MigrationError>) -> Result<(), ApiError> {
        let mut inner = self.lock();
        match inner.gate {
            Gate::Cancelled(_) => return Ok(()),
            Gate::Committing => {
                return Err(ApiError::new(
                    Reason::PastPointOfNoReturn,
                    format!("{} has passed the point of no return", self.migration),
                )
                .with("migration", &self.migration)
                .with("advice", "watch the migration: it completes"));
            }
            Gate::Open => {}
        }
        // A side that has ended has nothing to cancel.
        if !is_terminal(inner.transfer.phase()) {
            inner.gate = Gate::Cancelled(error);
            if let Some(interrupt) = &inner.interrupt {
                interrupt();
            }
        }
        Ok(())
    }

    /// The error that goes with the cancel: what failed elsewhere, or the user's wish. `None` when nobody cancelled.
    pub(crate) fn cancel_cause(&self) -> Option<Result<v1::MigrationError, ApiError>> {
        match &self.lock().gate {
            Gate::Cancelled(Some(error)) => Some(Ok(error.clone())),
            Gate::Cancelled(None) => Some(Err(ApiError::new(
                Reason::CancelledByUser,
                "cancelled on request",
            ))),
            Gate::Open | Gate::Committing => None,
        }
    }

    /// Closes the gate: from here on the side cannot be cancelled. False when a cancel came first.
    #[must_use]
    pub(crate) fn close_gate(&self) -> bool {
        let mut inner = self.lock();
        match inner.gate {
            Gate::Cancelled(_) => false,
            Gate::Open | Gate::Committing => {
                inner.gate = Gate::Committing;
                true
            }
        }
    }
}

/// Whether a side in this phase has ended.
pub(crate) fn is_terminal(phase: TransferPhase) -> bool {
    matches!(
        phase,
        TransferPhase::Completed | TransferPhase::Cancelled | TransferPhase::Failed
    )
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    fn side() -> Side {
        Side::new(
            &MigrationName::parse("m").unwrap(),
            &VmName::parse("v").unwrap(),
            TransferRole::Source,
            1,
            0,
        )
    }

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let side = side();
        side.cancel(None).unwrap();
        assert!(!side.close_gate());
        assert_eq!(
            side.cancel_cause().unwrap().unwrap_err().reason,
            Reason::CancelledByUser
        );

        let side = self::side();
        assert!(side.close_gate());
        assert_eq!(
            side.cancel(None).unwrap_err().reason,
            Reason::PastPointOfNoReturn
        );
        assert!(side.cancel_cause().is_none());
    }

    #[test]
    fn racing_cancels_and_commits_have_one_winner() {
        for _ in 0..200 {
            let side = Arc::new(side());
            let other = Arc::clone(&side);
            let cancel = std::thread::spawn(move || other.cancel(None).is_ok());
            let committed = side.close_gate();
            assert_ne!(committed, cancel.join().unwrap());
        }
    }

    #[test]
    fn a_released_record_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let dir = VmDir::new(dir.path());
        let side = side();
        side.keep_record(&dir, &side.transfer());
        assert_eq!(dir.transfers().unwrap().len(), 1);
        side.release_record(&dir).unwrap();
        side.keep_record(&dir, &side.transfer());
        assert!(dir.transfers().unwrap().is_empty());
    }

    #[test]
    fn an_interrupt_runs_whether_it_comes_before_or_after_the_cancel() {
        let count = Arc::new(AtomicU32::new(0));
        let side = side();
        let counter = Arc::clone(&count);
        let bump = move || {
            counter.fetch_add(1, Ordering::SeqCst);
        };
        side.on_interrupt(bump.clone());
        side.cancel(None).unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 1);
        side.on_interrupt(bump);
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}
