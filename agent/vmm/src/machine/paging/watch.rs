//! Whether a VM's memory can be watched, and beginning and ending it.
//!
//! Memory that is watched stays where it is: its view is registered, and what is mapped there
//! stays mapped until the pager has swept it. When watching ends the view is the kernel's again,
//! with what is mapped in it, and huge pages are made again.

use std::{
    sync::{MutexGuard, PoisonError},
    time::Duration,
};

use slat_proto::{
    ApiError,
    model::{BackendKind, Paging, VmSpec},
    v1,
};

use super::super::{
    Machine,
    view::{Participation, State, View},
};
use crate::{
    backend::PagedGuest,
    pager::{PagerError, Step, Watching, Work},
};

/// Whoever starts a VM waits so long for its pager.
const START_WAITS: Duration = Duration::from_secs(8);

impl Machine {
    pub(in crate::machine) fn watching(&self) -> MutexGuard<'_, Watching> {
        self.watching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether memory of such a VM could be watched here, as far as is known before it is built.
    ///
    /// # Errors
    /// CAPABILITY_MISSING, and why.
    pub(in crate::machine) fn check_watchable(&self, spec: &VmSpec) -> Result<(), ApiError> {
        let why = match (spec.backend, self.pager.watcher().offer()) {
            _ if spec.backing.reserved_page().is_some() => {
                format!(
                    "memory of pages that the host set aside ({}) cannot be watched",
                    spec.backing
                )
            }
            (Some(BackendKind::Software), _) => {
                "the software backend pages its guests itself".to_owned()
            }
            (_, Err(why)) => why.to_owned(),
            (_, Ok(_)) => return Ok(()),
        };
        let mut error = ApiError::capability_missing(&self.shared.vm, v1::Capability::Paging);
        error.message = format!("{}: {why}", error.message);
        Err(error.with("why", why))
    }

    /// The same of the VM that there is, and what its pager has to know.
    ///
    /// # Errors
    /// CAPABILITY_MISSING, and why.
    pub(in crate::machine) fn watchable(&self, spec: &VmSpec) -> Result<PagedGuest, ApiError> {
        self.check_watchable(spec)?;
        self.built_backend()?.paged().ok_or_else(|| {
            let why = "its backend has no guest that can wait for a pager";
            let error = ApiError::capability_missing(&self.shared.vm, v1::Capability::Paging);
            error.with("why", why)
        })
    }

    /// What a VM can do because its memory can be watched.
    pub(in crate::machine) fn paging_capabilities(&self, spec: &VmSpec) -> Vec<v1::Capability> {
        let protects = self
            .pager
            .watcher()
            .offer()
            .is_ok_and(|offer| offer.protect);
        match self.watchable(spec) {
            Err(_) => Vec::new(),
            Ok(_) if protects => vec![v1::Capability::Paging, v1::Capability::PageProtection],
            Ok(_) => vec![v1::Capability::Paging],
        }
    }

    /// Has all memory watched from now on; `mapped`: the guest may have run before. The caller has
    /// the control lock.
    ///
    /// # Errors
    /// The kernel's; then it is not watched.
    pub(in crate::machine) fn begin_watching(
        &self,
        guest: PagedGuest,
        mapped: bool,
    ) -> Result<(), ApiError> {
        let table = self.memory.table();
        {
            let _collapser = self
                .collapser
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let watched = self.pager.watcher().watch_all(&table);
            watched.map_err(PagerError::io("watching memory"))?;
        }
        self.watching().set_on(true);
        let work = Work {
            guest,
            watched: true,
            mapped,
            // The rest of a file comes while the guest runs. What a fork does not touch stays its
            // parent's, and takes no memory of its own.
            load_all: self.pager.has_source() && !self.pager.is_forked(),
        };
        self.pager.begin(work, table.slots());
        tracing::info!(vm = %self.shared.vm, "memory is watched");
        Ok(())
    }

    /// Ends that. The caller has the control lock.
    pub(in crate::machine) fn end_watching(&self) {
        self.pager.watcher().unwatch_all(&self.memory.table());
        self.watching().set_on(false);
        self.pager.end();
        tracing::info!(vm = %self.shared.vm, "memory is the kernel's again");
    }

    /// The VM ends, or never came to be: nothing is watched any more, whoever waits for a page is
    /// woken, and the pager is told to stop. Then its end is no death, and nobody starts another.
    ///
    /// No vCPU may enter the guest any more: a page that did not come reads as zeroes now.
    pub(in crate::machine) fn end_paging(&self) {
        // First, so that nobody is shown a VM without a pager.
        self.watching().end();
        self.pager.watcher().unwatch_all(&self.memory.table());
        self.pager.finish();
    }

    /// Begins or ends watching where that is due. For the keeper.
    pub(super) fn settle_watching(&self) {
        let due = || {
            let owned = is_owned(&self.shared.view());
            let pager = self.pager.is_connected();
            self.watching().step(owned, pager)
        };
        if due() == Step::Stay {
            return;
        }
        let _control = self.control();
        match due() {
            Step::Stay => {}
            Step::Unwatch => self.end_watching(),
            Step::Watch => {
                let view = self.shared.view();
                let begun = self
                    .shared
                    .identity(&view)
                    .and_then(|identity| self.watchable(&identity.spec))
                    .and_then(|guest| self.begin_watching(guest, true));
                if let Err(error) = begun {
                    tracing::error!(%error, vm = %self.shared.vm, "memory cannot be watched");
                    self.watching().give_up();
                }
            }
        }
        self.shared.change(|_| ());
    }

    /// A new VM whose spec asks for it is watched before it ever runs.
    ///
    /// # Errors
    /// The kernel's; CAPABILITY_MISSING.
    pub(in crate::machine) fn watch_new(&self, spec: &VmSpec) -> Result<(), ApiError> {
        if spec.paging != Paging::Agent {
            return Ok(());
        }
        let guest = self.watchable(spec)?;
        self.watching().by_agent();
        self.begin_watching(guest, false)
    }

    /// Waits for the pager of a VM that is to start. The control lock is not held.
    ///
    /// # Errors
    /// PAGER_UNREACHABLE.
    pub(in crate::machine) fn await_pager(&self) -> Result<(), ApiError> {
        if self.shared.view().state != State::Created || !self.watching().is_on() {
            return Ok(());
        }
        let attached = self.pager.await_attached(START_WAITS);
        attached.map_err(|error| self.paged(error))
    }

    /// What went wrong with the pager, of this VM.
    pub(in crate::machine) fn paged(&self, error: PagerError) -> ApiError {
        ApiError::from(error).with("vm", &self.shared.vm)
    }
}

/// Whether the VM is this process's, to run.
fn is_owned(view: &View) -> bool {
    view.identity.is_some()
        && !matches!(view.participation, Participation::Incoming { .. })
        && matches!(view.state, State::Created | State::Running | State::Paused)
}
