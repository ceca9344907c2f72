//! What our own threads read of memory whose pages come from a source: it is brought before.
//!
//! They use the host view, which nobody watches, so they would find zeroes where a page is not yet
//! there. What reads all of memory has all of it brought; what cannot wait is refused until it is.

use std::time::Duration;

use slat_paging::wire::Ask;
use slat_proto::{ApiError, Reason};

use super::super::Machine;

/// What is asked of a range is answered within this.
const PATIENCE: Duration = Duration::from_secs(60);

impl Machine {
    /// Has all pages brought that are not there. The control lock is not held.
    ///
    /// # Errors
    /// PAGER_UNREACHABLE, PAGE_SOURCE_STALLED and the source's.
    pub(in crate::machine) fn load_source(&self, patience: Duration) -> Result<(), ApiError> {
        if !self.pager.has_source() {
            return Ok(());
        }
        let loaded = self.pager.load_all(patience);
        loaded.map_err(|error| self.paged(error))?;
        self.source_is_here();
        Ok(())
    }

    /// All of the source is there: nothing is left of it.
    pub(super) fn source_is_here(&self) {
        self.pager.settle_source();
        self.watching().set_source(None);
    }

    /// Refuses `what` while pages are still to come.
    ///
    /// # Errors
    /// VM_STATE.
    pub(in crate::machine) fn refuse_unloaded(&self, what: &str) -> Result<(), ApiError> {
        if !self.pager.has_source() {
            return Ok(());
        }
        let (vm, shown) = (&self.shared.vm, self.pager.shown());
        let (there, all) = shown.progress;
        let words = format!("{vm} cannot {what}: {there} of {all} pages of its source are here");
        Err(ApiError::new(Reason::VmState, words)
            .with("vm", vm)
            .with("state", self.shared.view().state.as_str_name())
            .with("loaded_pages", there)
            .with("source_pages", all)
            .with(
                "advice",
                "they come by themselves: wait until Vm.paging shows all of them, then try again",
            ))
    }

    /// Whether its memory is watched now.
    pub(in crate::machine) fn is_watched(&self) -> bool {
        self.watching().is_on()
    }

    /// Has its pager do something to a range.
    ///
    /// # Errors
    /// PAGER_UNREACHABLE and the pager's.
    pub(in crate::machine) fn ask_pager(&self, ask: Ask) -> Result<(), ApiError> {
        let asked = self.pager.ask(ask, PATIENCE);
        asked.map(drop).map_err(|error| self.paged(error))
    }
}
