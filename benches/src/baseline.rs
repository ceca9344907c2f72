//! The baselines: the least that a machine could do, in plain loops over flat arrays of as many
//! entries as pages.

use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{order::Order, table::HOST_BASE};

const BITS: u64 = 0b111;
const WRITE: u64 = 0b010;

fn entry(frame: u64) -> u64 {
    (HOST_BASE + frame) << 12 | BITS
}

/// One 64-bit entry a page.
pub(crate) struct Flat(Vec<u64>);

impl Flat {
    /// All mapped.
    pub(crate) fn new(pages: u64) -> Self {
        Self((0..pages).map(entry).collect())
    }

    /// Stores each entry.
    pub(crate) fn store(&mut self) {
        for (frame, slot) in self.0.iter_mut().enumerate() {
            *slot = entry(frame as u64);
        }
        black_box(&mut self.0);
    }

    /// Stores 0 to each entry.
    pub(crate) fn clear(&mut self) {
        self.0.fill(0);
        black_box(&mut self.0);
    }

    /// Takes the write bit from each entry.
    pub(crate) fn and(&mut self) {
        for slot in &mut self.0 {
            *slot &= !WRITE;
        }
        black_box(&mut self.0);
    }

    /// The sum of host frames.
    pub(crate) fn load(&self, order: &Order) -> u64 {
        let load = |frame: u64| black_box(&self.0)[frame as usize] >> 12;
        match order {
            Order::Sequential { pages } => (0..*pages).map(load).sum(),
            Order::Random { frames, count } => frames[..*count]
                .iter()
                .map(|&frame| load(u64::from(frame)))
                .sum(),
        }
    }

    /// Whether each entry is what `expected` says.
    pub(crate) fn holds(&self, expected: impl Fn(u64) -> u64) -> bool {
        self.0
            .iter()
            .enumerate()
            .all(|(frame, &slot)| slot == expected(frame as u64))
    }

    /// What [`store`](Self::store) leaves.
    pub(crate) fn mapped(frame: u64) -> u64 {
        entry(frame)
    }

    /// What [`and`](Self::and) leaves.
    pub(crate) fn protected(frame: u64) -> u64 {
        entry(frame) & !WRITE
    }
}

/// The entries copied from one array to another.
pub(crate) struct Copy {
    from: Vec<u64>,
    to: Vec<u64>,
}

impl Copy {
    /// `entries` of 8 bytes.
    pub(crate) fn new(entries: u64) -> Self {
        Self {
            from: (0..entries).map(|at| at * 3 + 1).collect(),
            to: (0..entries).collect(),
        }
    }

    pub(crate) fn reset(&mut self) {
        self.to.fill(7);
    }

    pub(crate) fn copy(&mut self) {
        self.to.copy_from_slice(black_box(&self.from));
        black_box(&mut self.to);
    }

    pub(crate) fn done(&self) -> bool {
        self.from == self.to
    }
}

/// One atomic entry a page.
pub(crate) struct Atomics(Vec<AtomicU64>);

impl Atomics {
    /// All empty.
    pub(crate) fn new(pages: u64) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn clear(&mut self) {
        for slot in &mut self.0 {
            *slot.get_mut() = 0;
        }
    }

    /// Maps one page by compare-exchange.
    #[inline]
    pub(crate) fn exchange(&self, frame: u64) -> bool {
        self.0[frame as usize]
            .compare_exchange(0, entry(frame), Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Maps page by page; how many were mapped.
    pub(crate) fn fault(&self, order: &Order) -> u64 {
        let one = |frame| u64::from(self.exchange(frame));
        match order {
            Order::Sequential { pages } => (0..*pages).map(one).sum(),
            Order::Random { frames, count } => frames[..*count]
                .iter()
                .map(|&frame| one(u64::from(frame)))
                .sum(),
        }
    }
}
