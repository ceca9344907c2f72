//! A value in two copies: readers use one while the other is changed.
//!
//! A change is made to the copy that nobody reads; then that copy becomes the one that new readers use; then, when the last
//! reader of the other copy has left, the same change is made to that one. So a reader never waits, and a change costs what
//! it changes, not a copy of everything (KVM's two sets of memory slots).
//!
//! *Locking*: readers are inside the registry; writers are serialised by their own lock, held for the whole change.

use super::registry::{Inside, Registry};
use crate::sync::{
    AcqRel, Acquire, AtomicU64, AtomicUsize, MutexGuard, Relaxed, Release, UnsafeCell,
};

#[derive(Debug)]
pub(crate) struct DoubleBuffer<T> {
    copies: [UnsafeCell<T>; 2],
    /// The copy that new readers use.
    current: AtomicUsize,
    /// Changes with each change. A reader that finds the same generation as before finds the same value.
    generation: AtomicU64,
    step: u64,
}

// SAFETY: copies are handed out as `&T` to readers on any thread (`T: Sync`) and changed by one writer on any thread
// (`T: Send`), never both at once, as `change` explains.
unsafe impl<T: Send + Sync> Sync for DoubleBuffer<T> {}

impl<T> DoubleBuffer<T> {
    /// The `number`-th of `count` buffers, whose generations never meet.
    pub(crate) fn new(make: impl Fn() -> T, number: u64, count: u64) -> Self {
        Self {
            copies: [UnsafeCell::new(make()), UnsafeCell::new(make())],
            current: AtomicUsize::new(0),
            generation: AtomicU64::new(number),
            step: count,
        }
    }

    /// See the field. To be read inside, before the value that it is to stand for.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    /// The value as it is; it stays as it is for as long as the reader is inside.
    #[inline(always)]
    pub(crate) fn read<'a>(&'a self, _inside: &'a Inside<'_>) -> &'a T {
        let current = self.current.load(Acquire) & 1;
        // SAFETY: a writer changes a copy only after a grace period that began when the copy was not current any more, and
        // we read `current` after we went inside: so as long as we are, the copy is not changed.
        self.copies[current].with(|copy| unsafe { &*copy })
    }

    /// Changes the value. `edit` is run once on each copy and must do the same to both. Returns what it gave the first
    /// time. Waits for readers, so the caller must not be inside.
    pub(crate) fn change<R>(
        &self,
        _writer: &mut MutexGuard<'_, ()>,
        registry: &Registry,
        mut edit: impl FnMut(&mut T) -> R,
    ) -> R {
        let current = self.current.load(Relaxed) & 1;
        let spare = 1 - current;
        // SAFETY: the guard makes us the only writer. Readers of the spare copy left before the change before this one
        // ended (it waited for them), and `current` has not named this copy since.
        let result = self.copies[spare].with_mut(|copy| edit(unsafe { &mut *copy }));
        self.current.store(spare, Release);
        // After the copy: who reads the new generation reads the new copy. Who reads the old one is waited for.
        self.generation.fetch_add(self.step, AcqRel);
        registry.synchronize();
        // SAFETY: the only writer, and the grace period is over: nobody reads the old copy, and new readers use the other.
        self.copies[current].with_mut(|copy| edit(unsafe { &mut *copy }));
        result
    }

    /// The value as a writer sees it.
    pub(crate) fn read_as_writer<'a>(&'a self, _writer: &'a MutexGuard<'_, ()>) -> &'a T {
        let current = self.current.load(Relaxed) & 1;
        // SAFETY: only a writer changes copies, and we hold the writers' lock.
        self.copies[current].with(|copy| unsafe { &*copy })
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
    use crate::sync::Mutex;

    #[test]
    fn an_edit_reaches_both_copies_once() {
        let registry = Registry::new();
        let buffer = DoubleBuffer::new(Vec::new, 1, 2);
        let lock = Mutex::new(());
        let mut writer = lock.lock();
        let seat = registry.seat();
        for number in 0..4 {
            let length = buffer.change(&mut writer, &registry, |value| {
                value.push(number);
                value.len()
            });
            assert_eq!(length, number + 1);
            let expected: Vec<usize> = (0..=number).collect();
            assert_eq!(buffer.read_as_writer(&writer), &expected);
            assert_eq!(buffer.read(&registry.pin(&seat)), &expected);
            assert_eq!(buffer.generation(), 1 + 2 * (number as u64 + 1));
        }
    }

    #[test]
    fn a_reader_sees_one_value_for_as_long_as_it_is_inside() {
        let registry = Registry::new();
        let buffer = DoubleBuffer::new(|| [0u64; 8], 0, 1);
        let lock = Mutex::new(());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let seat = registry.seat();
                    let mut last = 0;
                    while !stop.load(SeqCst) {
                        let inside = registry.pin(&seat);
                        let generation = buffer.generation();
                        let value = buffer.read(&inside);
                        let first = value[0];
                        thread::yield_now();
                        assert!(value.iter().all(|part| *part == first), "{value:?}");
                        assert!(first >= last && first >= generation, "an older value");
                        last = first;
                    }
                });
            }
            for number in 1..=500 {
                let mut writer = lock.lock();
                buffer.change(&mut writer, &registry, |value| {
                    value.iter_mut().for_each(|part| *part = number);
                });
            }
            stop.store(true, SeqCst);
        });
    }
}
