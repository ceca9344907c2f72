//! One side of a migration: its protocol machine, its queue of actions, and what it tells of
//! itself.
//!
//! # Locking
//! One mutex guards the machine, its queue and the published transfer. It is held for one step or
//! one field update, never across I/O. Whoever has news feeds it: the coordinator what its work led
//! to, an RPC a cancel. The machine answers under the lock, so a cancel and the point of no return
//! exclude each other. Its actions are queued in order, and the coordinator alone carries them out;
//! the one exception is the interrupt, which must reach a coordinator that is blocked.
//!
//! A second mutex guards the side's record on disk while the file is written or removed. It is
//! never held together with the first. A RELINQUISHED side may be released before its thread has
//! written the last record. Once released, a record is not written again: nobody would remove it.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, Timeline, VmName},
    v1::{self, TransferPhase},
};
use slat_record::dir::VmDir;
use tokio::sync::watch;

use super::side_protocol::SideProtocol;
use crate::handover::protocol::Why;

/// Bytes of what a side says that it waits for.
const LONGEST_WAIT: usize = 500;

type Interrupt = Box<dyn Fn() + Send>;

struct Inner<R: SideProtocol> {
    machine: R,
    queue: VecDeque<R::Action>,
    transfer: v1::Transfer,
    /// What failed elsewhere, when a cancel came with it.
    elsewhere: Option<v1::MigrationError>,
    interrupt: Option<Interrupt>,
}

/// One side of a migration as seen from outside its threads.
pub(crate) struct Side<R: SideProtocol> {
    inner: Mutex<Inner<R>>,
    version: watch::Sender<u64>,
    /// Whether the side was released; guards its record.
    released: Mutex<bool>,
    /// Whether its coordinator has done all that it ever will.
    left: AtomicBool,
    migration: MigrationName,
    /// Its phases never run backwards, whoever sets the host's clock.
    clock: Timeline,
}

impl<R: SideProtocol> std::fmt::Debug for Side<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side")
            .field("migration", &self.migration)
            .field("role", &R::ROLE)
            .finish_non_exhaustive()
    }
}

