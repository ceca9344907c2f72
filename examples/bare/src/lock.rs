//! A spin lock: the one thing the rest needs that core does not have.
//!
//! *Locking*: held for the length of a closure, so it cannot be forgotten; a closure takes no
//! second lock. An interrupt handler that takes one must not interrupt its holder: mask interrupts
//! around [`Lock::with`] where there are any.

use core::{
    cell::UnsafeCell,
    fmt, hint,
    sync::atomic::{AtomicBool, Ordering},
};

/// A value that one CPU at a time looks at.
pub(crate) struct Lock<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `with` lets one CPU at the value at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// An open lock.
    pub(crate) const fn new(value: T) -> Self {
        Self {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock and looks at the value.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        while self.taken.swap(true, Ordering::Acquire) {
            hint::spin_loop();
        }
        // SAFETY: `taken` was false and is true now, so nobody else is here.
        let result = look(unsafe { &mut *self.value.get() });
        // A panic does not come here; it does not come anywhere again.
        self.taken.store(false, Ordering::Release);
        result
    }
}

impl<T> fmt::Debug for Lock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock").finish_non_exhaustive()
    }
}
