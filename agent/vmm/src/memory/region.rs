//! The memory of one slot: a backing and its two views.

use std::{io, sync::Arc};

use slat_proto::model::PAGE_SIZE;

use super::{
    backing::Backing,
    view::{GuestView, HostView},
};

/// Both views of one backing. A clone is the same memory.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    backing: Arc<Backing>,
    guest: Arc<GuestView>,
    host: Arc<HostView>,
}

impl Region {
    /// `pages` pages of zeroes, not yet populated. `name` shows in /proc.
    ///
    /// # Errors
    /// When the kernel refuses the backing or a mapping of it.
    pub(crate) fn new(name: &str, pages: u64) -> io::Result<Self> {
        let backing = Arc::new(Backing::new(name, pages)?);
        Ok(Self {
            guest: Arc::new(GuestView::new(&backing)?),
            host: Arc::new(HostView::new(&backing)?),
            backing,
        })
    }

    /// See [`SlotMemory::populate`](super::SlotMemory::populate).
    pub(super) fn populate(&self, page: u64, pages: u64) -> io::Result<()> {
        if self.backing.allocate(page * PAGE_SIZE, pages * PAGE_SIZE)? {
            self.guest.map(page, pages)?;
        } else {
            self.guest.populate(page, pages)?;
        }
        self.host.map(page, pages)
    }

    /// What the guest's slot maps.
    #[must_use]
    pub(crate) fn guest(&self) -> &Arc<GuestView> {
        &self.guest
    }

    /// What our own threads use.
    #[must_use]
    pub(crate) fn host(&self) -> &HostView {
        &self.host
    }
}
