//! What everybody may see of a machine at any moment, behind a lock that is only ever held for a
//! few instructions.
//!
//! vCPU threads report the guest's end here while the machine may be waiting for those very
//! threads, so this lock is never held across a call of the backend or the journal.

use std::{
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, VmName, VmSpec},
};
use tokio::sync::watch;

use super::birth::Birth;
use crate::backend::{GuestEvent, RunFailure};

pub(super) use slat_proto::v1::vm::State;

/// Why the process is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The VM was deleted, or its process told to stop.
    Deleted,
    /// The VM lives elsewhere and the server has stored that.
    Released,
    /// The incoming VM was given up.
    Aborted,
    /// The VM's directory was removed below its process.
    Forsaken,
}

/// What a VM is, unchanging from its creation on.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) uid: String,
    pub(super) spec: VmSpec,
    pub(super) birth: Option<Birth>,
}

/// The migration the VM is part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Participation {
    None,
    /// The source's side. `switchover`: life-cycle calls are refused; `resume`: vCPUs ran when it
    /// began.
    Outgoing {
        migration: MigrationName,
        switchover: bool,
        resume: bool,
    },
    /// The destination's side. `prepared`: PREPARED may be durable.
    Incoming {
        migration: MigrationName,
        prepared: bool,
    },
}

impl Participation {
    pub(super) fn migration(&self) -> Option<&MigrationName> {
        match self {
            Self::None => None,
            Self::Outgoing { migration, .. } | Self::Incoming { migration, .. } => Some(migration),
        }
    }
}

/// vCPUs that are stopped for as long as a snapshot lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) snapshot: u64,
    /// They ran, and run again afterwards.
    pub(super) resume: bool,
    /// For people.
    pub(super) why: String,
}

/// The VM as it is now.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// `None` before create or begin_incoming, and after the end.
    pub(super) identity: Option<Identity>,
    pub(super) state: State,
    pub(super) message: String,
    /// Why its vCPUs do not run again, where it failed.
    pub(super) failure: Option<RunFailure>,
    pub(super) epoch: u64,
    pub(super) participation: Participation,
    pub(super) held: Option<Held>,
}

impl View {
    /// The VM's identity as the journal writes it; empty before there is a VM.
    pub(super) fn uid(&self) -> String {
        self.identity
            .as_ref()
            .map_or_else(String::new, |identity| identity.uid.clone())
    }
}

/// The view, and who is told of changes.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) vm: VmName,
    pub(super) host: HostName,
    view: Mutex<View>,
    changes: watch::Sender<u64>,
    exit: watch::Sender<Option<Exit>>,
}

impl Shared {
    pub(super) fn new(vm: VmName, host: HostName) -> Self {
        Self {
            vm,
            host,
            view: Mutex::new(View {
                identity: None,
                state: State::Unspecified,
                message: String::new(),
                failure: None,
                epoch: 0,
                participation: Participation::None,
                held: None,
            }),
            changes: watch::Sender::new(0),
            exit: watch::Sender::new(None),
        }
    }

    pub(super) fn view(&self) -> View {
        self.view
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes the view and tells the watchers.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut View) -> T) -> T {
        let result = change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
        self.changes.send_modify(|count| *count += 1);
        result
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Says that the process is to end; the first reason stays.
    pub(super) fn end(&self, exit: Exit) {
        self.exit
            .send_if_modified(|now| now.is_none() && now.replace(exit).is_none());
        self.changes.send_modify(|count| *count += 1);
    }

    pub(super) fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// The guest's own end, told by a vCPU thread. A VM that was handed over or has ended is past
    /// such news.
    pub(super) fn guest_event(&self, event: GuestEvent) {
        tracing::info!(vm = %self.vm, ?event, "guest event");
        self.change(|view| {
            if !matches!(
                view.state,
                State::Created | State::Running | State::Paused | State::Stopped
            ) {
                return;
            }
            match event {
                GuestEvent::Stopped => {
                    view.state = State::Stopped;
                    "the guest ended".clone_into(&mut view.message);
                }
                GuestEvent::Failed(failure) => {
                    view.state = State::Failed;
                    view.message = failure.to_string();
                    view.failure = Some(failure);
                }
            }
        });
    }

    /// The identity, or NO_SUCH_VM.
    pub(super) fn identity(&self, view: &View) -> Result<Identity, ApiError> {
        view.identity
            .clone()
            .ok_or_else(|| ApiError::no_such_vm(&self.vm))
    }

    /// The VM's state forbids `what`.
    pub(super) fn bad_state(&self, view: &View, what: &str) -> ApiError {
        let state = view.state.as_str_name();
        let mut message = format!("{} is {state} and cannot {what}", self.vm);
        if let Some(failure) = &view.failure {
            let _ = write!(message, ": {failure}");
        }
        let error = ApiError::new(Reason::VmState, message)
            .with("vm", &self.vm)
            .with("state", state);
        match &view.failure {
            Some(failure) => failure.told(error),
            None => error,
        }
    }

    /// This process gave the VM away.
    pub(super) fn stale_epoch(&self, view: &View) -> ApiError {
        let error = ApiError::new(
            Reason::StaleEpoch,
            format!(
                "{} was handed over at epoch {}: this process never runs it again",
                self.vm, view.epoch
            ),
        )
        .with("vm", &self.vm)
        .with("host", &self.host)
        .with("epoch", view.epoch)
        .with("vm_location", "DESTINATION")
        .with("advice", "ask the server where the VM is now");
        match view.participation.migration() {
            Some(migration) => error.with("migration", migration),
            None => error,
        }
    }

    /// The VM migrates, so `what` must wait.
    pub(super) fn migrating(&self, migration: &MigrationName, what: &str) -> ApiError {
        ApiError::new(
            Reason::MigrationInProgress,
            format!("{} migrates ({migration}) and cannot {what}", self.vm),
        )
        .with("vm", &self.vm)
        .with("migration", migration)
        .with("advice", "wait for the migration or cancel it")
    }

    /// No side of that migration here.
    pub(super) fn no_such_migration(&self, migration: &MigrationName) -> ApiError {
        ApiError::new(
            Reason::NoSuchMigration,
            format!("{} is not part of {migration}", self.vm),
        )
        .with("vm", &self.vm)
        .with("migration", migration)
    }
}
