//! The source's side of a handover, as the migration drives it.
//!
//! `begin_outgoing`, `enter_switchover`, `relinquish`, `release`; before `relinquish`,
//! `leave_switchover` goes back to where the VM runs, `end_outgoing` undoes everything.

use std::time::Duration;

use slat_proto::{ApiError, Reason, model::MigrationName, v1};

use super::{
    Exit, Fence, Machine,
    view::{Participation, State, View},
};
use slat_record::journal::{Entry, GrantMark, Ownership};

/// Pages of a source are waited for so long before a migration, which sends all of memory; who asks
/// has an answer within fifteen seconds.
const LOADS: Duration = Duration::from_secs(10);

/// How a VM was found when its switchover began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Switchover {
    /// Its vCPUs ran; they are to run at the destination.
    pub run: bool,
    /// It was CREATED: never started since it was made.
    pub never_ran: bool,
}

/// Why RELINQUISHED was not journalled for certain.
#[derive(Debug)]
pub(crate) enum RelinquishError {
    /// It was not tried: the VM is owned here as before.
    Refused(ApiError),
    /// It was tried and may be durable or not.
    Unknown(ApiError),
}

impl Machine {
    /// Makes the VM part of an outgoing migration.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH when handed over or `epoch` is not the VM's; MIGRATION_IN_PROGRESS
    /// with the `migration` it is part of (this one too); VM_STATE; MIGRATION_BLOCKED with
    /// `blocked_reasons`.
    pub(crate) fn begin_outgoing(
        &self,
        migration: &MigrationName,
        epoch: u64,
    ) -> Result<v1::Vm, ApiError> {
        self.load_source(LOADS)
            .or_else(|_| self.refuse_unloaded("be migrated"))?;
        let mut control = self.control();
        self.may_begin(control.fence, epoch)?;
        control.leave = None;
        self.shared.change(|view| {
            view.participation = Participation::Outgoing {
                migration: migration.clone(),
                switchover: false,
                resume: false,
            };
        });
        self.shown()
    }

    /// Keeps by which grant the handover that has begun goes on: PREPARED or RELINQUISHED says it.
    pub(crate) fn go_by(&self, leave: GrantMark) {
        self.control().leave = Some(leave);
    }

    /// The VM as it would be part of an outgoing migration. Changes nothing.
    ///
    /// # Errors
    /// As [`Machine::begin_outgoing`]; a VM that is part of `migration` already is described all
    /// the same.
    pub(crate) fn describe_outgoing(
        &self,
        migration: &MigrationName,
        epoch: u64,
    ) -> Result<v1::Vm, ApiError> {
        self.load_source(LOADS)
            .or_else(|_| self.refuse_unloaded("be migrated"))?;
        let control = self.control();
        if self.outgoing(migration).is_err() {
            self.may_begin(control.fence, epoch)?;
        }
        self.shown()
    }

