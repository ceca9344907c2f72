//! The baselines as subjects.

use std::time::Duration;

use anyhow::ensure;

use crate::{
    baseline::{Atomics, Copy, Flat},
    clock::timed,
    order::Order,
    ring::Subject,
    table::HOST_BASE,
};

/// What is done to a flat array.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sweep {
    /// An entry stored for each page.
    Store,
    /// 0 stored for each page.
    Clear,
    /// The write bit taken from each page.
    And,
}

/// A sweep over a flat array.
pub(crate) struct Sweeping {
    flat: Flat,
    sweep: Sweep,
}

impl Sweeping {
    pub(crate) fn new(pages: u64, sweep: Sweep) -> Self {
        Self {
            flat: Flat::new(pages),
            sweep,
        }
    }
}

impl Subject for Sweeping {
    fn prepare(&mut self) {
        match self.sweep {
            Sweep::Store => self.flat.clear(),
            Sweep::Clear | Sweep::And => self.flat.store(),
        }
    }

    fn run(&mut self) -> Duration {
        let Self { flat, sweep } = self;
        timed(|| match sweep {
            Sweep::Store => flat.store(),
            Sweep::Clear => flat.clear(),
            Sweep::And => flat.and(),
        })
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        let right = match self.sweep {
            Sweep::Store => self.flat.holds(Flat::mapped),
            Sweep::Clear => self.flat.holds(|_| 0),
            Sweep::And => self.flat.holds(Flat::protected),
        };
        ensure!(right, "flat array: wrong after {:?}", self.sweep);
        Ok(())
    }
}

/// A copy of 8 bytes for each entry.
pub(crate) struct Copying(Copy);

impl Copying {
    pub(crate) fn new(entries: u64) -> Self {
        Self(Copy::new(entries))
    }
}

impl Subject for Copying {
    fn prepare(&mut self) {
        self.0.reset();
    }

    fn run(&mut self) -> Duration {
        timed(|| self.0.copy())
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        ensure!(self.0.done(), "memcpy: the copy differs");
        Ok(())
    }
}

/// A compare-exchange for each page.
pub(crate) struct Exchanging {
    atomics: Atomics,
    order: Order,
    result: u64,
}

impl Exchanging {
    pub(crate) fn new(pages: u64, order: Order) -> Self {
        Self {
            atomics: Atomics::new(pages),
            order,
            result: 0,
        }
    }
}

impl Subject for Exchanging {
    fn prepare(&mut self) {
        self.atomics.clear();
    }

    fn run(&mut self) -> Duration {
        let Self {
            atomics,
            order,
            result,
        } = self;
        timed(|| *result = atomics.fault(order))
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        ensure!(
            self.result == self.order.len(),
            "compare-exchange: {} of {} succeeded",
            self.result,
            self.order.len()
        );
        Ok(())
    }
}

/// A load for each page.
pub(crate) struct Loading {
    flat: Flat,
    order: Order,
    result: u64,
}

impl Loading {
    pub(crate) fn new(pages: u64, order: Order) -> Self {
        Self {
            flat: Flat::new(pages),
            order,
            result: 0,
        }
    }
}

impl Subject for Loading {
    fn prepare(&mut self) {}

    fn run(&mut self) -> Duration {
        let Self {
            flat,
            order,
            result,
        } = self;
        timed(|| *result = flat.load(order))
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        let expected = self.order.sum() + HOST_BASE * self.order.len();
        ensure!(
            self.result == expected,
            "flat load: the sum is {}, not {expected}",
            self.result
        );
        Ok(())
    }
}