impl<R: SideProtocol> Side<R> {
    pub(crate) fn new(
        migration: &MigrationName,
        (vm, uid): (&VmName, String),
        epoch: u64,
        total_bytes: u64,
    ) -> Self {
        let clock = Timeline::begin(None);
        let transfer = v1::Transfer {
            migration: migration.to_string(),
            vm: vm.to_string(),
            vm_uid: uid,
            role: R::ROLE.into(),
            phase: TransferPhase::Preparing.into(),
            epoch,
            progress: Some(v1::MigrationProgress {
                total_bytes,
                verification: v1::Verification::None.into(),
                ..Default::default()
            }),
            phase_times: vec![v1::TransferPhaseTime {
                phase: TransferPhase::Preparing.into(),
                time: Some(clock.now()),
            }],
            ..Default::default()
        };
        Self {
            inner: Mutex::new(Inner {
                machine: R::default(),
                queue: VecDeque::new(),
                transfer,
                elsewhere: None,
                interrupt: None,
            }),
            version: watch::Sender::new(0),
            released: Mutex::new(false),
            left: AtomicBool::new(false),
            migration: migration.clone(),
            clock,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<R>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn migration(&self) -> &MigrationName {
        &self.migration
    }

    /// Feeds the machine. Its actions are queued for the coordinator.
    pub(crate) fn feed(&self, input: R::Input) {
        self.lock().feed(input);
    }

    /// The next action to carry out.
    pub(crate) fn next(&self) -> Option<R::Action> {
        self.lock().queue.pop_front()
    }

    /// The coordinator has left: from now on, whoever feeds the machine carries out what it
    /// answers.
    pub(crate) fn leave(&self) {
        self.left.store(true, Ordering::Release);
    }

    /// Whether the coordinator has left.
    pub(crate) fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    /// Looks at the machine.
    pub(crate) fn machine<T>(&self, look: impl FnOnce(&R) -> T) -> T {
        look(&self.lock().machine)
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

    /// Tells what the side cannot go on without, and why it does not get it; `None` when nothing is
    /// in its way any more.
    pub(crate) fn wait_for(&self, what: Option<(&str, &ApiError)>) {
        let mut words = what.map_or_else(String::new, |(what, error)| format!("{what}: {error}"));
        let mut end = LONGEST_WAIT.min(words.len());
        while !words.is_char_boundary(end) {
            end -= 1;
        }
        words.truncate(end);
        let mut inner = self.lock();
        if inner.transfer.waiting_for == words {
            return;
        }
        inner.transfer.waiting_for = words;
        drop(inner);
        self.version.send_modify(|version| *version += 1);
    }

    /// Enters a phase.
    pub(crate) fn enter(&self, phase: TransferPhase) {
        let mut inner = self.lock();
        inner.transfer.phase = phase.into();
        inner.transfer.phase_times.push(v1::TransferPhaseTime {
            phase: phase.into(),
            time: Some(self.clock.now()),
        });
        drop(inner);
        self.version.send_modify(|version| *version += 1);
    }

    /// Ends the side: its record first, durable, then the word. Whoever hears of the end finds it
    /// on disk.
    pub(crate) fn end(&self, dir: &VmDir, phase: TransferPhase, error: Option<v1::MigrationError>) {
        self.keep_record(dir, &self.as_ended(phase, error.as_ref()));
        self.publish_end(phase, error);
    }

    /// Nothing is left of the VM here. Said with the end.
    pub(crate) fn lose_vm(&self) {
        self.lock().transfer.vm_lost = true;
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
        dir.remove_transfer(&self.migration, R::ROLE)
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
            time: Some(self.clock.now()),
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
            progress.push_decision(v1::MigrationDecision {
                time: Some(self.clock.now()),
                iteration,
                action: action.into(),
                cause,
            });
        });
    }

    /// Registers what ends blocked work of this side's threads; runs it at once when the side is
    /// cancelled already.
    pub(crate) fn on_interrupt(&self, interrupt: impl Fn() + Send + 'static) {
        let mut inner = self.lock();
        if inner.machine.is_cancelled() {
            interrupt();
        }
        inner.interrupt = Some(Box::new(interrupt));
    }

    /// Asks for the end. `error` is set when something failed elsewhere rather than the user
    /// cancelled. Idempotent, and without effect on a side that has ended before the handover.
    ///
    /// # Errors
    /// PAST_POINT_OF_NO_RETURN when it is too late.
    pub(crate) fn cancel(&self, error: Option<v1::MigrationError>) -> Result<(), ApiError> {
        let mut inner = self.lock();
        if !inner.machine.may_cancel() {
            return Err(ApiError::new(
                Reason::PastPointOfNoReturn,
                format!("{} has passed the point of no return", self.migration),
            )
            .with("migration", &self.migration)
            .with("advice", "watch the migration: it completes"));
        }
        let why = if error.is_some() {
            Why::Elsewhere
        } else {
            Why::Cancelled
        };
        if inner.feed(R::cancel(why)) {
            inner.elsewhere = error;
        }
        Ok(())
    }

    /// How the record of an end reads: its phase, and what was wrong. `fault` is what failed here.
    pub(crate) fn ending(
        &self,
        why: Why,
        fault: Option<&ApiError>,
        during: v1::MigrationPhase,
    ) -> (TransferPhase, v1::MigrationError) {
        let side = R::NAME;
        let elsewhere = self.lock().elsewhere.clone();
        let unnamed = || ApiError::new(Reason::Internal, "the side ended without saying why");
        match (why, elsewhere) {
            (Why::Cancelled, _) => (
                TransferPhase::Cancelled,
                ApiError::new(Reason::CancelledByUser, "cancelled on request")
                    .to_migration_error(during, side),
            ),
            (Why::Elsewhere, Some(error)) => (TransferPhase::Failed, error),
            (Why::Elsewhere | Why::Fault, _) => {
                let error = fault.cloned().unwrap_or_else(unnamed);
                // The other side may have been cancelled and said so.
                let phase = if error.reason == Reason::CancelledByUser {
                    TransferPhase::Cancelled
                } else {
                    TransferPhase::Failed
                };
                (phase, error.to_migration_error(during, side))
            }
        }
    }
}

impl<R: SideProtocol> Inner<R> {
    /// Feeds the machine; whether it answered with anything.
    fn feed(&mut self, input: R::Input) -> bool {
        let actions = self.machine.step(input);
        let answered = !actions.is_empty();
        let mut wake = false;
        for action in actions {
            if R::is_interrupt(&action) {
                wake = true;
            } else {
                self.queue.push_back(action);
            }
        }
        if wake && let Some(interrupt) = &self.interrupt {
            interrupt();
        }
        answered
    }
}

/// A side, whichever it is.
pub(crate) trait AnySide: Send + Sync {
    /// `migrations/{migration}`.
    fn migration(&self) -> &MigrationName;
    /// See [`Side::transfer`].
    fn transfer(&self) -> v1::Transfer;
    /// See [`Side::phase`].
    fn phase(&self) -> TransferPhase;
    /// See [`Side::watch`].
    fn watch(&self) -> watch::Receiver<u64>;
    /// See [`Side::cancel`].
    fn cancel(&self, error: Option<v1::MigrationError>) -> Result<(), ApiError>;
    /// See [`Side::release_record`].
    fn release_record(&self, dir: &VmDir) -> std::io::Result<()>;
}

impl<R: SideProtocol> AnySide for Side<R> {
    fn migration(&self) -> &MigrationName {
        self.migration()
    }

