//! Loom models of the parts that cannot be reached alone from outside: the lock, the grace period,
//! the double buffer, the bitmap.
//!
//! The scenes that need a whole MMU are in `tests/loom_*.rs`.

use alloc::sync::Arc;
use std::{
    println,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use loom::{cell::UnsafeCell, thread};

use crate::{
    EntryCell,
    rcu::{buffer::Buffers, lock::MmuLock, participants::Participants},
    slot::DirtyBitmap,
    sync::{Acquire, AtomicU64, Relaxed, Release},
};

fn explore(name: &str, preemptions: usize, scene: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    let begin = Instant::now();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        scene();
    });
    println!(
        "{name}: {} interleavings with up to {preemptions} preemptions, {:.1} s",
        count.load(Ordering::Relaxed),
        begin.elapsed().as_secs_f64()
    );
}

/// A value whose unordered use loom notices.
struct Value(UnsafeCell<u64>);

// SAFETY: loom fails a model whose uses are not ordered.
unsafe impl Send for Value {}
// SAFETY: as above.
unsafe impl Sync for Value {}

impl Value {
    fn new() -> Self {
        Self(UnsafeCell::new(0))
    }

    fn get(&self) -> u64 {
        // SAFETY: as above.
        self.0.with(|value| unsafe { *value })
    }

    fn add(&self) -> u64 {
        // SAFETY: as above.
        self.0.with_mut(|value| unsafe {
            *value += 1;
            *value
        })
    }
}

#[test]
fn sharers_and_excluders_never_meet() {
    explore("MMU lock: shared x exclusive", 3, || {
        let participants = Participants::new();
        let lock = Arc::new(MmuLock::new(Arc::clone(&participants)));
        let value = Arc::new(Value::new());
        let (theirs, shown) = (Arc::clone(&lock), Arc::clone(&value));
        let reader = participants.reader_slot();
        let other = thread::spawn(move || {
            for _ in 0..2 {
                let _inside = theirs.shared(&reader);
                shown.get();
            }
        });
        for _ in 0..2 {
            let _exclusive = lock.exclusive();
            value.add();
        }
        other.join().unwrap();
        assert_eq!(value.get(), 2);
    });
}

#[test]
fn excluders_exclude_each_other() {
    explore("MMU lock: exclusive x exclusive x shared", 2, || {
        let participants = Participants::new();
        let lock = Arc::new(MmuLock::new(Arc::clone(&participants)));
        let value = Arc::new(Value::new());
        let others = [0, 1].map(|n| {
            let (lock, value, reader) = (
                Arc::clone(&lock),
                Arc::clone(&value),
                participants.reader_slot(),
            );
            thread::spawn(move || {
                if n == 0 {
                    let _exclusive = lock.exclusive();
                    value.add();
                } else {
                    let _inside = lock.shared(&reader);
                    value.get();
                }
            })
        });
        {
            let _exclusive = lock.exclusive();
            value.add();
        }
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(value.get(), 2);
    });
}

/// Unlinks, waits, and takes the memory back, while a reader looks twice.
fn grace(
    wait: impl Fn(&Participants) + Send + Sync + 'static,
) -> impl Fn() + Send + Sync + 'static {
    move || {
        let participants = Participants::new();
        let (linked, memory) = (Arc::new(AtomicU64::new(1)), Arc::new(Value::new()));
        let reader = participants.reader_slot();
        let (theirs, link, shown) = (
            Arc::clone(&participants),
            Arc::clone(&linked),
            Arc::clone(&memory),
        );
        let reader = thread::spawn(move || {
            for _ in 0..2 {
                let inside = theirs.pin(&reader);
                if link.load(Acquire) == 1 {
                    shown.get();
                }
                drop(inside);
            }
        });
        linked.store(0, Release);
        wait(&participants);
        memory.add();
        reader.join().unwrap();
    }
}

#[test]
fn a_grace_period_outlasts_every_reader() {
    let scene = grace(Participants::synchronize);
    explore("grace period: reader x synchronize", 3, scene);
    let scene = grace(|participants| {
        let era = participants.end_era();
        while !participants.is_over(era) {
            crate::sync::give_way();
        }
    });
    explore("grace period: reader x era", 3, scene);
}

