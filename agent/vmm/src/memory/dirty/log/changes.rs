//! Changes of what a slot is or holds, as the dirty log sees them: each is made under the log's
//! lock, so that none falls between a harvest and what the harvest was for.

use slat_proto::{ApiError, model::SlotSpec};

use super::{DirtyLog, slot::SlotLog};
use crate::memory::dirty::source::DirtyError;

impl DirtyLog {
    /// Adds a slot by `add`, with logging when there are readers; `remove` takes it back when it
    /// cannot be logged.
    ///
    /// # Errors
    /// Theirs, or the source's; the slot is then not there.
    pub(crate) fn add_slot<E: From<DirtyError> + std::fmt::Display>(
        &self,
        spec: SlotSpec,
        add: impl FnOnce() -> Result<(), E>,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        add()?;
        let mut log = SlotLog::new(spec.base_gfn, spec.pages);
        let source = inner.source.clone();
        if let Some(source) = source.filter(|_| !inner.cursors.is_empty())
            && let Err(error) = log.log_on(&*source, spec.slot, false)
        {
            if let Err(error) = remove() {
                tracing::error!(%error, slot = spec.slot, "a slot that could not be logged stays");
            }
            return Err(error.into());
        }
        let logs = log.logging;
        inner.slots.insert(spec.slot, log);
        inner.all_dirty(spec);
        // To look at every slot for each of a thousand that come would take its time.
        if logs {
            self.note(&inner);
        }
        Ok(())
    }

    /// Takes a slot away by `remove`, and from every cursor.
    ///
    /// # Errors
    /// Those of `remove`; the slot is then still there.
    pub(crate) fn remove_slot<E>(
        &self,
        slot: u32,
        remove: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        remove()?;
        let log = inner.slots.remove(&slot);
        for cursor in inner.cursors.values_mut() {
            cursor.forget(slot);
        }
        if log.is_some_and(|log| log.logging) {
            self.note(&inner);
        }
        Ok(())
    }

    /// Moves a slot by `move_there`; its frames at the new place are dirty for every cursor.
    ///
    /// # Errors
    /// Those of `move_there`; the slot is then where it was.
    pub(crate) fn move_slot<E>(
        &self,
        spec: SlotSpec,
        move_there: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        move_there()?;
        if let Some(log) = inner.slots.get_mut(&spec.slot) {
            log.base_gfn = spec.base_gfn;
        }
        inner.all_dirty(spec);
        Ok(())
    }

    /// Has a slot made anew with the same contents by `make`, which may lose what the source noted
    /// in it: that is harvested first, so that every reader keeps exactly the pages that it has yet
    /// to be told. Nobody may write to the slot meanwhile: the vCPUs are stopped. Logging goes on
    /// as it was.
    ///
    /// # Errors
    /// Those of the harvest, and `make` is not called; or those of `make`. `lost` says of such an
    /// error whether the slot is gone, and then it is gone for every reader too.
    pub(crate) fn remake_slot<E: Into<ApiError>>(
        &self,
        slot: u32,
        make: impl FnOnce() -> Result<(), E>,
        lost: impl FnOnce(&E) -> bool,
    ) -> Result<(), ApiError> {
        let mut inner = self.lock();
        if inner.slots.get(&slot).is_some_and(|log| log.logging) {
            self.pull(&mut inner)?;
        }
        let made = make();
        if made.as_ref().is_err_and(lost) {
            inner.slots.remove(&slot);
            for cursor in inner.cursors.values_mut() {
                cursor.forget(slot);
            }
            self.note(&inner);
        }
        made.map_err(Into::into)
    }

    /// Changes pages `[first, first + pages)` of a slot by `change`, on behalf of the host: they
    /// are dirty for every reader, also when it fails. A harvest has either what was there before
    /// or the mark.
    ///
    /// # Errors
    /// Those of `change`.
    pub(crate) fn written_by_host<E>(
        &self,
        slot: u32,
        first: u64,
        pages: u64,
        change: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut inner = self.lock();
        let changed = change();
        let Some(all) = inner.slots.get(&slot).map(|log| log.pages) else {
            return changed;
        };
        for cursor in inner.cursors.values_mut() {
            cursor.mark(slot, all, first, pages);
        }
        changed
    }
}