    fn transfer(&self) -> v1::Transfer {
        self.transfer()
    }

    fn phase(&self) -> TransferPhase {
        self.phase()
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.watch()
    }

    fn cancel(&self, error: Option<v1::MigrationError>) -> Result<(), ApiError> {
        self.cancel(error)
    }

    fn release_record(&self, dir: &VmDir) -> std::io::Result<()> {
        self.release_record(dir)
    }
}

/// Whether a side in this phase has ended.
pub(crate) fn has_ended(phase: TransferPhase) -> bool {
    matches!(
        phase,
        TransferPhase::Completed | TransferPhase::Cancelled | TransferPhase::Failed
    )
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::AtomicU32};

    use super::*;
    use crate::handover::protocol::source::{Action, Input, Source};

    fn side() -> Side<Source> {
        Side::new(
            &MigrationName::parse("m").unwrap(),
            (&VmName::parse("v").unwrap(), "u".into()),
            1,
            0,
        )
    }

    /// Up to the moment before READY is heard.
    fn about_to_commit() -> Side<Source> {
        let side = side();
        for input in [Input::Connected, Input::SwitchoverDecided, Input::StateSent] {
            side.feed(input);
            side.next().unwrap();
        }
        side
    }

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let side = about_to_commit();
        side.cancel(None).unwrap();
        side.feed(Input::ReadyHeard);
        assert_ne!(side.next(), Some(Action::JournalRelinquished));

        let side = about_to_commit();
        side.feed(Input::ReadyHeard);
        assert_eq!(
            side.cancel(None).unwrap_err().reason,
            Reason::PastPointOfNoReturn
        );
        assert_eq!(side.next(), Some(Action::JournalRelinquished));
    }

    #[test]
    fn racing_cancels_and_commits_have_one_winner() {
        for _ in 0..200 {
            let side = Arc::new(about_to_commit());
            let other = Arc::clone(&side);
            let cancel = std::thread::spawn(move || other.cancel(None).is_ok());
            side.feed(Input::ReadyHeard);
            let committed = side.next() == Some(Action::JournalRelinquished);
            assert_ne!(committed, cancel.join().unwrap());
        }
    }

    #[test]
    fn what_a_side_waits_for_is_told_and_bounded() {
        let side = side();
        let mut told = side.watch();
        let error = ApiError::new(Reason::DiskFull, "ä".repeat(1000));
        side.wait_for(Some(("its journal to be written", &error)));
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        let words = side.transfer().waiting_for;
        assert!(words.starts_with("its journal to be written: ä"), "{words}");
        assert!(words.len() <= LONGEST_WAIT);
        side.wait_for(Some(("its journal to be written", &error)));
        assert!(!told.has_changed().unwrap(), "said once");
        side.wait_for(None);
        assert_eq!(side.transfer().waiting_for, "");
    }

    #[test]
    fn what_failed_elsewhere_is_what_is_recorded() {
        let side = side();
        let error = ApiError::new(Reason::DstNoMemory, "full")
            .to_migration_error(v1::MigrationPhase::Preparing, "destination");
        side.cancel(Some(error.clone())).unwrap();
        let broken = ApiError::new(Reason::ConnectionLost, "broken");
        let during = v1::MigrationPhase::Preparing;
        assert_eq!(
            side.ending(Why::Elsewhere, Some(&broken), during),
            (TransferPhase::Failed, error)
        );
        let (phase, error) = side.ending(Why::Cancelled, Some(&broken), during);
        assert_eq!(phase, TransferPhase::Cancelled);
        assert_eq!(error.reason, Reason::CancelledByUser.as_str());
    }

    #[test]
    fn a_released_record_is_not_written_again() {
        let dir = slat_test_dir::TestDir::new();
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
