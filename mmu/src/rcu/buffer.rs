//! A value in two copies: readers use one while the other is changed.
//!
//! A change is made to the copy that nobody reads; then that copy becomes the one that new readers
//! use; then, when the last reader of the other copy has left, the same change is made to that one.
//! So a reader never waits, and a change costs what it changes, not a copy of everything (KVM's two
//! sets of memory slots).
//!
//! *Locking*: buffers live in a set ([`Buffers`]) that owns the lock of its writers and knows the
//! participants of its readers. Only the set makes a [`Writer`], and only through it is one of its
//! buffers changed, so there is no other lock to hold by mistake and no other participants to wait
//! for. A reader shows that it is inside; that it is a participant of *this* set is asserted in
//! debug builds.
//!
//! *Order*: the lock of writers is the slots lock, the first of all (`locks`); it is held for the
//! whole change.

use alloc::{boxed::Box, sync::Arc};
use core::ops::Deref;

use super::participants::{Inside, Participants};
use crate::sync::{
    AcqRel, Acquire, AtomicU64, AtomicUsize, Mutex, MutexGuard, Relaxed, Release, UnsafeCell,
};

/// Buffers with the same readers and the same writers. For readers, it is a slice of them.
#[derive(Debug)]
pub(crate) struct Buffers<T> {
    participants: Arc<Participants>,
    writers: Mutex<()>,
    buffers: Box<[DoubleBuffer<T>]>,
}

#[derive(Debug)]
pub(crate) struct DoubleBuffer<T> {
    copies: [UnsafeCell<T>; 2],
    /// The copy that new readers use.
    current: AtomicUsize,
    /// Changes with each change. A reader that finds the same generation as before finds the same
    /// value.
    generation: AtomicU64,
    step: u64,
    /// Whose participants are waited for: for assertions.
    participants: usize,
}

/// The only writer of a set, until this is dropped.
#[derive(Debug)]
pub(crate) struct Writer<'b, T> {
    set: &'b Buffers<T>,
    _turn: MutexGuard<'b, ()>,
}

/// One buffer in the hands of the only writer of its set.
#[derive(Debug)]
pub(crate) struct Copies<'w, T> {
    buffer: &'w DoubleBuffer<T>,
    participants: &'w Participants,
}

// SAFETY: copies are handed out as `&T` to readers on any thread (`T: Sync`) and changed by one
// writer on any thread (`T: Send`), never both at once, as `change` explains.
unsafe impl<T: Send + Sync> Sync for DoubleBuffer<T> {}

impl<T> Buffers<T> {
    /// `count` buffers, whose generations never meet. `make` is given each one's number, once for
    /// each copy, and must make the same both times.
    pub(crate) fn new(
        participants: Arc<Participants>,
        count: usize,
        make: impl Fn(usize) -> T,
    ) -> Self {
        let buffer = |number| DoubleBuffer {
            copies: [UnsafeCell::new(make(number)), UnsafeCell::new(make(number))],
            current: AtomicUsize::new(0),
            generation: AtomicU64::new(number as u64),
            step: count as u64,
            participants: participants.id(),
        };
        Self {
            buffers: (0..count).map(buffer).collect(),
            writers: Mutex::new(()),
            participants,
        }
    }

    /// Becomes the only writer.
    pub(crate) fn lock(&self) -> Writer<'_, T> {
        Writer {
            _turn: self.writers.lock(),
            set: self,
        }
    }
}

impl<T> Deref for Buffers<T> {
    type Target = [DoubleBuffer<T>];

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.buffers
    }
}

impl<T> DoubleBuffer<T> {
    /// See the field. To be read inside, before the value that it is to stand for.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    /// The value as it is; it stays as it is for as long as the reader is inside.
    #[inline(always)]
    pub(crate) fn read<'a>(&'a self, inside: &'a Inside<'_>) -> &'a T {
        debug_assert!(
            inside.is_of(self.participants),
            "inside, but of another set: no change waits for this reader"
        );
        let current = self.current.load(Acquire) & 1;
        // SAFETY: a writer changes a copy only after a grace period that began when the copy was
        // not current any more, and we read `current` after we went inside: so as long as we are,
        // the copy is not changed.
        self.copies[current].with(|copy| unsafe { &*copy })
    }

    /// The value as the writer sees it.
    ///
    /// # Safety
    ///
    /// No writer changes the buffer while the value is borrowed.
    unsafe fn read_as_writer(&self) -> &T {
        let current = self.current.load(Relaxed) & 1;
        // SAFETY: only a writer changes copies, and the caller says that none does.
        self.copies[current].with(|copy| unsafe { &*copy })
    }
}

impl<T> Writer<'_, T> {
    /// The value of one buffer, as a writer sees it; `None` if there is no such buffer.
    pub(crate) fn read(&self, number: usize) -> Option<&T> {
        self.iter().nth(number)
    }

    /// The values of all buffers.
    pub(crate) fn iter<'w>(&'w self) -> impl Iterator<Item = &'w T>
    where
        T: 'w,
    {
        // SAFETY: the only writer is `self`, which would have to be borrowed mutably for a change.
        let value = |buffer: &'w DoubleBuffer<T>| unsafe { buffer.read_as_writer() };
        self.set.iter().map(value)
    }

    /// One buffer, to be changed; `None` if there is no such buffer.
    pub(crate) fn at(&mut self, number: usize) -> Option<Copies<'_, T>> {
        let buffer = self.set.buffers.get(number)?;
        Some(Copies {
            buffer,
            participants: &self.set.participants,
        })
    }
}

