//! Huge pages in the background: when they may be made, or looked at.
//!
//! Not while the VM migrates or its writes are logged: the second stage maps 4 KiB then whatever
//! the memory is made of, and a block that is made one page loses its mappings for a moment.

use std::sync::{PoisonError, TryLockError};

use super::{
    Machine,
    view::{Participation, State},
};

impl Machine {
    /// Goes on making huge pages of memory that the guest touched, for a bounded time. Not while
    /// pages are discarded: whoever calls this has other things to do than to wait for that.
    pub(crate) fn make_huge_pages(&self) {
        let mut collapser = match self.collapser.try_lock() {
            Ok(collapser) => collapser,
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => return,
        };
        let view = self.shared.view();
        let settled = matches!(view.participation, Participation::None)
            && matches!(view.state, State::Created | State::Running | State::Paused);
        if settled && !self.dirty.enabled() {
            collapser.step(&self.memory.table());
        }
    }
}
