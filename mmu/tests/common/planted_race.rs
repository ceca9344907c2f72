//! A data race on purpose, for `cargo xtask tsan` alone: before it believes that the MMU has none,
//! ThreadSanitizer must report this one, and must not report its twin, whose only difference is an
//! ordering.
//!
//! One thread writes a value plainly and raises a flag; another waits for the flag and reads the
//! value. With a release and an acquire the two are ordered; relaxed they are not, although on
//! x86-64 the same instructions run. What is shown is that ThreadSanitizer judges by orderings,
//! sees through the calls and the threads of these tests, and is not told to look away.
//!
//! Both are ignored, so an ordinary run has no race.

use std::{
    cell::UnsafeCell,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

struct Published {
    value: UnsafeCell<u64>,
    flag: AtomicBool,
}

// SAFETY: the flag is to order the uses of the value. In `relaxed` it does not: that is the race.
unsafe impl Sync for Published {}

fn publish(store: Ordering, load: Ordering) {
    // Never freed: the end of an `Arc` is among what ThreadSanitizer is told not to look at.
    let published: &'static Published = Box::leak(Box::new(Published {
        value: UnsafeCell::new(0),
        flag: AtomicBool::new(false),
    }));
    let writer = thread::spawn(move || {
        // SAFETY: nobody reads before the flag is up.
        unsafe { *published.value.get() = 7 };
        published.flag.store(true, store);
    });
    while !published.flag.load(load) {
        thread::yield_now();
    }
    // SAFETY: as above, if the flag's orderings say so.
    assert_eq!(unsafe { *published.value.get() }, 7);
    writer.join().expect("it does not panic");
}

#[test]
#[ignore = "a data race on purpose, for cargo xtask tsan"]
fn relaxed() {
    publish(Ordering::Relaxed, Ordering::Relaxed);
}

#[test]
#[ignore = "the twin of a data race, for cargo xtask tsan"]
fn ordered() {
    publish(Ordering::Release, Ordering::Acquire);
}