impl<T> Copies<'_, T> {
    /// See [`DoubleBuffer::generation`].
    pub(crate) fn generation(&self) -> u64 {
        self.buffer.generation()
    }

    /// The value as a writer sees it.
    pub(crate) fn read(&self) -> &T {
        // SAFETY: `Writer` is borrowed for as long as we live, and to change the buffer we would
        // have to be borrowed mutably.
        unsafe { self.buffer.read_as_writer() }
    }

    /// Changes the value. `edit` is run once on each copy and must do the same to both. Returns
    /// what it gave the first time. Waits for readers, so the caller must not be inside.
    pub(crate) fn change<R>(&mut self, mut edit: impl FnMut(&mut T) -> R) -> R {
        let buffer = self.buffer;
        let current = buffer.current.load(Relaxed) & 1;
        let spare = 1 - current;
        // SAFETY: we are the only writer (`Writer` made us, and is borrowed mutably until we go).
        // Readers of the spare copy left before the change before this one ended (it waited for
        // them), and `current` has not named this copy since.
        let result = buffer.copies[spare].with_mut(|copy| edit(unsafe { &mut *copy }));
        buffer.current.store(spare, Release);
        // After the copy: who reads the new generation reads the new copy. Who reads the old one is
        // waited for.
        buffer.generation.fetch_add(buffer.step, AcqRel);
        self.participants.synchronize();
        // SAFETY: the only writer, and the grace period is over: nobody reads the old copy, and new
        // readers use the other.
        buffer.copies[current].with_mut(|copy| edit(unsafe { &mut *copy }));
        result
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering::SeqCst},
        thread,
        vec::Vec,
    };

    use super::*;

    #[test]
    fn an_edit_reaches_both_copies_once() {
        let participants = Participants::new();
        let buffers = Buffers::new(Arc::clone(&participants), 2, |_| Vec::new());
        let mut writer = buffers.lock();
        let reader = participants.reader_slot();
        for number in 0..4 {
            let mut second = writer.at(1).unwrap();
            let length = second.change(|value| {
                value.push(number);
                value.len()
            });
            assert_eq!(length, number + 1);
            let expected: Vec<usize> = (0..=number).collect();
            assert_eq!(second.read(), &expected);
            assert_eq!(second.generation(), 1 + 2 * (number as u64 + 1));
            assert_eq!(buffers[1].read(&participants.pin(&reader)), &expected);
            assert_eq!(buffers[1].generation(), 1 + 2 * (number as u64 + 1));
            // Nothing of it is in the other.
            assert_eq!(writer.read(0), Some(&Vec::new()));
            assert!(writer.iter().eq([&Vec::new(), &expected]));
            assert_eq!(buffers[0].generation(), 0);
        }
        assert!(writer.read(2).is_none() && writer.at(2).is_none());
    }

    #[test]
    fn a_writer_of_one_set_leaves_another_sets_writer_alone() {
        let participants = Participants::new();
        let of = |value| Buffers::new(Arc::clone(&participants), 1, move |_| value);
        let (one, other) = (of(1), of(2));
        let (mut first, mut second) = (one.lock(), other.lock());
        first.at(0).unwrap().change(|value| *value += 10);
        second.at(0).unwrap().change(|value| *value += 20);
        assert_eq!((first.read(0), second.read(0)), (Some(&11), Some(&22)));
    }

    /// Neither the writer nor its grace period would know of the reader.
    #[test]
    #[cfg(debug_assertions)]
    fn a_reader_of_another_set_is_caught() {
        use std::panic::{AssertUnwindSafe, catch_unwind};

        use super::super::lock::MmuLock;

        let (participants, other) = (Participants::new(), Participants::new());
        let buffers = Buffers::new(Arc::clone(&participants), 1, |_| 0);
        let (reader, theirs) = (participants.reader_slot(), other.reader_slot());
        let caught = |look: &dyn Fn()| catch_unwind(AssertUnwindSafe(look)).is_err();
        assert!(caught(&|| {
            buffers[0].read(&other.pin(&theirs));
        }));
        let lock = MmuLock::new(Arc::clone(&other));
        assert!(caught(&|| {
            buffers[0].read(&lock.shared(&theirs));
        }));
        // Nor does one participants let another's participants in.
        assert!(caught(&|| drop(participants.pin(&theirs))));
        assert!(caught(&|| drop(lock.shared(&reader))));
        assert_eq!(buffers[0].read(&participants.pin(&reader)), &0);
    }

    #[test]
    fn a_reader_sees_one_value_for_as_long_as_it_is_inside() {
        let participants = Participants::new();
        let buffers = Buffers::new(Arc::clone(&participants), 1, |_| [0u64; 8]);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let reader = participants.reader_slot();
                    let mut last = 0;
                    while !stop.load(SeqCst) {
                        let inside = participants.pin(&reader);
                        let generation = buffers[0].generation();
                        let value = buffers[0].read(&inside);
                        let first = value[0];
                        thread::yield_now();
                        assert!(value.iter().all(|part| *part == first), "{value:?}");
                        assert!(first >= last && first >= generation, "an older value");
                        last = first;
                    }
                });
            }
            for number in 1..=500 {
                let mut writer = buffers.lock();
                writer.at(0).unwrap().change(|value| {
                    value.iter_mut().for_each(|part| *part = number);
                });
            }
            stop.store(true, SeqCst);
        });
    }
}
