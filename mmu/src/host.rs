//! What the MMU asks of whoever runs it, besides memory for tables.
//!
//! *Locking*: [`Host::flush`] and [`ExternalTables`] are called with the MMU lock held, shared or
//! exclusive. They may wait for vCPUs to leave the guest or to acknowledge, so a vCPU must do
//! either without calling into the MMU; they may not call into it themselves.

use alloc::sync::Arc;

use crate::{
    addr::{Gfn, Level, Pfn},
    flush::FlushRequest,
    format::Leaf,
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

/// The external owner refused a change. The entry is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// The owner of the tables that a mirror root stands for: firmware that keeps a confidential
/// guest's tables, or a kernel whose mappings user space steers.
///
/// Each change of a mirror is carried out here while the mirror's entry is frozen, and takes effect
/// in the mirror only if the owner accepted it. Mappings are 4 KiB and are only ever made (under
/// the shared lock) or removed (under the exclusive one), never changed in place.
pub trait ExternalTables: Send + Sync {
    /// Maps `gfn` as `leaf` says.
    ///
    /// # Errors
    /// The mapping is not made and the fault retries.
    fn set_leaf(&self, gfn: Gfn, leaf: &Leaf) -> Result<(), Refused>;

    /// Makes a table of `level` for the frames from `gfn` on. `table` is the mirror's own table:
    /// the two stand for each other.
    ///
    /// # Errors
    /// The table is not made and the fault retries.
    fn link_table(&self, gfn: Gfn, level: Level, table: Pfn) -> Result<(), Refused>;

    /// Removes the mapping of `gfn` to `pfn`. Its translations are gone when it returns.
    ///
    /// # Errors
    /// The mapping stays, in the mirror too, and its memory must not be reused.
    fn remove_leaf(&self, gfn: Gfn, pfn: Pfn) -> Result<(), Refused>;

    /// Gives back the empty table made for `table`.
    ///
    /// # Errors
    /// The owner keeps it; so does the MMU, which leaks its own.
    fn free_table(&self, gfn: Gfn, level: Level, table: Pfn) -> Result<(), Refused>;
}
