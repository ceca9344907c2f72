//! Counting the readers that may still see an unlinked table.
//!
//! A small sleepable-RCU. A reader holds a [`ReadGuard`]; while it does, no table that was linked when the guard was
//! taken is given back to the host. There are two counters, and new readers use the *active* one, so that the other
//! drains even if readers never cease.
//!
//! A reader may be delayed between choosing a counter and incrementing it, so a grace period has passed only when
//! **each** counter was seen at zero after the unlinking. Correctness is Dekker's argument: the reader increments, then
//! (full fence) loads entries; the writer unlinks, then (full fence) loads the counter. Either the writer sees the
//! reader, or the reader no longer sees the table.
//!
//! *Locking*: readers take none. [`Grace`] belongs to the writer, under its own lock.

use core::sync::atomic::{AtomicUsize, Ordering, fence};

#[derive(Debug, Default)]
pub(crate) struct Readers {
    active: AtomicUsize,
    counts: [AtomicUsize; 2],
}

/// Keeps every table that is now reachable from being given back to the host.
///
/// A caller whose TLBs cache *intermediate* entries (paging-structure caches) takes a guard before an operation that
/// may remove tables and drops it after the returned [`Flush`](crate::Flush) has been carried out. This is the kernel's
/// rule "flush before leaving the RCU section".
#[derive(Debug)]
#[must_use = "tables are protected only while the guard lives"]
pub struct ReadGuard<'a> {
    count: &'a AtomicUsize,
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Release);
    }
}

impl Readers {
    pub(crate) fn pin(&self) -> ReadGuard<'_> {
        let count = &self.counts[self.active.load(Ordering::Relaxed) & 1];
        count.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        ReadGuard { count }
    }

    /// A grace period for everything unlinked before this call.
    pub(crate) fn grace(&self) -> Grace {
        fence(Ordering::SeqCst);
        Grace { unseen: 0b11 }
    }

    /// Whether the grace period is over. Steers new readers away from the counter that is still waited for.
    pub(crate) fn poll(&self, grace: &mut Grace) -> bool {
        for (index, count) in self.counts.iter().enumerate() {
            // Acquire pairs with the guard's release: the reader's last loads come before the reuse of the frame.
            if grace.unseen & (1 << index) != 0 && count.load(Ordering::SeqCst) == 0 {
                fence(Ordering::Acquire);
                grace.unseen &= !(1 << index);
            }
        }
        match grace.unseen {
            0b01 => self.active.store(1, Ordering::SeqCst),
            0b10 => self.active.store(0, Ordering::SeqCst),
            _ => {}
        }
        grace.unseen == 0
    }
}

/// A wait for all readers older than itself.
#[derive(Debug)]
pub(crate) struct Grace {
    unseen: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_an_older_reader() {
        let readers = Readers::default();
        let old = readers.pin();
        let mut grace = readers.grace();
        assert!(!readers.poll(&mut grace));
        drop(old);
        assert!(readers.poll(&mut grace));
    }

    #[test]
    fn a_stream_of_new_readers_does_not_starve_the_writer() {
        let readers = Readers::default();
        let old = readers.pin();
        let mut grace = readers.grace();
        assert!(!readers.poll(&mut grace));
        let newer = readers.pin();
        drop(old);
        assert!(
            readers.poll(&mut grace),
            "the newer reader uses the other counter"
        );
        drop(newer);
    }

    #[test]
    fn a_reader_counted_late_on_the_inactive_side_is_waited_for() {
        let readers = Readers::default();
        let first = readers.pin();
        let mut grace = readers.grace();
        assert!(!readers.poll(&mut grace)); // active is now 1
        let second = readers.pin();
        let mut later = readers.grace();
        drop(first);
        assert!(readers.poll(&mut grace));
        assert!(
            !readers.poll(&mut later),
            "second was pinned before `later` began"
        );
        drop(second);
        assert!(readers.poll(&mut later));
    }
}
