//! The source's side of a handover, as the migration drives it.
//!
//! `begin_outgoing`, `enter_switchover`, `relinquish`, `release`; before `relinquish`, `end_outgoing` undoes everything.

use slat_proto::{ApiError, Reason, model::MigrationName, v1};

use super::{
    Exit, Machine,
    view::{Engagement, State, View},
};
use slat_record::journal::Entry;

/// How a VM was found when its switchover began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Switchover {
    /// Its vCPUs ran; they are to run at the destination.
    pub run: bool,
    /// It was CREATED: never started since it was made.
    pub never_ran: bool,
}

impl Machine {
    /// Makes the VM part of an outgoing migration.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH when handed over or `epoch` is not the VM's; MIGRATION_IN_PROGRESS with the `migration` it is
    /// part of (this one too); VM_STATE; MIGRATION_BLOCKED with `blocked_reasons`.
    pub(crate) fn begin_outgoing(
        &self,
        migration: &MigrationName,
        epoch: u64,
    ) -> Result<v1::Vm, ApiError> {
        let control = self.control();
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if control.fenced || view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Some(other) = view.engagement.migration() {
            return Err(self.shared.migrating(other, "begin another migration"));
        }
        if view.epoch != epoch {
            return Err(ApiError::new(
                Reason::StaleEpoch,
                format!("{} is at epoch {}, not {epoch}", self.shared.vm, view.epoch),
            )
            .with("vm", &self.shared.vm)
            .with("epoch", view.epoch)
            .with("vm_location", v1::VmLocation::Source.as_str_name())
            .with("advice", "read the VM again and retry"));
        }
        if !matches!(view.state, State::Running | State::Paused | State::Created) {
            return Err(self.shared.bad_state(&view, "be migrated"));
        }
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
        self.shared.change(|view| {
            view.engagement = Engagement::Outgoing {
                migration: migration.clone(),
                switchover: false,
                resume: false,
            };
        });
        self.shown()
    }

    /// Stops the vCPUs for the switchover; life-cycle calls of users are refused from here on.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; VM_STOPPED_DURING_MIGRATION when the guest ended; SOURCE_PAUSE. The switchover has then not begun.
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

    /// **The point of no return.** Journals RELINQUISHED; when it returns, the entry is durable and no call ever runs the
    /// VM's vCPUs in this process again.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; VM_STATE before the switchover; VM_STOPPED_DURING_MIGRATION: nothing was journalled, the source
    /// still owns the VM. IN_DOUBT when the append failed: the entry may be durable, so the VM stays stopped here for ever
    /// (state RELINQUISHED) and only the journal says who owns it.
    pub(crate) fn relinquish(&self, migration: &MigrationName) -> Result<(), ApiError> {
        let mut control = self.control();
        let view = self.outgoing(migration)?;
        if control.fenced {
            return Err(self.shared.stale_epoch(&view));
        }
        if !matches!(
            view.engagement,
            Engagement::Outgoing {
                switchover: true,
                ..
            }
        ) {
            return Err(self
                .shared
                .bad_state(&view, "be relinquished before its switchover"));
        }
        self.still_alive(&view, migration)?;
        control.fenced = true;
        let appended = control.journal.append(&Entry::Relinquished {
            migration: migration.id().to_owned(),
            epoch: view.epoch,
        });
        self.shared.change(|view| {
            view.state = State::Relinquished;
            view.message = match &appended {
                Ok(()) => String::new(),
                Err(error) => {
                    format!("stopped for good: RELINQUISHED may or may not be durable: {error}")
                }
            };
        });
        appended.map_err(|error| {
            ApiError::new(
                Reason::InDoubt,
                format!(
                    "{} stays stopped here for ever: whether RELINQUISHED is durable is not known: {error}",
                    self.shared.vm
                ),
            )
            .with("vm", &self.shared.vm)
            .with("migration", migration)
            .with("epoch", view.epoch)
            .with("vm_location", v1::VmLocation::PausedBoth.as_str_name())
            .with("advice", "read the source's journal: RELINQUISHED there gives the VM to the destination")
        })
    }

    /// Undoes an outgoing migration that did not commit: the VM is no longer part of it, and vCPUs that the switchover
    /// stopped run again.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; PAST_POINT_OF_NO_RETURN after [`Machine::relinquish`] whatever that returned; the backend's when
    /// vCPUs cannot run: the migration is ended all the same and the VM PAUSED.
    pub(crate) fn end_outgoing(&self, migration: &MigrationName) -> Result<v1::Vm, ApiError> {
        let control = self.control();
        let view = self.outgoing(migration)?;
        if control.fenced {
            return Err(self.past_no_return(&view, "RELINQUISHED may be durable"));
        }
        self.shared
            .change(|view| view.engagement = Engagement::None);
        if let Engagement::Outgoing {
            switchover: true,
            resume: true,
            ..
        } = view.engagement
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
        match &view.engagement {
            Engagement::Outgoing { migration: of, .. } if of == migration => Ok(view),
            _ => Err(self.shared.no_such_migration(migration)),
        }
    }

    fn set_switchover(&self, on: bool, running: bool) {
        self.shared.change(|view| {
            if let Engagement::Outgoing {
                switchover, resume, ..
            } = &mut view.engagement
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
        .with("vm_location", v1::VmLocation::Source.as_str_name()))
    }
}
