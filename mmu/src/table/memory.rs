//! The host's side of table memory.

use alloc::sync::Arc;
use core::{ptr::NonNull, sync::atomic::AtomicU64};

use crate::addr::Pfn;

/// Where the MMU gets frames for its tables.
///
/// A bare-metal hypervisor answers with RAM that the hardware walker reads; tests and the software backend with an
/// [`Arena`](crate::Arena). Calls come with the MMU's lock held: they must not sleep for long and must not call back
/// into the MMU.
///
/// # Safety
///
/// For as long as the implementing value lives:
///
/// 1. a frame range returned by [`allocate`](Self::allocate) is owned by the caller until [`free`](Self::free), starts
///    at a physical address that is a multiple of its size, and is disjoint from every other such range;
/// 2. for the first frame of such a range, [`entries`](Self::entries) always returns the same pointer, aligned to 8
///    bytes and valid for atomic reads and writes of `bytes / 8` values, initialised to anything;
/// 3. no software but the MMU writes there. Hardware may set Accessed and Dirty bits.
pub unsafe trait TableMemory: Send + Sync {
    /// Takes `bytes` (a power of two, at least 4096) of memory aligned to `bytes`, or `None` if there is none.
    fn allocate(&self, bytes: usize) -> Option<Pfn>;

    /// Gives memory back.
    ///
    /// # Safety
    ///
    /// `pfn` came from [`allocate`](Self::allocate) with the same `bytes`, was not freed since, and neither the caller
    /// nor a hardware walker uses it any more.
    unsafe fn free(&self, pfn: Pfn, bytes: usize);

    /// The entries of a table whose first frame is `pfn`. May panic or return anything for a `pfn` that is not
    /// allocated.
    fn entries(&self, pfn: Pfn) -> NonNull<AtomicU64>;
}

// SAFETY: everything is the inner value's, which lives at least as long as the `Arc`.
unsafe impl<T: TableMemory + ?Sized> TableMemory for Arc<T> {
    fn allocate(&self, bytes: usize) -> Option<Pfn> {
        (**self).allocate(bytes)
    }

    unsafe fn free(&self, pfn: Pfn, bytes: usize) {
        // SAFETY: the caller's promise is the inner value's condition.
        unsafe { (**self).free(pfn, bytes) }
    }

    fn entries(&self, pfn: Pfn) -> NonNull<AtomicU64> {
        (**self).entries(pfn)
    }
}
