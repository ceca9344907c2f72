//! Slots of a watched VM that come, go and move: what its pager hears of it, and when.
//!
//! A slot that comes is known to the pager before the guest can touch it; one that goes is gone
//! for the guest before the pager lets go of it.

use std::{sync::Arc, time::Duration};

use slat_paging::wire::Ask;

use super::{
    desk::Pager,
    error::PagerError,
    state::{Stage, tell_memory},
};
use crate::memory::SlotMemory;

/// A pager answers about a slot within this.
const PATIENCE: Duration = Duration::from_secs(10);

impl Pager {
    /// A slot comes, whose view is watched. When this returns the pager knows it.
    ///
    /// # Errors
    /// `Unreachable`, `Failed`: the pager is not to know it.
    pub(crate) fn add_memory(&self, memory: &Arc<SlotMemory>) -> Result<(), PagerError> {
        let mut inner = self.lock();
        let number = inner.put_memory(memory);
        let watched = inner.work.as_ref().is_some_and(|work| work.watched);
        if let Some(link) = inner.linked(Stage::SetUp) {
            let told = tell_memory(&link.socket, number, memory, watched)
                .and_then(|()| inner.tell_kept(&link.socket, number, &memory.file(), None));
            if let Err(error) = told {
                tracing::warn!(%error, "a pager is not told of a slot");
                link.socket.close();
            }
        }
        self.done(inner);
        // What is asked of mappings is answered after what was said before of memories.
        let gfn = memory.spec().base_gfn;
        let known = self.ask(Ask::Mapped { gfn, pages: 1 }, PATIENCE);
        if known.is_err() {
            let mut inner = self.lock();
            inner.memories.remove(&number);
            self.done(inner);
        }
        known.map(drop)
    }

    /// A slot is gone.
    ///
    /// # Errors
    /// `Unreachable`, `Failed`. It is forgotten all the same.
    pub(crate) fn remove_memory(&self, slot: u32) -> Result<(), PagerError> {
        let Some(memory) = self.lock().memory_of(slot) else {
            return Ok(());
        };
        let removed = self.ask(Ask::Remove { memory }, PATIENCE);
        let mut inner = self.lock();
        inner.memories.remove(&memory);
        self.done(inner);
        removed.map(drop)
    }

    /// A slot moved. The vCPUs are stopped.
    ///
    /// # Errors
    /// `Unreachable`, `Failed`: a pager to come knows the new place.
    pub(crate) fn move_memory(&self, moved: &Arc<SlotMemory>) -> Result<(), PagerError> {
        let spec = moved.spec();
        let mut inner = self.lock();
        let Some(memory) = inner.memory_of(spec.slot) else {
            return Ok(());
        };
        inner.memories.insert(memory, Arc::clone(moved));
        self.done(inner);
        let base_gfn = spec.base_gfn;
        self.ask(Ask::Move { memory, base_gfn }, PATIENCE).map(drop)
    }
}
