//! All participants, and waiting for them.
//!
//! Cells are made as they are needed and kept for the life of the MMU: their counters stay part of
//! the sums when their owner has gone, and the next owner counts on.
//!
//! *Locking*: `cells` is held for a look at the list only, never while waiting.

use alloc::{sync::Arc, vec::Vec};
use core::ops::Deref;

use super::cell::Cell;
use crate::sync::{Acquire, AtomicU64, Backoff, Mutex, SeqCst, fence};

#[derive(Debug)]
pub(crate) struct Participants {
    cells: Mutex<Cells>,
    /// Moves on with each unlinking.
    era: AtomicU64,
}

#[derive(Debug)]
struct Cells {
    all: Vec<Arc<Cell>>,
    free: Vec<Arc<Cell>>,
}

/// A cell that nobody else owns; it goes back when dropped.
#[derive(Debug)]
pub(crate) struct ReaderSlot<P: Deref<Target = Participants> = Arc<Participants>> {
    cell: Arc<Cell>,
    participants: P,
}

impl<P: Deref<Target = Participants>> Deref for ReaderSlot<P> {
    type Target = Cell;

    #[inline(always)]
    fn deref(&self) -> &Cell {
        &self.cell
    }
}

impl<P: Deref<Target = Participants>> Drop for ReaderSlot<P> {
    fn drop(&mut self) {
        self.participants
            .cells
            .lock()
            .free
            .push(Arc::clone(&self.cell));
    }
}

/// The participant is inside until this is dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a Cell);

impl<'a> Inside<'a> {
    pub(super) fn new(cell: &'a Cell) -> Self {
        Self(cell)
    }

    #[inline(always)]
    pub(super) fn is_of(&self, participants: usize) -> bool {
        self.0.is_of(participants)
    }
}

impl Drop for Inside<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Participants {
    pub(crate) fn new() -> Arc<Self> {
        #[cfg(feature = "shuttle")]
        crate::sync::forget_steps();
        Arc::new(Self {
            cells: Mutex::new(Cells {
                all: Vec::new(),
                free: Vec::new(),
            }),
            era: AtomicU64::new(0),
        })
    }

    /// Distinguishes sets of participants for as long as they live.
    #[inline(always)]
    pub(super) fn id(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }

    /// A cell for a new participant.
    pub(crate) fn reader_slot(self: &Arc<Self>) -> ReaderSlot {
        ReaderSlot {
            cell: self.free_cell(),
            participants: Arc::clone(self),
        }
    }

    /// The same for one look, which is over before the MMU is: it counts no reference.
    pub(crate) fn brief_reader_slot(&self) -> ReaderSlot<&Self> {
        ReaderSlot {
            cell: self.free_cell(),
            participants: self,
        }
    }

    fn free_cell(&self) -> Arc<Cell> {
        let mut cells = self.cells.lock();
        cells.free.pop().unwrap_or_else(|| {
            let cell = Arc::new(Cell::new(self.id()));
            cells.all.push(Arc::clone(&cell));
            cell
        })
    }

    #[inline(always)]
    pub(super) fn era(&self) -> u64 {
        self.era.load(Acquire)
    }

    /// Enters a read section: what is reachable from here on is not freed before it ends.
    #[inline(always)]
    pub(crate) fn pin<'a>(&self, cell: &'a Cell) -> Inside<'a> {
        debug_assert!(cell.is_of(self.id()), "a participant of another set");
        cell.pin(self.era());
        Inside(cell)
    }

    /// Ends the era, and returns its number: what was unlinked before this call is unseen when
    /// [`is_over`](Self::is_over) says so of that number.
    pub(crate) fn end_era(&self) -> u64 {
        fence(SeqCst);
        self.era.fetch_add(1, SeqCst)
    }

    /// Whether nobody is inside since `era` or longer.
    pub(crate) fn is_over(&self, era: u64) -> bool {
        fence(SeqCst);
        let cells = self.cells.lock();
        !cells.all.iter().any(|cell| cell.is_inside_since(era))
    }

    /// Waits until nobody is inside who was when this began. The caller must not be inside itself.
    pub(crate) fn synchronize(&self) {
        let era = self.end_era();
        fence(SeqCst);
        self.wait_for(|cell| cell.is_inside_since(era));
    }

    /// Waits until `busy` is false, once, of each cell.
    pub(super) fn wait_for(&self, busy: impl Fn(&Cell) -> bool) {
        // The usual case is that nobody is. The lock is not held while waiting: who is waited for
        // may need it.
        let waiting: Vec<_> = {
            let cells = self.cells.lock();
            cells
                .all
                .iter()
                .filter(|cell| busy(cell))
                .map(Arc::clone)
                .collect()
        };
        for cell in waiting {
            let mut backoff = Backoff::default();
            while busy(&cell) {
                backoff.wait();
            }
        }
    }

    /// Sums a figure over all participants there ever were.
    pub(crate) fn sum(&self, figure: impl Fn(&Cell) -> u64) -> u64 {
        let cells = self.cells.lock();
        cells
            .all
            .iter()
            .fold(0, |sum, cell| sum.wrapping_add(figure(cell)))
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn a_grace_period_waits_for_older_readers_and_for_no_newer_ones() {
        let participants = Participants::new();
        let (old, new) = (participants.reader_slot(), participants.reader_slot());
        let reader = participants.pin(&old);
        let era = participants.end_era();
        assert!(!participants.is_over(era));
        let _newer = participants.pin(&new);
        assert!(!participants.is_over(era));
        drop(reader);
        assert!(participants.is_over(era), "the newer reader cannot see it");
    }

    #[test]
    fn reader_slots_are_used_again_and_keep_their_counts() {
        use super::super::cell::Counter;
        let participants = Participants::new();
        for _ in 0..3 {
            participants.reader_slot().count(Counter::Fixed, 2);
        }
        assert_eq!(participants.cells.lock().all.len(), 1);
        assert_eq!(participants.sum(|cell| cell.counted(Counter::Fixed)), 6);
        assert!(participants.reader_slot().is_idle());
    }

    /// The end of the inner section would end the outer one.
    #[test]
    #[cfg(debug_assertions)]
    fn a_participant_that_goes_inside_twice_is_caught() {
        use std::panic::{AssertUnwindSafe, catch_unwind};

        use super::super::lock::MmuLock;

        let participants = Participants::new();
        let lock = MmuLock::new(Arc::clone(&participants));
        let reader = participants.reader_slot();
        let caught = |enter: &dyn Fn()| catch_unwind(AssertUnwindSafe(enter)).is_err();
        let pin = || drop(participants.pin(&reader));
        let share = || drop(lock.shared(&reader));
        // One after the other is what they are for.
        pin();
        share();
        {
            let _inside = participants.pin(&reader);
            assert!(caught(&pin) && caught(&share));
            let era = participants.end_era();
            assert!(
                !participants.is_over(era),
                "the mark of the outer one stands"
            );
        }
        {
            let _inside = lock.shared(&reader);
            assert!(caught(&pin) && caught(&share));
        }
        assert!(reader.is_idle());
        pin();
    }
}
