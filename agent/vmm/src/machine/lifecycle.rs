//! Start, pause, resume, delete, stop: what users ask of a VM, and the one gate through which vCPUs
//! run.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, v1};

use super::{
    Control, Exit, Fence, Machine,
    view::{Participation, State, View},
};
use crate::pager::GivesWay;
use slat_record::journal::{Entry, Ownership};

impl Machine {
    /// CREATED to RUNNING. No effect on a RUNNING VM.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH when handed over; MIGRATION_IN_PROGRESS during the switchover;
    /// VM_STATE, also while its memory is being populated; NO_MEMORY when that failed;
    /// PAGER_UNREACHABLE; the backend's.
    pub(crate) fn start(&self) -> Result<v1::Vm, ApiError> {
        self.await_prefault();
        self.await_pager()?;
        self.lifecycle("be started", |control, view| match view.state {
            State::Running => Ok(()),
            State::Created if view.held.is_some() => self.refuse_held(view, "be started"),
            State::Created => {
                self.refuse_unpopulated(view)?;
                self.run_vcpus(control)
            }
            State::Paused => Err(self
                .shared
                .bad_state(view, "be started")
                .with("advice", "resume it")),
            _ => Err(self.shared.bad_state(view, "be started")),
        })
    }

    /// RUNNING to PAUSED; returns when no vCPU runs. No effect on a PAUSED VM. During a migration's
    /// precopy the pause is kept: the VM arrives paused.
    ///
    /// # Errors
    /// As [`Machine::start`]; SOURCE_PAUSE when a vCPU does not stop.
    pub(crate) fn pause(&self) -> Result<v1::Vm, ApiError> {
        self.lifecycle("be paused", |_, view| match view.state {
            State::Paused => {
                self.hold_for_user();
                Ok(())
            }
            State::Running => self.stop_vcpus(),
            _ => Err(self.shared.bad_state(view, "be paused")),
        })
    }

    /// PAUSED to RUNNING. No effect on a RUNNING VM.
    ///
    /// # Errors
    /// As [`Machine::start`].
    pub(crate) fn resume(&self) -> Result<v1::Vm, ApiError> {
        self.lifecycle("be resumed", |control, view| match view.state {
            State::Running => Ok(()),
            State::Paused => {
                self.refuse_held(view, "be resumed")?;
                self.run_vcpus(control)
            }
            State::Created => Err(self
                .shared
                .bad_state(view, "be resumed")
                .with("advice", "start it")),
            _ => Err(self.shared.bad_state(view, "be resumed")),
        })
    }

    /// Ends the VM: vCPUs stopped, the journal ended, [`Machine::exited`] told. The memory goes
    /// with the process.
    ///
    /// # Errors
    /// NO_SUCH_VM; MIGRATION_IN_PROGRESS while it migrates; STALE_EPOCH when handed over; JOURNAL:
    /// the VM is then stopped for good in this process, and the call can be made again.
    pub(crate) fn delete(&self) -> Result<(), ApiError> {
        self.refuse_at_once("be deleted")?;
        let _given_up = self.hurry(&self.shared.view());
        let mut control = self.control();
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Some(migration) = view.participation.migration() {
            return Err(self.shared.migrating(migration, "be deleted"));
        }
        self.finish(&mut control, Exit::Deleted)
    }

