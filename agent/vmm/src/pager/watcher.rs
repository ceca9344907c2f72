//! The process's userfaultfd, which was opened before the process was confined; or why there is
//! none.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use slat_paging::uffd::{Offer, Uffd, Watch};

use crate::{
    confine,
    memory::{GuestView, SlotTable},
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Watcher(Result<(Uffd, Offer), String>);

impl Watcher {
    /// What the process opened.
    pub(crate) fn open() -> Self {
        Self(confine::userfaultfd().map_err(|error| error.to_string()))
    }

    /// None, and why.
    #[cfg(test)]
    pub(crate) fn none(why: &str) -> Self {
        Self(Err(why.to_owned()))
    }

    /// What it can do.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn offer(&self) -> Result<Offer, &str> {
        match &self.0 {
            Ok((_, offer)) => Ok(*offer),
            Err(why) => Err(why),
        }
    }

    /// Has faults of a view told.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn watch(&self, view: &GuestView) -> io::Result<()> {
        let (uffd, offer) = self
            .0
            .as_ref()
            .map_err(|why| io::Error::other(why.as_str()))?;
        let mut watch = Watch::MISSING | Watch::MINOR;
        watch.set(Watch::PROTECTED, offer.protect);
        view.watch(uffd, watch)
    }

    /// The same for all slots, or none.
    ///
    /// # Errors
    /// The kernel's; then none is watched.
    pub(crate) fn watch_all(&self, table: &SlotTable) -> io::Result<()> {
        for slot in table.slots() {
            if let Err(error) = self.watch(slot.guest()) {
                self.unwatch_all(table);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Ends it for all slots. A view that the kernel keeps watching is said in the log: its
    /// guest's next fault there waits for a pager.
    pub(crate) fn unwatch_all(&self, table: &SlotTable) {
        let Ok((uffd, _)) = &self.0 else { return };
        for slot in table.slots() {
            if let Err(error) = slot.guest().unwatch(uffd) {
                tracing::error!(%error, slot = slot.spec().slot, "memory stays watched");
            }
        }
    }

    /// Has whoever waits in a view try again.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn wake(&self, view: &GuestView) -> io::Result<()> {
        match &self.0 {
            Ok((uffd, _)) => uffd.wake(view.address(), view.pages() * slat_paging::PAGE as u64),
            Err(_) => Ok(()),
        }
    }

    /// For a pager.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().ok().map(|(uffd, _)| uffd.as_fd())
    }
}