    fn may_begin(&self, fence: Fence, epoch: u64) -> Result<(), ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if fence != Fence::Down || view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Some(other) = view.participation.migration() {
            return Err(self.shared.migrating(other, "begin another migration"));
        }
        if view.epoch != epoch {
            return Err(ApiError::new(
                Reason::StaleEpoch,
                format!("{} is at epoch {}, not {epoch}", self.shared.vm, view.epoch),
            )
            .with("vm", &self.shared.vm)
            .with("epoch", view.epoch)
            .with("vm_location", "SOURCE")
            .with("advice", "read the VM again and retry"));
        }
        if !matches!(view.state, State::Running | State::Paused | State::Created) {
            return Err(self.shared.bad_state(&view, "be migrated"));
        }
        self.refuse_held(&view, "be migrated")?;
        self.refuse_unloaded("be migrated")?;
        let capabilities = self.built_backend()?.capabilities();
        let missing: Vec<&str> = [v1::Capability::DirtyLog, v1::Capability::VcpuState]
            .into_iter()
            .filter(|needed| !capabilities.contains(needed))
            .map(|needed| needed.as_str_name())
            .collect();
        if !missing.is_empty() {
            return Err(ApiError::new(
                Reason::MigrationBlocked,
                format!(
                    "{} cannot be migrated: it lacks {}",
                    self.shared.vm,
                    missing.join(", ")
                ),
            )
            .with("vm", &self.shared.vm)
            .with("blocked_reasons", missing.join(",")));
        }
        Ok(())
    }

    /// Stops the vCPUs for the switchover; life-cycle calls of users are refused from here on.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; VM_STOPPED_DURING_MIGRATION when the guest ended; SOURCE_PAUSE. The
    /// switchover has then not begun.
    pub(crate) fn enter_switchover(
        &self,
        migration: &MigrationName,
    ) -> Result<Switchover, ApiError> {
        let _control = self.control();
        let view = self.outgoing(migration)?;
        self.still_alive(&view, migration)?;
        let running = view.state == State::Running;
        let found = Switchover {
            run: running,
            never_ran: view.state == State::Created,
        };
        self.set_switchover(true, running);
        if running {
            let stopped = self
                .stop_vcpus()
                .and_then(|()| self.still_alive(&self.shared.view(), migration));
            if let Err(error) = stopped {
                self.set_switchover(false, false);
                return Err(error);
            }
        }
        Ok(found)
    }

    /// Undoes [`Machine::enter_switchover`]: vCPUs that it stopped run again, and users may do with
    /// the VM what they may during precopy.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; PAST_POINT_OF_NO_RETURN while RELINQUISHED may be durable;
    /// VM_STOPPED_DURING_MIGRATION; the backend's when vCPUs cannot run.
    pub(crate) fn leave_switchover(&self, migration: &MigrationName) -> Result<(), ApiError> {
        let control = self.control();
        let view = self.outgoing(migration)?;
        if control.fence != Fence::Down {
            return Err(self.past_no_return(&view, "RELINQUISHED may be durable"));
        }
        self.still_alive(&view, migration)?;
        let stopped = matches!(
            view.participation,
            Participation::Outgoing {
                switchover: true,
                resume: true,
                ..
            }
        );
        if stopped && view.state == State::Paused {
            // Still part of the switchover when it fails: the end of the migration tries again.
            self.run_vcpus(&control)?;
        }
        self.set_switchover(false, false);
        Ok(())
    }

    /// **The point of no return.** Journals RELINQUISHED; when it returns, the entry is durable and
    /// no call ever runs the VM's vCPUs in this process again.
    ///
    /// # Errors
    /// `Refused`: nothing was journalled, the source still owns the VM. `Unknown`: the append
    /// failed, and the VM stays stopped until [`Machine::settle_relinquished`] told whether it is
    /// durable.
    pub(crate) fn relinquish(&self, migration: &MigrationName) -> Result<(), RelinquishError> {
        let mut control = self.control();
        let view = self.may_relinquish(migration, control.fence)?;
        control.fence = Fence::Unsettled;
        let grant = control.leave.clone();
        let appended = control.journal.append(&Entry::Relinquished {
            uid: view.uid(),
            migration: migration.id().to_owned(),
            epoch: view.epoch,
            grant,
        });
        match appended {
            Ok(()) => {
                control.fence = Fence::Up;
                self.show_relinquished();
                Ok(())
            }
            Err(error) => {
                self.shared.change(|view| {
                    view.message =
                        format!("stopped: RELINQUISHED may or may not be durable: {error}");
                });
                Err(RelinquishError::Unknown(
                    ApiError::from(error)
                        .with("vm", &self.shared.vm)
                        .with("migration", migration)
                        .with("epoch", view.epoch),
                ))
            }
        }
    }

    /// After `Unknown`: whether RELINQUISHED is durable, which from then on it is or will never be.
    /// Where it is not, this process owns the VM as before.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; JOURNAL: still not known, to be called again.
    pub(crate) fn settle_relinquished(&self, migration: &MigrationName) -> Result<bool, ApiError> {
        let mut control = self.control();
        let view = self.outgoing(migration)?;
        control.journal.settle()?;
        let owner = Ownership::Owner { epoch: view.epoch };
        if control.journal.state().map(|state| &state.ownership) == Some(&owner) {
            // Only what this append put up comes down.
            if control.fence == Fence::Unsettled {
                control.fence = Fence::Down;
                self.shared.change(|view| view.message.clear());
            }
            return Ok(false);
        }
        control.fence = Fence::Up;
        self.show_relinquished();
        Ok(true)
    }

    fn may_relinquish(
        &self,
        migration: &MigrationName,
        fence: Fence,
    ) -> Result<View, RelinquishError> {
        let refuse = RelinquishError::Refused;
        let view = self.outgoing(migration).map_err(refuse)?;
        if fence != Fence::Down {
            return Err(refuse(self.shared.stale_epoch(&view)));
        }
        let in_switchover = matches!(
            view.participation,
            Participation::Outgoing {
                switchover: true,
                ..
            }
        );
        if !in_switchover {
            return Err(refuse(
                self.shared
                    .bad_state(&view, "be relinquished before its switchover"),
            ));
        }
        self.still_alive(&view, migration).map_err(refuse)?;
        Ok(view)
    }

    fn show_relinquished(&self) {
        self.shared.change(|view| {
            view.state = State::Relinquished;
            view.message.clear();
        });
    }

    /// Undoes an outgoing migration that did not commit: the VM is no longer part of it, and vCPUs
    /// that the switchover stopped run again.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; PAST_POINT_OF_NO_RETURN while RELINQUISHED may be durable; the backend's
    /// when vCPUs cannot run: the migration is ended all the same and the VM PAUSED.
    pub(crate) fn end_outgoing(&self, migration: &MigrationName) -> Result<v1::Vm, ApiError> {
        let control = self.control();
        let view = self.outgoing(migration)?;
        if control.fence != Fence::Down {
            return Err(self.past_no_return(&view, "RELINQUISHED may be durable"));
        }
        self.shared
            .change(|view| view.participation = Participation::None);
        if let Participation::Outgoing {
            switchover: true,
            resume: true,
            ..
        } = view.participation
            && self.shared.view().state == State::Paused
        {
            self.run_vcpus(&control)?;
        }
        self.shown()
    }

    /// Ends a process whose VM is owned elsewhere, once the server has stored that.
    ///
    /// # Errors
    /// NO_SUCH_VM; VM_STATE unless RELINQUISHED; JOURNAL.
    pub(crate) fn release(&self) -> Result<(), ApiError> {
        let mut control = self.control();
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state != State::Relinquished {
            return Err(self.shared.bad_state(&view, "be released"));
        }
        self.finish(&mut control, Exit::Released)
    }

    fn outgoing(&self, migration: &MigrationName) -> Result<View, ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        match &view.participation {
            Participation::Outgoing { migration: of, .. } if of == migration => Ok(view),
            _ => Err(self.shared.no_such_migration(migration)),
        }
    }

    fn set_switchover(&self, on: bool, running: bool) {
        self.shared.change(|view| {
            if let Participation::Outgoing {
                switchover, resume, ..
            } = &mut view.participation
            {
                *switchover = on;
                *resume = running;
            }
        });
    }

    fn still_alive(&self, view: &View, migration: &MigrationName) -> Result<(), ApiError> {
        if matches!(view.state, State::Running | State::Paused | State::Created) {
            return Ok(());
        }
        let vm = &self.shared.vm;
        let state = view.state.as_str_name();
        Err(ApiError::new(
            Reason::VmStoppedDuringMigration,
            format!("{vm} became {state} during {migration}: {}", view.message),
        )
        .with("vm", vm)
        .with("migration", migration)
        .with("state", state)
        .with("vm_location", "SOURCE"))
    }
}
