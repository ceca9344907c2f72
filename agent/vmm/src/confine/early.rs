//! What a VM process opens before it is confined, and cannot open afterwards: userfaultfd.
//!
//! The descriptor is of the process's address space, so it is worth nothing to anybody who cannot
//! have this process's memory anyway. It is kept here until the machine takes it.

use std::sync::{Mutex, PoisonError};

use slat_paging::uffd::{Offer, OpenError, Uffd};

/// A descriptor and what it can do, or why there is none.
pub(crate) type Opened = Result<(Uffd, Offer), OpenError>;

static OPENED: Mutex<Option<Opened>> = Mutex::new(None);

/// Opens it. Once, before there is a second thread.
pub(super) fn open() {
    *OPENED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Uffd::open());
}

/// The one that was opened before; a new one where the process is not confined.
pub(crate) fn userfaultfd() -> Opened {
    let before = OPENED.lock().unwrap_or_else(PoisonError::into_inner).take();
    before.unwrap_or_else(Uffd::open)
}