#[test]
fn readers_never_meet_a_change() {
    explore("double buffer: read x two changes", 2, || {
        let participants = Participants::new();
        let values = |_| (Value::new(), Value::new());
        let buffers = Arc::new(Buffers::new(Arc::clone(&participants), 1, values));
        let reader = participants.reader_slot();
        let (theirs, other) = (Arc::clone(&participants), Arc::clone(&buffers));
        let reader = thread::spawn(move || {
            let mut last = 0;
            for _ in 0..2 {
                let inside = theirs.pin(&reader);
                let generation = other[0].generation();
                let (first, second) = other[0].read(&inside);
                let (first, second) = (first.get(), second.get());
                assert_eq!(first, second, "a change in part");
                assert!(first >= last && first >= generation, "an old copy");
                last = first;
            }
        });
        let mut writer = buffers.lock();
        for _ in 0..2 {
            writer.at(0).unwrap().change(|(first, second)| {
                first.add();
                second.add();
            });
        }
        drop(writer);
        reader.join().unwrap();
    });
}

#[test]
fn a_bit_is_taken_or_stays() {
    explore("bitmap: set x take by the summary", 3, || {
        let bitmap = Arc::new(DirtyBitmap::new(64, false).unwrap());
        let setter = Arc::clone(&bitmap);
        let other = thread::spawn(move || {
            setter.set(3);
            setter.set(4);
        });
        let harvest = || {
            bitmap.next_candidate(0).map_or(0, |word| {
                bitmap.begin_group(word);
                bitmap.take(word, u64::MAX)
            })
        };
        let first = harvest();
        other.join().unwrap();
        assert_eq!(first | harvest(), 0b1_1000);
        assert_eq!(bitmap.count(), 0);
    });
}

/// `clear_dirty_log` takes bits and leaves the summary as it is, so a setter finds it set and need
/// not set it, unless a harvest clears it at that moment.
#[test]
fn a_bit_under_a_summary_that_is_still_set() {
    explore("bitmap: set x take, summary still set", 3, || {
        let bitmap = Arc::new(DirtyBitmap::new(64, false).unwrap());
        bitmap.set(3);
        assert_eq!(bitmap.take(0, u64::MAX), 1 << 3);
        let setter = Arc::clone(&bitmap);
        let other = thread::spawn(move || setter.set(3));
        let harvest = || {
            bitmap.next_candidate(0).map_or(0, |word| {
                bitmap.begin_group(word);
                bitmap.take(word, u64::MAX)
            })
        };
        let first = harvest();
        other.join().unwrap();
        assert_eq!(first | harvest(), 1 << 3);
    });
}

/// The order between an entry's change and the page's bit: see `DirtyBitmap::set_word`.
#[test]
fn a_page_is_writable_or_its_bit_is_set() {
    explore("bitmap: writable x protected", 3, || {
        let bitmap = Arc::new(DirtyBitmap::new(64, true).unwrap());
        let writable = Arc::new(AtomicU64::new(0));
        let (marked, entry) = (Arc::clone(&bitmap), Arc::clone(&writable));
        let writer = thread::spawn(move || {
            let _ = entry.compare_exchange(0, 1, crate::sync::AcqRel, Acquire);
            marked.set(3);
        });
        let taken = bitmap.take(0, 1 << 3);
        crate::sync::fence(crate::sync::SeqCst);
        let seen = writable.load(Relaxed);
        writer.join().unwrap();
        let left = bitmap.take(0, 1 << 3);
        assert!(taken != 0);
        assert!(seen == 1 || left != 0, "writable, unprotected and clean");
    });
}

/// A table laid by hand, and the entry that links it.
#[test]
fn who_sees_a_stored_entry_sees_what_was_stored_before() {
    explore("entry: store x load", 3, || {
        let entries = Arc::new([EntryCell::new(0), EntryCell::new(0)]);
        let layer = Arc::clone(&entries);
        let other = thread::spawn(move || {
            layer[0].store(7);
            layer[1].store(1);
        });
        if entries[1].load() == 1 {
            assert_eq!(entries[0].load(), 7);
        }
        other.join().unwrap();
    });
}
