//! Huge pages in the background: when they may be made, or looked at.
//!
//! Not while the VM migrates or its writes are logged: the second stage maps 4 KiB then whatever
//! the memory is made of, and a block that is made one page loses its mappings for a moment.

use std::sync::PoisonError;

use super::{
    Machine,
    view::{Participation, State},
};

impl Machine {
    /// Goes on making huge pages of memory that the guest touched, for a bounded time.
    pub(crate) fn make_huge_pages(&self) {
        let view = self.shared.view();
        let settled = matches!(view.participation, Participation::None)
            && matches!(view.state, State::Created | State::Running | State::Paused);
        if !settled || self.dirty.enabled() {
            return;
        }
        let mut collapser = self
            .collapser
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        collapser.step(&self.memory.table());
    }
}
