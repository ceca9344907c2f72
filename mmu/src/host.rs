//! What the MMU asks of whoever runs it, besides memory for tables.
//!
//! *Locking*: [`Host::flush`] is called with the MMU lock held, shared or exclusive. It may wait
//! for vCPUs to leave the guest or to acknowledge, so a vCPU must do either without calling into
//! the MMU; it may not call into it itself. [`ExternalTables`] has rules of its own (`external`).

use alloc::sync::Arc;

use crate::{
    addr::{Gfn, Level},
    external::ExternalTables,
    flush::FlushRequest,
    slot::SlotSpec,
};

/// What the host does for the MMU.
pub trait Host: Send + Sync {
    /// Carries out a TLB flush: when it returns, no vCPU uses a translation that `request` covers,
    /// and for [`Flush::All`](crate::Flush::All) each vCPU asks for its root again before it enters
    /// the guest.
    ///
    /// The entries were stored before the call, with release order, which makes a walker that sees
    /// a pointer see the table behind it; it does not make the stores arrive at a walker. What does
    /// is this function's first step where the architecture asks for one (arm64: `DSB ISHST`;
    /// RISC-V: `FENCE rw, rw` before another hart is asked).
    fn flush(&self, request: &FlushRequest);

    /// The size of the host's own mapping behind `gfn`, a frame of `slot`: no coarser mapping is
    /// made. Called under the MMU lock for each fault that could be huge; without a lock of its
    /// own, please.
    fn mapping_level(&self, slot: &SlotSpec, gfn: Gfn) -> Level {
        let _ = (slot, gfn);
        Level::SIZE_256T
    }

    /// Who keeps the real tables that mirror roots stand for. `None`: there are no mirror roots.
    fn external(&self) -> Option<&dyn ExternalTables> {
        None
    }
}

/// A host without TLBs: tables that nobody walks but through the MMU.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTlb;

impl Host for NoTlb {
    fn flush(&self, _: &FlushRequest) {}
}

impl<T: Host + ?Sized> Host for Arc<T> {
    fn flush(&self, request: &FlushRequest) {
        (**self).flush(request);
    }

    fn mapping_level(&self, slot: &SlotSpec, gfn: Gfn) -> Level {
        (**self).mapping_level(slot, gfn)
    }

    fn external(&self) -> Option<&dyn ExternalTables> {
        (**self).external()
    }
}
