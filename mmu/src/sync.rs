//! The only way to atomics, locks and waiting.
//!
//! Everything in this crate that one thread does to another goes through here, so that the same
//! code runs on real atomics, under loom (feature `loom`: every interleaving of a small scene) and
//! under shuttle (feature `shuttle`: random interleavings of a large one). The two features replace
//! the atomics and are for tests alone.
//!
//! *Statistics* are the exception: nothing is ordered by a counter, so a [`Statistic`] is the
//! processor's atomic in every world and the models need not try each moment at which one might be
//! read.
//!
//! *Counted* is `Arc` for what may only be given back when the last holder is gone: the order
//! between the holders' uses and the end is part of the protocol, so a model must see it. Elsewhere
//! an `Arc` is an `Arc`.
//!
//! *Steps.* What must not depend on how long a range is, a test counts instead of timing it: see
//! [`step`].
//!
//! *Waiting.* Without an operating system a waiter spins. With feature `std` it gives its time
//! slice away after a few turns, so that more threads than cores do not burn each other's time.

#[cfg(all(feature = "loom", feature = "shuttle"))]
compile_error!("features `loom` and `shuttle` are different worlds: enable one");

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod imp {
    pub(crate) use alloc::sync::Arc as Counted;
    pub(crate) use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};

    /// What a lock's waiters do meanwhile.
    #[derive(Debug)]
    pub(super) struct Relax;

    impl spin::RelaxStrategy for Relax {
        fn relax() {
            super::give_way();
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(spin::mutex::SpinMutex<T, Relax>);
    pub(crate) type MutexGuard<'a, T> = spin::mutex::SpinMutexGuard<'a, T>;

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(spin::mutex::SpinMutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            super::step();
            self.0.lock()
        }
    }

    /// Memory that one thread writes while no other looks; who uses it proves that.
    #[derive(Debug, Default)]
    pub(crate) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(core::cell::UnsafeCell::new(value))
        }

        pub(crate) fn with<R>(&self, look: impl FnOnce(*const T) -> R) -> R {
            look(self.0.get())
        }

        pub(crate) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

#[cfg(all(feature = "loom", not(feature = "shuttle")))]
mod imp {
    use core::sync::atomic::Ordering;

    pub(crate) use loom::{
        cell::UnsafeCell,
        sync::{Arc as Counted, MutexGuard, atomic::fence},
    };

    /// An atomic, and a mark that each access, loads too, exchanges first.
    ///
    /// loom tries another order only against the *last* access of a location. So where one thread
    /// loads, then another loads and exchanges, it would never try the exchange before the first
    /// load: its own load hides that one. The mark makes each access one that the next depends on;
    /// it is relaxed, so it orders nothing in the model itself.
    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            #[derive(Debug)]
            pub(crate) struct $name {
                mark: loom::sync::atomic::AtomicBool,
                value: loom::sync::atomic::$name,
            }

            #[allow(dead_code, reason = "each type has all operations")]
            impl $name {
                pub(crate) fn new(value: $value) -> Self {
                    Self {
                        mark: loom::sync::atomic::AtomicBool::new(false),
                        value: loom::sync::atomic::$name::new(value),
                    }
                }

                fn marked(&self) -> &loom::sync::atomic::$name {
                    self.mark.swap(false, Ordering::Relaxed);
                    &self.value
                }

                pub(crate) fn load(&self, order: Ordering) -> $value {
                    self.marked().load(order)
                }

                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    self.marked().store(value, order);
                }

                pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                    self.marked().swap(value, order)
                }

                pub(crate) fn compare_exchange(
                    &self,
                    old: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.marked().compare_exchange(old, new, success, failure)
                }
            }
        };
        ($name:ident, $value:ty, $($operation:ident)*) => {
            atomic!($name, $value);

            #[allow(dead_code, reason = "each type has all operations")]
            impl $name {
                $(pub(crate) fn $operation(&self, value: $value, order: Ordering) -> $value {
                    self.marked().$operation(value, order)
                })*
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(AtomicU64, u64, fetch_add fetch_sub fetch_or fetch_and);
    atomic!(AtomicUsize, usize, fetch_add fetch_sub);

    impl AtomicU64 {
        /// A plain write: every other access must happen before it or after.
        pub(crate) fn with_mut<R>(&mut self, change: impl FnOnce(&mut u64) -> R) -> R {
            self.value.with_mut(change)
        }
    }

    #[derive(Debug)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            // Poison: a panic in a model has failed the test already.
            self.0.lock().unwrap_or_else(|poison| poison.into_inner())
        }
    }
}

#[cfg(all(feature = "shuttle", not(feature = "loom")))]
mod imp {
    use core::sync::atomic::Ordering;
    use std::{cell::Cell, thread_local};

