//! A slot as the MMU uses it.
//!
//! Immutable and shared: to change a slot is to put a new value into the set. Its dirty bitmap and
//! its huge-page permissions are atomic or locked by themselves, and survive changes of flags.

use alloc::sync::Arc;

use super::{
    bitmap::DirtyBitmap,
    huge::HugePermission,
    spec::{SlotFlags, SlotSpec},
};
use crate::addr::{Gfn, Pfn};

/// A slot as the MMU uses it.
#[derive(Clone, Debug)]
pub(crate) struct Memslot {
    pub(crate) spec: SlotSpec,
    /// Present exactly while `LOG_DIRTY` is set.
    pub(crate) dirty: Option<Arc<DirtyBitmap>>,
    /// Where huge mappings are forbidden.
    pub(crate) huge: Arc<HugePermission>,
    /// About to go: nothing may be mapped.
    pub(crate) invalid: bool,
}

impl Memslot {
    pub(crate) fn new(spec: SlotSpec, dirty: Option<Arc<DirtyBitmap>>) -> Self {
        Self {
            spec,
            dirty,
            huge: Arc::default(),
            invalid: false,
        }
    }

    #[inline(always)]
    pub(crate) fn is_readonly(&self) -> bool {
        self.spec.flags.contains(SlotFlags::READONLY)
    }

    #[inline(always)]
    pub(crate) fn contains(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.spec.base_gfn.0) < self.spec.npages
    }

    #[inline(always)]
    pub(crate) fn pfn(&self, gfn: Gfn) -> Pfn {
        Pfn(self.spec.host_base_pfn.0 + (gfn.0 - self.spec.base_gfn.0))
    }

    /// Marks `gfn`, a frame of the slot, as written, if the slot logs writes.
    #[inline(always)]
    pub(crate) fn mark_dirty(&self, gfn: Gfn) {
        if let Some(dirty) = &self.dirty {
            dirty.set(gfn.0 - self.spec.base_gfn.0);
        }
    }

    /// [`SlotSpec::fits_leaf`].
    pub(crate) fn allows_span(&self, gfn: Gfn, span: u64) -> bool {
        self.spec.fits_leaf(gfn, span)
    }
}
