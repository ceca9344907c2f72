//! The MMU lock.
//!
//! Faults hold it *shared*, by a mark in their own cell: two faults on two processors write no
//! common cache line. Zaps hold it *exclusive*: the locker raises a flag and waits until no cell is
//! marked.
//!
//! *Fairness*: who finds the flag raised takes its mark back and waits, counted. The next exclusive
//! locker lets those who wait go first, so neither side starves. *Contention* can be asked about
//! by both sides, for long operations to yield.
//!
//! *Order*: dropping either kind is a release, taking either an acquire: who holds the lock sees
//! all that was done under it before in a mode that excludes its own.

use alloc::sync::Arc;

use super::{
    cell::Cell,
    participants::{Inside, Participants},
};
use crate::sync::{
    Acquire, AtomicBool, AtomicUsize, Backoff, Mutex, MutexGuard, Relaxed, Release, SeqCst, fence,
};

#[derive(Debug)]
pub(crate) struct MmuLock {
    participants: Arc<Participants>,
    /// Someone holds the lock exclusive, or is about to.
    exclusive: AtomicBool,
    /// Shared lockers that found the flag raised.
    shared_waiting: AtomicUsize,
    /// Exclusive lockers that have not got it yet.
    exclusive_waiting: AtomicUsize,
    /// One exclusive locker at a time.
    turn: Mutex<()>,
}

/// The lock is held exclusive until this is dropped.
#[derive(Debug)]
pub(crate) struct Exclusive<'a> {
    lock: &'a MmuLock,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.lock.exclusive.store(false, Release);
    }
}

impl MmuLock {
    pub(crate) fn new(participants: Arc<Participants>) -> Self {
        Self {
            participants,
            exclusive: AtomicBool::new(false),
            shared_waiting: AtomicUsize::new(0),
            exclusive_waiting: AtomicUsize::new(0),
            turn: Mutex::new(()),
        }
    }

    /// Takes the lock shared; the participant is in a read section as well.
    #[inline(always)]
    pub(crate) fn shared<'a>(&self, cell: &'a Cell) -> Inside<'a> {
        debug_assert!(
            cell.is_of(self.participants.id()),
            "a participant of another set"
        );
        loop {
            cell.share(self.participants.era());
            if !self.exclusive.load(Acquire) {
                return Inside::new(cell);
            }
            self.stand_back(cell);
        }
    }

    #[cold]
    fn stand_back(&self, cell: &Cell) {
        cell.leave();
        self.shared_waiting.fetch_add(1, Relaxed);
        let mut backoff = Backoff::default();
        while self.exclusive.load(Acquire) {
            backoff.wait();
        }
        self.shared_waiting.fetch_sub(1, Relaxed);
    }

    /// Takes the lock exclusive. The caller must not hold it shared.
    pub(crate) fn exclusive(&self) -> Exclusive<'_> {
        self.exclusive_waiting.fetch_add(1, Relaxed);
        let turn = self.turn.lock();
        let mut backoff = Backoff::default();
        // The flag is down, so nobody joins those who wait.
        while self.shared_waiting.load(Relaxed) > 0 {
            backoff.wait();
        }
        self.exclusive.store(true, Relaxed);
        fence(SeqCst);
        self.participants.wait_for(Cell::is_shared);
        self.exclusive_waiting.fetch_sub(1, Relaxed);
        Exclusive {
            lock: self,
            _turn: turn,
        }
    }

    /// Whether someone waits for a shared holder to leave.
    #[inline(always)]
    pub(crate) fn shared_is_contended(&self) -> bool {
        self.exclusive.load(Relaxed)
    }

    /// Whether someone waits for the exclusive holder to leave.
    #[inline(always)]
    pub(crate) fn exclusive_is_contended(&self) -> bool {
        self.shared_waiting.load(Relaxed) > 0 || self.exclusive_waiting.load(Relaxed) > 0
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn sharers_and_excluders_never_meet() {
        let participants = Participants::new();
        let lock = MmuLock::new(Arc::clone(&participants));
        let value = Mutex::new((0u64, 0u64));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let reader = participants.reader_slot();
                    for _ in 0..20_000 {
                        let _inside = lock.shared(&reader);
                        let pair = value.lock();
                        assert_eq!(pair.0, pair.1);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let _exclusive = lock.exclusive();
                        value.lock().0 += 1;
                        thread::yield_now();
                        value.lock().1 += 1;
                    }
                });
            }
        });
        assert_eq!(*value.lock(), (4_000, 4_000));
    }
}
