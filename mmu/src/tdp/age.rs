//! Ageing: has the guest used a page since we last asked?
//!
//! Clearing an Accessed bit owes no flush: a TLB that still holds the entry hides later uses, so a page may look idle
//! that is not. Ageing is a hint and may be wrong in that direction.
//!
//! *Locking*: the MMU lock. *Roots*: the valid one.

use super::TdpMmu;
use crate::{
    addr::{GfnRange, Level},
    format::Format,
    table::memory::TableMemory,
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Clears the Accessed bits over `range`; whether any was set.
    pub(super) fn do_age(&self, range: GfnRange) -> bool {
        self.locked(|_, guard| {
            let Some(mut iter) = self.iter(guard, range, Level::SIZE_4K) else {
                return false;
            };
            let mut young = false;
            while iter.advance() {
                while F::is_accessed(iter.old(), iter.level()) {
                    young = true;
                    // Fails only if hardware set D meanwhile; the snapshot is new then.
                    let _ = iter.replace(F::with_accessed(iter.old(), false));
                }
            }
            young
        })
    }

    /// Whether any Accessed bit over `range` is set.
    pub(super) fn do_test_age(&self, range: GfnRange) -> bool {
        self.locked(|_, guard| {
            let Some(mut iter) = self.iter(guard, range, Level::SIZE_4K) else {
                return false;
            };
            while iter.advance() {
                if F::is_accessed(iter.old(), iter.level()) {
                    return true;
                }
            }
            false
        })
    }
}