    pub(crate) use alloc::sync::Arc as Counted;
    pub(crate) use shuttle::sync::{
        MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, fence},
    };

    thread_local! {
        /// Address of the entry used last, and the state of the generator that chooses steps in
        /// sweeps.
        static STEPS: Cell<(usize, u32)> = const { Cell::new((0, 1)) };
    }

    /// So that a schedule, repeated, is the same.
    pub(crate) fn forget_steps() {
        STEPS.set((0, 1));
    }

    /// An entry. Each use is a step at which another thread may run, but of a sweep over neighbours
    /// only about one in 16, or schedules would be made of little else. There are tens of thousands
    /// of entries, so each is the processor's atomic: shuttle's own differ from it by the step
    /// alone.
    #[derive(Debug)]
    pub(crate) struct EntryWord(core::sync::atomic::AtomicU64);

    impl EntryWord {
        pub(crate) const fn new(raw: u64) -> Self {
            Self(core::sync::atomic::AtomicU64::new(raw))
        }

        fn step(&self) -> &core::sync::atomic::AtomicU64 {
            let here = core::ptr::from_ref(self).addr();
            let (last, random) = STEPS.get();
            let random = random.wrapping_mul(1664525).wrapping_add(1013904223);
            STEPS.set((here, random));
            if here == last || here.abs_diff(last) > 64 || random >> 28 == 0 {
                shuttle_engine::runtime::thread::switch();
                STEPS.set((here, STEPS.get().1));
            }
            &self.0
        }

        pub(crate) fn load(&self, _: Ordering) -> u64 {
            self.step().load(Ordering::SeqCst)
        }

        pub(crate) fn store(&self, raw: u64, _: Ordering) {
            self.step().store(raw, Ordering::SeqCst);
        }

        pub(crate) fn swap(&self, raw: u64, _: Ordering) -> u64 {
            self.step().swap(raw, Ordering::SeqCst)
        }

        pub(crate) fn compare_exchange(
            &self,
            old: u64,
            new: u64,
            _: Ordering,
            _: Ordering,
        ) -> Result<u64, u64> {
            let entry = self.step();
            entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
        }
    }

    #[derive(Debug)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(|poison| poison.into_inner())
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(core::cell::UnsafeCell::new(value))
        }

        pub(crate) fn with<R>(&self, look: impl FnOnce(*const T) -> R) -> R {
            look(self.0.get())
        }

        pub(crate) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

pub(crate) use core::sync::atomic::AtomicU64 as Statistic;
pub(crate) use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

#[cfg(all(feature = "shuttle", not(feature = "loom")))]
pub(crate) use self::imp::{EntryWord, forget_steps};
#[cfg(not(all(feature = "shuttle", not(feature = "loom"))))]
pub(crate) type EntryWord = AtomicU64;

pub(crate) use self::imp::{
    AtomicBool, AtomicU64, AtomicUsize, Counted, Mutex, MutexGuard, UnsafeCell, fence,
};

/// Turns before a waiter gives its time slice away.
const SPINS: u32 = 64;

/// A waiter's patience.
#[derive(Debug, Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    /// One turn of waiting.
    pub(crate) fn wait(&mut self) {
        if self.0 < SPINS && cfg!(not(any(feature = "loom", feature = "shuttle"))) {
            self.0 += 1;
            core::hint::spin_loop();
        } else {
            give_way();
        }
    }
}

/// Lets another thread run.
pub(crate) fn give_way() {
    #[cfg(all(feature = "loom", not(feature = "shuttle")))]
    loom::thread::yield_now();
    #[cfg(all(feature = "shuttle", not(feature = "loom")))]
    shuttle::thread::yield_now();
    #[cfg(all(feature = "std", not(any(feature = "loom", feature = "shuttle"))))]
    std::thread::yield_now();
    #[cfg(not(any(feature = "std", feature = "loom", feature = "shuttle")))]
    core::hint::spin_loop();
}

/// One step of this thread: a lock taken, or a look for slots over a range. Unit tests count them;
/// otherwise it is nothing.
#[inline(always)]
pub(crate) fn step() {
    #[cfg(test)]
    steps::COUNT.set(steps::COUNT.get() + 1);
}

/// A full barrier after an atomic exchange by this thread: its store comes before every later load.
#[inline(always)]
pub(crate) fn fence_after_exchange() {
    // Exchanges of this architecture are full barriers themselves.
    #[cfg(all(
        target_arch = "x86_64",
        not(any(feature = "loom", feature = "shuttle", miri))
    ))]
    core::sync::atomic::compiler_fence(SeqCst);
    #[cfg(not(all(
        target_arch = "x86_64",
        not(any(feature = "loom", feature = "shuttle", miri))
    )))]
    fence(SeqCst);
}

/// Stores `value` so that it comes before every later load of this thread in the one order that all
/// threads agree on: this thread's side of Dekker's argument. The other side is a store, a `SeqCst`
/// fence and a load.
#[inline(always)]
pub(crate) fn announce(cell: &AtomicU64, value: u64) {
    #[cfg(all(
        target_arch = "x86_64",
        not(any(feature = "loom", feature = "shuttle", miri))
    ))]
    {
        // A locked exchange is as full a barrier as MFENCE in about fifty per cent of the time; the
        // compiler fence keeps the compiler from moving loads above it.
        cell.swap(value, SeqCst);
        core::sync::atomic::compiler_fence(SeqCst);
    }
    #[cfg(not(all(
        target_arch = "x86_64",
        not(any(feature = "loom", feature = "shuttle", miri))
    )))]
    {
        // A release, although the fence follows: whoever reads this mark, and not the one that it
        // replaces, must still see that all done under the replaced one is over. A plain store
        // would not carry on that one's release.
        cell.store(value, Release);
        fence(SeqCst);
    }
}

#[cfg(test)]
pub(crate) mod steps {
    use core::cell::Cell;

    std::thread_local! {
        pub(super) static COUNT: Cell<u64> = const { Cell::new(0) };
    }

    /// Steps of this thread so far.
    #[cfg(not(any(feature = "loom", feature = "shuttle")))]
    pub(crate) fn so_far() -> u64 {
        COUNT.get()
    }
}
