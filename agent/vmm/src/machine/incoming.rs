//! The destination's side of a handover, as the migration drives it.
//!
//! `begin_incoming`, `load`, `prepare`, then `own` and `run_owned` once the source has committed,
//! or `abort_incoming` once it is certain that it never will.

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, Paging, SlotSpec, VmName, VmSpec, check_slot_table, slots_for_memory},
    v1,
};
use slat_record::{
    journal::{Entry, Ownership},
    uid::VmUid,
};

use super::{
    Control, Exit, Fence, Machine, Switchover,
    birth::Birth,
    build::MadeAs,
    oom::OomScore,
    resolve,
    room::check_free,
    view::{Identity, Participation, State, View},
};
use crate::memory::{Mode, check_room};

impl Machine {
    /// Builds an empty VM that receives: backend and slots of zeroes, no guest. Journals INCOMING
    /// at the source's epoch.
    ///
    /// # Errors
    /// VM_EXISTS; BAD_PARAMETER, BAD_SLOT_TABLE when what the source says of the VM is not sound;
    /// CAPABILITY_MISSING; DST_NO_MEMORY; NO_HUGE_PAGES; KVM_IOCTL; JOURNAL. There is then no VM
    /// here.
    pub(crate) fn begin_incoming(
        &self,
        migration: &MigrationName,
        vm: &v1::Vm,
        slots: &[SlotSpec],
    ) -> Result<(), ApiError> {
        let mut control = self.control();
        control.leave = None;
        self.free_for_a_vm()?;
        let spec = self.incoming_spec(vm)?;
        check_announced(&spec, slots)?;
        // Zeroes take no memory until pages arrive; by then it is too late to refuse.
        let needed = slots
            .iter()
            .fold(0_u64, |sum, slot| sum.saturating_add(slot.bytes()));
        let prefault = spec.prefault;
        let ordinary = spec.backing.ordinary_bytes(needed);
        check_free(ordinary, Reason::DstNoMemory)
            .and_then(|()| check_room(Mode::from(&spec), needed))
            .map_err(|mut error| {
                if error.reason == Reason::NoMemory {
                    error.reason = Reason::DstNoMemory;
                }
                error
                    .with("vm", &self.shared.vm)
                    .with("migration", migration)
                    .with("vm_location", "SOURCE")
            })?;
        let built = self
            .build(&spec, slots, Reason::DstNoMemory, MadeAs::New)
            .and_then(|()| {
                Ok(control.journal.append(&Entry::Incoming {
                    vm: self.shared.vm.id().to_owned(),
                    uid: vm.uid.clone(),
                    migration: migration.id().to_owned(),
                    epoch: vm.epoch,
                })?)
            });
        if let Err(error) = built {
            self.tear_down();
            return Err(error
                .with("vm", &self.shared.vm)
                .with("migration", migration));
        }
        if prefault {
            // All of it is populated before the first page is sent.
            self.prefault_done();
        }
        // Should the host run out of memory all the same, a copy that nobody runs yet is the least
        // loss.
        control.oom = self.parts.oom_score.as_deref().and_then(OomScore::raise);
        self.shared.change(|view| {
            view.identity = Some(Identity {
                uid: vm.uid.clone(),
                spec,
                birth: vm.create_time.map(Birth::at),
            });
            view.state = State::Incoming;
            view.epoch = vm.epoch;
            view.participation = Participation::Incoming {
                migration: migration.clone(),
                prepared: false,
            };
        });
        Ok(())
    }

