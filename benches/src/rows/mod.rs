//! The rows: which operations, at which sizes, beside whom, with which goal.

mod fault;
mod flat;
mod harvest;
mod memory;
mod mirror;
mod paged;
mod plan;
mod range;
mod threads;
mod translate;

pub(crate) use plan::Plan;

use plan::GIB;

/// How much memory the rows are about.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    /// Pages of each size of the rows that have several.
    pub(crate) pages: Vec<u64>,
    /// Pages of the slot whose harvest finds every page dirty.
    pub(crate) dirty_slot: u64,
    /// Cores for two threads.
    pub(crate) cores: Vec<usize>,
}

impl Sizes {
    /// Those of the goals.
    pub(crate) fn full(cores: Vec<usize>) -> Self {
        Self {
            pages: vec![4 * GIB, 64 * GIB],
            dirty_slot: 16 * GIB,
            cores,
        }
    }

    /// Small ones.
    pub(crate) fn quick(cores: Vec<usize>) -> Self {
        Self {
            pages: vec![GIB / 4, GIB],
            dirty_slot: GIB / 4,
            cores,
        }
    }

    fn largest(&self) -> u64 {
        self.pages.iter().copied().max().unwrap_or(GIB)
    }
}

/// All rows in the order of the report.
pub(crate) fn all(sizes: &Sizes) -> Vec<Plan> {
    let mut plans = Vec::new();
    for &pages in &sizes.pages {
        plans.extend(range::rows(pages));
    }
    for &pages in &sizes.pages {
        plans.extend(fault::rows(pages, pages == sizes.largest()));
    }
    plans.extend(
        sizes
            .pages
            .iter()
            .take(1)
            .flat_map(|&pages| mirror::rows(pages)),
    );
    for &pages in &sizes.pages {
        plans.extend(translate::rows(pages));
    }
    plans.extend(threads::rows(&sizes.cores));
    plans.extend(harvest::rows(sizes.dirty_slot));
    plans.extend(memory::rows(sizes.largest()));
    plans
}
