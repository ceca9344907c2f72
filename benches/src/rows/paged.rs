//! A page table, Slat's or a peer's, at some work.

use std::{hint::black_box, time::Duration};

use anyhow::ensure;

use crate::{
    clock::timed,
    order::Order,
    ring::Subject,
    table::{HOST_BASE, Mapping, Table},
};

/// What is done to all pages.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// Mapped by range, from nothing.
    Populate,
    /// Made read-only by range.
    Protect,
    /// Unmapped by range.
    Unmap,
    /// All tables given back.
    ZapAll,
    /// Mapped one by one, from nothing.
    Fault(Order),
    /// Mapped so many at a time, from nothing.
    Batch(u64),
    /// Looked up.
    Translate(Order),
}

/// A page table at its work.
pub(crate) struct Paged<T> {
    table: T,
    pages: u64,
    work: Work,
    /// Prepared before.
    used: bool,
    result: u64,
}

impl<T: Table> Paged<T> {
    pub(crate) fn new(pages: u64, work: Work) -> Self {
        Self {
            table: T::new(pages),
            pages,
            work,
            used: false,
            result: 0,
        }
    }

    /// Each frame of the slot.
    fn all(&self, thorough: bool, expected: impl Fn(u64) -> Option<Mapping>) -> anyhow::Result<()> {
        self.each(0..self.pages, thorough, expected)
    }

    /// Each of `frames`, or some of them.
    fn each(
        &self,
        frames: impl Iterator<Item = u64>,
        thorough: bool,
        expected: impl Fn(u64) -> Option<Mapping>,
    ) -> anyhow::Result<()> {
        // A prime, so that each place in a table has its turn.
        let step = if thorough { 1 } else { 1021 };
        for frame in frames.step_by(step) {
            let found = self.table.mapping(frame);
            ensure!(
                found == expected(frame),
                "{}: after {:?}, frame {frame} is {found:?}",
                T::NAME,
                self.work
            );
        }
        Ok(())
    }
}

fn mapped(frame: u64, writable: bool) -> Option<Mapping> {
    Some(Mapping {
        pfn: HOST_BASE + frame,
        writable,
    })
}

impl<T: Table> Subject for Paged<T> {
    fn prepare(&mut self) {
        let used = std::mem::replace(&mut self.used, true);
        match self.work {
            Work::Populate | Work::Fault(_) | Work::Batch(_) => {
                self.table.zap_all();
                self.table.renew();
            }
            Work::Protect if used => self.table.unprotect(),
            Work::Translate(_) if used => {}
            Work::Protect | Work::Translate(_) | Work::Unmap => self.table.populate(0, self.pages),
            Work::ZapAll => {
                self.table.renew();
                self.table.populate(0, self.pages);
            }
        }
    }

    fn run(&mut self) -> Duration {
        let Self {
            table,
            pages,
            work,
            result,
            ..
        } = self;
        timed(|| match work {
            Work::Populate => table.populate(0, black_box(*pages)),
            Work::Protect => table.protect(),
            Work::Unmap => table.unmap(),
            Work::ZapAll => table.zap_all(),
            Work::Batch(batch) => table.fault_batches(*pages, *batch),
            Work::Fault(order) => {
                *result = match order {
                    Order::Sequential { pages } => table.fault(0..black_box(*pages)),
                    Order::Random { frames, count } => {
                        table.fault(frames[..*count].iter().map(|&frame| u64::from(frame)))
                    }
                };
            }
            Work::Translate(order) => {
                *result = black_box(match order {
                    Order::Sequential { pages } => table.translate(0..black_box(*pages)),
                    Order::Random { frames, count } => {
                        table.translate(frames[..*count].iter().map(|&frame| u64::from(frame)))
                    }
                });
            }
        })
    }

    fn verify(&mut self, thorough: bool) -> anyhow::Result<()> {
        match &self.work {
            Work::Populate | Work::Batch(_) => self.all(thorough, |frame| mapped(frame, true)),
            Work::Protect => self.all(thorough, |frame| mapped(frame, false)),
            Work::Unmap | Work::ZapAll => self.all(thorough, |_| None),
            Work::Fault(order) => {
                ensure!(
                    self.result == order.len(),
                    "{}: {} of {} faults mapped a page",
                    T::NAME,
                    self.result,
                    order.len()
                );
                match order {
                    Order::Sequential { pages } => {
                        self.each(0..*pages, thorough, |frame| mapped(frame, true))
                    }
                    Order::Random { frames, count } => {
                        let frames = frames[..*count].iter().map(|&frame| u64::from(frame));
                        self.each(frames, thorough, |frame| mapped(frame, true))
                    }
                }
            }
            Work::Translate(order) => {
                let expected = order.sum() + HOST_BASE * order.len();
                ensure!(
                    self.result == expected,
                    "{}: the host frames sum up to {}, not {expected}",
                    T::NAME,
                    self.result
                );
                Ok(())
            }
        }
    }
}
