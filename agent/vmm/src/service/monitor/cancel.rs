//! How a call that takes long learns that its caller went away.
//!
//! The handler keeps a [`CancelOnDrop`]; gRPC drops the handler when its caller leaves. The call,
//! on a blocking thread, waits by [`Cancel::wait`] and so ends within one of its own steps.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Says to a call that nobody waits for it.
#[derive(Debug, Default)]
pub(crate) struct Cancel {
    cancelled: Mutex<bool>,
    told: Condvar,
}

impl Cancel {
    /// Waits for so long, or until the call is cancelled: then true.
    pub(crate) fn wait(&self, duration: Duration) -> bool {
        let cancelled = self
            .cancelled
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (cancelled, _) = self
            .told
            .wait_timeout_while(cancelled, duration, |cancelled| !*cancelled)
            .unwrap_or_else(PoisonError::into_inner);
        *cancelled
    }
}

/// Cancels when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct CancelOnDrop(pub(crate) Arc<Cancel>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        *self
            .0
            .cancelled
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.0.told.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Instant};

    use super::*;

    #[test]
    fn a_wait_ends_when_the_handler_is_dropped() {
        let handler = CancelOnDrop::default();
        let cancel = Arc::clone(&handler.0);
        assert!(!cancel.wait(Duration::from_millis(1)));
        let begun = Instant::now();
        thread::scope(|scope| {
            let waits = scope.spawn(|| cancel.wait(Duration::from_secs(60)));
            drop(handler);
            assert!(waits.join().unwrap());
        });
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
}
