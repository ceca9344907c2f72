//! A snapshot where memory cannot be watched: the vCPUs stay stopped for as long as somebody has
//! its lease.
//!
//! Until then the VM is PAUSED, and users cannot start or resume it. One at a time.

use slat_proto::{ApiError, Reason};

use super::{
    super::{
        Machine, Switchover,
        view::{Held, State, View},
    },
    snapshot::Taken,
};

impl Machine {
    /// Stops the vCPUs and reads the state; `why` says why memory cannot be watched.
    pub(super) fn take_still(&self, purpose: &str, why: &ApiError) -> Result<Taken, ApiError> {
        let control = self.control();
        let view = self.admit_snapshot(control.fence)?;
        let backend = self.built_backend()?;
        let table = self.memory.table();
        let snapshot = self.new_snapshot(table.slots(), true)?;
        let ran = view.state == State::Running;
        let stopped = if ran { self.stop_vcpus() } else { Ok(()) };
        let saved = stopped.and_then(|()| Ok(backend.save_state()?));
        let vcpus = match saved {
            Ok(vcpus) => vcpus,
            Err(error) => {
                self.pager.drop_snapshot(snapshot);
                if ran && self.shared.view().state == State::Paused {
                    self.run_vcpus(&control)?;
                }
                return Err(error);
            }
        };
        let why = why.metadata.get("why").unwrap_or(&why.message);
        let paused = format!("it is paused for {purpose}, and until that is done: {why}");
        self.shared.change(|view| {
            view.held = Some(Held {
                snapshot,
                resume: ran,
                why: paused.clone(),
            });
        });
        Ok(Taken {
            snapshot,
            vm: self.shown()?,
            left: Switchover {
                run: ran,
                never_ran: view.state == State::Created,
            },
            vcpus,
            slots: table.slots().iter().map(|slot| slot.spec()).collect(),
            generation: table.generation(),
            pause: std::time::Duration::ZERO,
            paused: Some(paused),
            touched: Vec::new(),
        })
    }

    /// A snapshot ended: vCPUs that were stopped for it run again.
    pub(super) fn end_still(&self, snapshot: u64) {
        let holds = |view: &View| {
            let held = view.held.as_ref();
            held.is_some_and(|held| held.snapshot == snapshot)
        };
        if !holds(&self.shared.view()) {
            return;
        }
        let control = self.control();
        let held = self
            .shared
            .change(|view| if holds(view) { view.held.take() } else { None });
        let resumes = held.is_some_and(|held| held.resume);
        if resumes
            && self.shared.view().state == State::Paused
            && let Err(error) = self.run_vcpus(&control)
        {
            tracing::error!(%error, vm = %self.shared.vm, "it stays paused after a snapshot");
        }
    }

    /// Refuses `what` while the vCPUs are stopped for a snapshot.
    ///
    /// # Errors
    /// VM_STATE.
    pub(in crate::machine) fn refuse_held(&self, view: &View, what: &str) -> Result<(), ApiError> {
        let Some(held) = &view.held else {
            return Ok(());
        };
        let vm = &self.shared.vm;
        let words = format!("{vm} cannot {what}: {}", held.why);
        Err(ApiError::new(Reason::VmState, words)
            .with("vm", vm)
            .with("state", view.state.as_str_name())
            .with("snapshot", held.snapshot)
            .with(
                "advice",
                "wait for the save or the fork to end, or delete it",
            ))
    }

    /// A user paused it: it is not to run again by itself.
    pub(in crate::machine) fn hold_for_user(&self) {
        self.shared.change(|view| {
            if let Some(held) = &mut view.held {
                held.resume = false;
            }
        });
    }
}
