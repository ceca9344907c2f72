//! A slot as the dirty log sees it: where it is, whether it logs, bitmaps to be used again, and
//! which of its pages the source does not protect yet.

use std::sync::Arc;

use slat_proto::ApiError;

use super::super::{
    bitmap::DirtyBitmap,
    source::{DirtyError, DirtySource},
};

/// Bitmaps of a slot that are kept to be used again: what a harvest fills while the last batch is
/// still in use, and one more for a second reader.
const SPARES: usize = 2;
/// Pages that are protected at once, just before the first of them is read: 256 MiB.
pub(crate) const WINDOW: u64 = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(super) struct SlotLog {
    pub(super) base_gfn: u64,
    pub(super) pages: u64,
    pub(super) logging: bool,
    /// While a reader goes over all memory for the first time: what is not protected yet.
    pub(super) unprotected: Option<Unprotected>,
    /// Bitmaps to be used again, once their last reader has let go.
    pub(super) spares: Vec<Arc<DirtyBitmap>>,
}

/// Windows of a slot whose pages are not protected yet. What the guest writes there is logged
/// nowhere: it is read later.
#[derive(Debug)]
pub(super) struct Unprotected {
    windows: Vec<bool>,
    left: usize,
    /// A window that could not be protected. Its pages may have been read by now, so nothing here
    /// may be believed any more.
    failed: Option<ApiError>,
}

impl Unprotected {
    pub(super) fn new(pages: u64) -> Self {
        let left = pages.div_ceil(WINDOW) as usize;
        Self {
            windows: vec![true; left],
            left,
            failed: None,
        }
    }

    /// Protects window `index` of `slot`, which has `pages`, unless that is done.
    fn protect(
        &mut self,
        source: &dyn DirtySource,
        slot: u32,
        pages: u64,
        index: usize,
    ) -> Result<(), ApiError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if !self.windows[index] {
            return Ok(());
        }
        let first = index as u64 * WINDOW;
        if let Err(error) = source.protect(slot, first, WINDOW.min(pages - first)) {
            let error = ApiError::from(error);
            self.failed = Some(error.clone());
            return Err(error);
        }
        self.windows[index] = false;
        self.left -= 1;
        Ok(())
    }
}

impl SlotLog {
    pub(super) fn new(base_gfn: u64, pages: u64) -> Self {
        Self {
            base_gfn,
            pages,
            logging: false,
            unprotected: None,
            spares: Vec::new(),
        }
    }

    /// An empty bitmap.
    pub(super) fn blank(&mut self) -> DirtyBitmap {
        let free = |spare: &mut Arc<DirtyBitmap>| Arc::get_mut(spare).is_some();
        let found = self.spares.iter_mut().position(free);
        let spare = found.and_then(|at| Arc::into_inner(self.spares.swap_remove(at)));
        match spare {
            Some(mut bitmap) => {
                bitmap.clear();
                bitmap
            }
            None => DirtyBitmap::new(self.pages),
        }
    }

    pub(super) fn retire(&mut self, mut bitmap: Arc<DirtyBitmap>) {
        if self.spares.len() < SPARES {
            // Now, not in the next harvest, which may be the blackout's.
            if let Some(bitmap) = Arc::get_mut(&mut bitmap) {
                bitmap.clear();
            }
            self.spares.push(bitmap);
        }
    }

    /// Turns logging on; `whole`: pages are protected as they are read, where the source can.
    pub(super) fn log_on(
        &mut self,
        source: &dyn DirtySource,
        slot: u32,
        whole: bool,
    ) -> Result<(), DirtyError> {
        let lazily = if whole {
            source.begin_dirty_logging(slot)?
        } else {
            source.set_dirty_logging(slot, true)?;
            false
        };
        self.unprotected = lazily.then(|| Unprotected::new(self.pages));
        self.logging = true;
        Ok(())
    }

    pub(super) fn log_off(
        &mut self,
        source: &dyn DirtySource,
        slot: u32,
    ) -> Result<(), DirtyError> {
        source.set_dirty_logging(slot, false)?;
        self.logging = false;
        self.unprotected = None;
        self.spares.clear();
        Ok(())
    }

    /// Protects the windows that pages `[first, first + pages)` are in.
    pub(super) fn protect(
        &mut self,
        source: &dyn DirtySource,
        slot: u32,
        first: u64,
        pages: u64,
    ) -> Result<(), ApiError> {
        let Some(unprotected) = &mut self.unprotected else {
            return Ok(());
        };
        let end = first.saturating_add(pages).min(self.pages);
        for index in first / WINDOW..end.div_ceil(WINDOW) {
            unprotected.protect(source, slot, self.pages, index as usize)?;
        }
        if unprotected.left == 0 {
            self.unprotected = None;
        }
        Ok(())
    }
}