    fn incoming_spec(&self, vm: &v1::Vm) -> Result<VmSpec, ApiError> {
        if VmName::parse(&vm.name)? != self.shared.vm {
            return Err(ApiError::bad_parameter(
                "vm.name",
                format_args!("this process is for {}", self.shared.vm),
            ));
        }
        let uid = VmUid::parse(&vm.uid)?;
        if let Some(own) = self.parts.uid.as_ref().filter(|own| **own != uid) {
            return Err(ApiError::bad_parameter(
                "vm.uid",
                format_args!("this process is for {own}"),
            ));
        }
        if vm.epoch == 0 || vm.epoch == u64::MAX {
            return Err(ApiError::bad_parameter("vm.epoch", "is out of range"));
        }
        let spec = vm
            .spec
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("vm.spec", "is missing"))?;
        let spec = VmSpec::from_resource(spec)?;
        if spec.backend.is_none() {
            // Another host's default may be another backend, and vCPU state moves only between
            // equals.
            return Err(ApiError::bad_parameter(
                "vm.spec.backend",
                "the source says which",
            ));
        }
        let spec = resolve(&self.parts, &spec)?;
        if spec.paging == Paging::Agent {
            // Once it is here.
            self.check_watchable(&spec)?;
        }
        Ok(spec)
    }

    /// Loads the vCPUs' state. Not to be repeated after PREPARED.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; STATE_VERSION_UNSUPPORTED, STATE_LOAD.
    pub(crate) fn load(
        &self,
        migration: &MigrationName,
        vcpu_state: &[u8],
    ) -> Result<(), ApiError> {
        let _control = self.control();
        let view = self.incoming(migration)?;
        if matches!(
            view.participation,
            Participation::Incoming { prepared: true, .. }
        ) {
            return Err(self.shared.bad_state(&view, "be prepared twice"));
        }
        self.built_backend()?
            .load_state(vcpu_state)
            .map_err(|error| {
                let mut error = ApiError::from(error);
                if error.reason != Reason::StateVersionUnsupported {
                    // Which call failed, and by what, is in its metadata.
                    error.reason = Reason::StateLoad;
                }
                error
                    .with("vm", &self.shared.vm)
                    .with("migration", migration)
                    .with("vm_location", "SOURCE")
            })
    }

    /// Journals PREPARED. When it returns, READY may be said; until then the source never commits.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; JOURNAL: the entry may be durable, READY must not be said.
    pub(crate) fn prepare(&self, migration: &MigrationName) -> Result<(), ApiError> {
        let mut control = self.control();
        let view = self.incoming(migration)?;
        // Before the append: once the entry may be durable, SIGTERM does not end this process.
        self.shared.change(|view| {
            if let Participation::Incoming { prepared, .. } = &mut view.participation {
                *prepared = true;
            }
        });
        let grant = control.leave.clone();
        control.journal.append(&Entry::Prepared {
            uid: view.uid(),
            migration: migration.id().to_owned(),
            epoch: view.epoch + 1,
            grant,
        })?;
        Ok(())
    }

    /// Takes ownership at the source's epoch + 1. State PAUSED, or CREATED when the VM had never
    /// run at its switchover. vCPUs do not run yet. After JOURNAL it may be called again.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION; JOURNAL: not owned for certain, call again.
    pub(crate) fn own(&self, migration: &MigrationName, left: Switchover) -> Result<(), ApiError> {
        let mut control = self.control();
        let view = self.incoming(migration)?;
        let epoch = view.epoch + 1;
        // An append that failed before may have reached the file: look before appending again.
        control.journal.settle()?;
        if control.journal.state().map(|state| &state.ownership)
            != Some(&Ownership::Owner { epoch })
        {
            control.journal.append(&Entry::Owned {
                uid: view.uid(),
                migration: migration.id().to_owned(),
                epoch,
            })?;
        }
        // It is the VM now: as precious as any other.
        control.oom = None;
        self.shared.change(|view| {
            view.epoch = epoch;
            view.state = if left.never_ran && !left.run {
                State::Created
            } else {
                State::Paused
            };
            view.participation = Participation::None;
        });
        if self.is_paged_by_agent() {
            // As soon as a pager is there; until then it is the kernel's.
            self.watching().by_agent();
        }
        Ok(())
    }

    /// Runs the vCPUs of a VM that [`Machine::own`] took, if they ran at the source.
    ///
    /// # Errors
    /// The backend's: the VM is owned here all the same (metadata `vm_location`), PAUSED, and can
    /// be resumed.
    pub(crate) fn run_owned(
        &self,
        migration: &MigrationName,
        left: Switchover,
    ) -> Result<v1::Vm, ApiError> {
        let control = self.control();
        // Somebody may have resumed it already.
        if left.run && self.shared.view().state == State::Paused {
            self.run_vcpus(&control).map_err(|error| {
                error
                    .with("migration", migration)
                    .with("vm_location", "DESTINATION")
                    .with("advice", "the VM is owned here and paused: resume it")
            })?;
        }
        self.shown()
    }

    /// Gives the incoming side up: journals ABORTED, state FAILED, the process is to end. READY was
    /// never said, or the caller knows that the source did not commit and never will.
    ///
    /// # Errors
    /// NO_SUCH_MIGRATION (once owned, too); JOURNAL: the process is to end all the same.
    pub(crate) fn abort_incoming(&self, migration: &MigrationName) -> Result<(), ApiError> {
        let mut control = self.control();
        let view = self.shared.view();
        if view.state == State::Failed
            && matches!(&view.participation, Participation::Incoming { migration: of, .. } if of == migration)
        {
            return Ok(());
        }
        self.incoming(migration)?;
        self.give_up_incoming(&mut control, migration)
    }

    pub(super) fn give_up_incoming(
        &self,
        control: &mut Control,
        migration: &MigrationName,
    ) -> Result<(), ApiError> {
        control.fence = Fence::Up;
        let appended = control.journal.append(&Entry::Aborted {
            uid: self.shared.view().uid(),
            migration: migration.id().to_owned(),
        });
        self.shared.change(|view| {
            view.state = State::Failed;
            view.message = format!("{migration} was given up");
        });
        self.end_paging();
        self.shared.end(Exit::Aborted);
        Ok(appended?)
    }

    fn incoming(&self, migration: &MigrationName) -> Result<View, ApiError> {
        let view = self.shared.view();
        match &view.participation {
            Participation::Incoming { migration: of, .. }
                if of == migration && view.state == State::Incoming =>
            {
                Ok(view)
            }
            _ => Err(self.shared.no_such_migration(migration)),
        }
    }
}

/// Whether the slots that were announced can be those of such a VM.
///
/// # Errors
/// BAD_SLOT_TABLE.
pub(super) fn check_announced(spec: &VmSpec, slots: &[SlotSpec]) -> Result<(), ApiError> {
    check_slot_table(slots)?;
    for needed in slots_for_memory(spec.memory_bytes)? {
        if !slots.contains(&needed) {
            return Err(ApiError::new(
                Reason::BadSlotTable,
                format!(
                    "slot {}: the VM's own memory is not among the slots",
                    needed.slot
                ),
            )
            .with("slot", needed.slot));
        }
    }
    Ok(())
}