    /// Whoever waits for the pager of a VM that is to end gives up, until the answer is dropped: it
    /// may hold the control lock, or arm a snapshot. Not while the VM migrates: what comes of that
    /// decides whether it may end.
    fn hurry(&self, view: &View) -> Option<GivesWay<'_>> {
        matches!(view.participation, Participation::None).then(|| self.pager.give_way())
    }

    /// Stops this VM for good because the process is told to end (SIGTERM): as [`Machine::delete`],
    /// but an outgoing migration before its commit dies with it, and an incoming one before
    /// PREPARED is given up. Without a VM the process just ends.
    ///
    /// # Errors
    /// PAST_POINT_OF_NO_RETURN when a handover is past RELINQUISHED here, or past PREPARED at the
    /// destination: this process may hold the only copy of the VM, or the answer to who owns it.
    /// JOURNAL as [`Machine::delete`].
    pub(crate) fn stop(&self) -> Result<(), ApiError> {
        let _given_up = self.hurry(&self.shared.view());
        let mut control = self.control();
        let view = self.shared.view();
        if view.identity.is_none() {
            self.shared.end(Exit::Deleted);
            return Ok(());
        }
        match &view.participation {
            _ if view.state == State::Relinquished => {
                Err(self.past_no_return(&view, "it was handed over and not yet released"))
            }
            _ if control.fence == Fence::Unsettled => {
                Err(self.past_no_return(&view, "RELINQUISHED may be durable"))
            }
            Participation::Incoming { prepared: true, .. } => Err(self.past_no_return(
                &view,
                "it is PREPARED here and the source may have committed",
            )),
            Participation::Incoming {
                migration,
                prepared: false,
                ..
            } => self.give_up_incoming(&mut control, migration),
            Participation::None | Participation::Outgoing { .. } => {
                self.finish(&mut control, Exit::Deleted)
            }
        }
    }

    /// The VM's directory, and its journal with it, was removed below this process: nobody can find
    /// it, ask it or order it again, and what it knows of who owns the VM can be told to nobody.
    /// Ends it when it was `told` to end (SIGTERM), whatever it has, and without being told when it
    /// never owned the VM. A VM that it owns goes on until somebody says so. Whether it ends.
    ///
    /// What ends here may be the last copy of a VM that is handed over just now; never does a
    /// second owner come of it.
    pub(crate) fn forsake(&self, told: bool) -> bool {
        let mut control = self.control();
        let view = self.shared.view();
        let never_owned = view.identity.is_none()
            || matches!(
                view.participation,
                Participation::Incoming {
                    prepared: false,
                    ..
                }
            );
        if !told && !never_owned {
            return false;
        }
        control.fence = Fence::Up;
        if let Some(backend) = self.raw_backend()
            && let Err(error) = backend.pause()
        {
            tracing::warn!(%error, vm = %self.shared.vm, "vCPUs end with the process");
        }
        self.end_paging();
        self.shared.end(Exit::Forsaken);
        true
    }

    pub(super) fn past_no_return(&self, view: &View, why: &str) -> ApiError {
        let vm = &self.shared.vm;
        let error = ApiError::new(
            Reason::PastPointOfNoReturn,
            format!("{vm} cannot end: {why}"),
        )
        .with("vm", vm)
        .with("state", view.state.as_str_name());
        match view.participation.migration() {
            Some(migration) => error.with("migration", migration),
            None => error,
        }
    }

    fn lifecycle(
        &self,
        what: &str,
        act: impl FnOnce(&Control, &View) -> Result<(), ApiError>,
    ) -> Result<v1::Vm, ApiError> {
        self.refuse_at_once(what)?;
        let control = self.control();
        let view = self.admit(what)?;
        act(&control, &view)?;
        self.shown()
    }

    /// Answers a user without waiting for the control lock, which a switchover holds: `what` must
    /// not lengthen the downtime.
    ///
    /// # Errors
    /// MIGRATION_IN_PROGRESS during the switchover.
    pub(crate) fn refuse_at_once(&self, what: &str) -> Result<(), ApiError> {
        let view = self.shared.view();
        match &view.participation {
            Participation::Outgoing {
                migration,
                switchover: true,
                ..
            } if view.state != State::Relinquished => Err(self.shared.migrating(migration, what)),
            _ => Ok(()),
        }
    }

    /// The view, when a user may do `what` to the VM now.
    fn admit(&self, what: &str) -> Result<View, ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        match &view.participation {
            Participation::Outgoing {
                migration,
                switchover: true,
                ..
            } => Err(self.shared.migrating(migration, what)),
            Participation::Incoming { migration, .. } => Err(self
                .shared
                .bad_state(&view, what)
                .with("migration", migration)),
            _ => Ok(view),
        }
    }

    /// The only way vCPUs ever run. On an error they are stopped and the state is what it was.
    pub(super) fn run_vcpus(&self, control: &Control) -> Result<(), ApiError> {
        let view = self.shared.view();
        let owned = match control.journal.state().map(|state| &state.ownership) {
            Some(Ownership::Owner { epoch }) => *epoch == view.epoch,
            _ => false,
        };
        if control.fence != Fence::Down || !owned {
            return Err(self.shared.stale_epoch(&view));
        }
        let backend = self.built_backend()?;
        // Before the vCPUs run: the guest may end before `run` returns.
        let before = self
            .shared
            .change(|view| std::mem::replace(&mut view.state, State::Running));
        backend.run().map_err(|error| {
            if let Err(error) = backend.pause() {
                tracing::error!(%error, vm = %self.shared.vm, "vCPUs that failed to run cannot be stopped either");
            }
            self.shared.change(|view| {
                if view.state == State::Running {
                    view.state = before;
                }
            });
            ApiError::from(error).with("vm", &self.shared.vm)
        })
    }

    /// Stops the vCPUs of a RUNNING VM: PAUSED, unless the guest ended by itself meanwhile. When
    /// they cannot be stopped they run on; when not even that, the VM is FAILED.
    pub(super) fn stop_vcpus(&self) -> Result<(), ApiError> {
        self.halt()?;
        self.shared.change(|view| {
            if view.state == State::Running {
                view.state = State::Paused;
            }
        });
        Ok(())
    }

    /// Calls `act` while no vCPU runs. Those that ran run again afterwards, whatever came of it; to
    /// everybody else the VM stays RUNNING. Says how long none ran; 0 when none was stopped.
    ///
    /// # Errors
    /// SOURCE_PAUSE: `act` was not called. The backend's when the vCPUs cannot run again: `act` was
    /// called and the VM is PAUSED.
    pub(super) fn while_stopped<T>(
        &self,
        control: &Control,
        act: impl FnOnce() -> T,
    ) -> Result<(T, Duration), ApiError> {
        if self.shared.view().state != State::Running {
            return Ok((act(), Duration::ZERO));
        }
        let begun = Instant::now();
        self.halt()?;
        let done = act();
        // Unless the guest ended by itself.
        if self.shared.view().state == State::Running
            && let Err(error) = self.run_vcpus(control)
        {
            let mut ended = false;
            self.shared.change(|view| {
                ended = view.state != State::Running;
                if !ended {
                    view.state = State::Paused;
                }
            });
            // It ended while it was stopped, and has said so by now: nothing to run again.
            if !ended {
                return Err(
                    error.with("advice", "the VM is paused: list its slots, then resume it")
                );
            }
        }
        Ok((done, begun.elapsed()))
    }

    /// Stops the vCPUs, whatever state is shown.
    fn halt(&self) -> Result<(), ApiError> {
        let backend = self.built_backend()?;
        let begun = Instant::now();
        if let Err(error) = backend.pause() {
            let message = format!("vCPUs of {} cannot be stopped: {error}", self.shared.vm);
            if let Err(error) = backend.run() {
                self.shared.change(|view| {
                    view.state = State::Failed;
                    view.message = format!("{message}; and not run again: {error}");
                });
            }
            let error = ApiError::new(Reason::SourcePause, message).with("vm", &self.shared.vm);
            return Err(self.with_paging(error));
        }
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.paused_in.store(took.max(1), Ordering::Relaxed);
        Ok(())
    }

    /// Stops vCPUs, ends the journal, ends the process.
    pub(super) fn finish(&self, control: &mut Control, exit: Exit) -> Result<(), ApiError> {
        // Ended forbids running, durable or not.
        control.fence = Fence::Up;
        self.end_prefault();
        let backend = self.raw_backend();
        let stopped = backend.as_ref().map_or(Ok(()), |backend| backend.pause());
        self.end_paging();
        // One that waited for a page without being interruptible was woken by that. It was told to
        // stop, so it does not enter the guest.
        let stopped =
            stopped.or_else(|_| backend.as_ref().map_or(Ok(()), |backend| backend.pause()));
        if let Err(error) = stopped {
            tracing::warn!(%error, vm = %self.shared.vm, "vCPUs end with the process");
        }
        self.shared.change(|view| {
            if view.state == State::Running {
                view.state = State::Paused;
            }
        });
        control.journal.settle()?;
        if !matches!(
            control.journal.state().map(|state| &state.ownership),
            Some(Ownership::Ended)
        ) {
            let uid = control
                .journal
                .state()
                .map_or_else(String::new, |state| state.uid.clone());
            control.journal.append(&Entry::Ended { uid })?;
        }
        self.shared.change(|view| view.identity = None);
        self.shared.end(exit);
        Ok(())
    }
}
