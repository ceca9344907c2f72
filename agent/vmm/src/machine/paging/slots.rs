//! Slots of a watched VM that come, go and move, beside what the backend hears of them.
//!
//! What a pager could not be told of a slot that is gone or has moved is no failure: it is given
//! up, and the next one is told how it is.

use std::sync::Arc;

use slat_proto::ApiError;

use super::super::Machine;
use crate::{memory::SlotMemory, pager::PagerError};

impl Machine {
    /// A slot comes: its view is watched and the pager knows it before the guest can touch it.
    ///
    /// # Errors
    /// The kernel's; PAGER_UNREACHABLE: the slot is not to come.
    pub(in crate::machine) fn slot_comes(&self, memory: &Arc<SlotMemory>) -> Result<(), ApiError> {
        if !self.is_watched() {
            return Ok(());
        }
        let view = memory.guest();
        let watched = if view.is_watched() {
            Ok(())
        } else {
            // What was mapped as it was populated is nothing that the pager knows.
            let watched = self.pager.watcher().watch(view);
            watched.and_then(|()| view.drop_mappings(0, view.pages()))
        };
        watched
            .map_err(PagerError::io("watching memory"))
            .and_then(|()| self.pager.add_memory(memory))
            .map_err(|error| self.paged(error))
    }

    /// A slot is gone, or did not come after all.
    pub(in crate::machine) fn slot_went(&self, slot: u32) {
        if self.is_watched() {
            self.or_another(self.pager.remove_memory(slot));
        }
    }

    /// A slot moved. The vCPUs are stopped.
    pub(in crate::machine) fn slot_moved(&self, memory: &Arc<SlotMemory>) {
        if self.is_watched() {
            self.or_another(self.pager.move_memory(memory));
        }
    }

    /// A slot was made anew with other flags. The vCPUs are stopped.
    pub(in crate::machine) fn slot_remade(&self, memory: &Arc<SlotMemory>) {
        if self.is_watched() {
            let slot = memory.spec().slot;
            self.or_another(self.pager.remove_memory(slot));
            self.or_another(self.pager.add_memory(memory));
        }
    }

    fn or_another(&self, told: Result<(), PagerError>) {
        match told {
            // It is told to stop in a moment.
            Ok(()) | Err(PagerError::Ending) => {}
            Err(error) => {
                tracing::warn!(%error, vm = %self.shared.vm, "its pager is given up");
                self.pager.give_up_pager();
            }
        }
    }
}
