//! Work on whole ranges.

use std::time::Duration;

use anyhow::ensure;

use super::{
    flat::{Copying, Sweep, Sweeping},
    paged::Work,
    plan::{Candidate, Plan, bytes},
};
use crate::{
    clock::timed,
    report::{Limit, Role},
    ring::Subject,
    slat::Slat,
    table::Table as _,
};

const FASTER: &str = "faster than every peer";

fn sweep(pages: u64, name: &str, sweep: Sweep) -> Candidate {
    Candidate::new(Role::Baseline, name, move || Sweeping::new(pages, sweep))
}

fn row(operation: &str, pages: u64, work: &Work, baseline: Candidate) -> Plan {
    let mut all = Candidate::tables(pages, work);
    all.push(baseline);
    Plan::pages(format!("{operation}, {}", bytes(pages)), pages, all)
        .goal(FASTER, &[Limit::FasterThanPeers])
}

pub(super) fn rows(pages: u64) -> Vec<Plan> {
    let store = || sweep(pages, "store", Sweep::Store);
    let clear = || sweep(pages, "store of 0", Sweep::Clear);
    let and = || sweep(pages, "AND sweep", Sweep::And);
    let copy = Candidate::new(Role::Other, "memcpy", move || Copying::new(pages));

    let mut populate = row("populate a range", pages, &Work::Populate, store());
    populate.also(copy);
    let protect = row("write-protect a slot", pages, &Work::Protect, and()).goal(
        "faster than every peer, at most 3x the AND sweep",
        &[Limit::FasterThanPeers, Limit::Baseline(3.0)],
    );
    let mut clear_dirty = vec![Candidate::new(Role::Slat, Slat::NAME, move || {
        ClearDirty::new(pages)
    })];
    // The peers have no dirty log: the same change of every entry.
    clear_dirty.extend(Candidate::peers(pages, &Work::Protect));
    clear_dirty.push(and());
    let clear_dirty = Plan::pages(
        format!("clear dirty, all dirty, {}", bytes(pages)),
        pages,
        clear_dirty,
    )
    .goal(FASTER, &[Limit::FasterThanPeers]);
    vec![
        populate,
        protect,
        clear_dirty,
        row("unmap a range", pages, &Work::Unmap, clear()),
        row("zap all", pages, &Work::ZapAll, clear()),
    ]
}

/// `KVM_CLEAR_DIRTY_LOG` over a slot of which every page was written.
struct ClearDirty {
    slat: Slat,
    pages: u64,
    bitmap: Vec<u64>,
}

impl ClearDirty {
    fn new(pages: u64) -> Self {
        let slat = Slat::new(pages);
        slat.log_dirty(true);
        Self {
            slat,
            pages,
            bitmap: vec![u64::MAX; pages.div_ceil(64) as usize],
        }
    }
}

impl Subject for ClearDirty {
    fn prepare(&mut self) {
        self.slat.write_all();
        assert_eq!(self.slat.dirty_pages(), self.pages, "each page was written");
    }

    fn run(&mut self) -> Duration {
        timed(|| self.slat.clear_dirty(&self.bitmap))
    }

    fn verify(&mut self, thorough: bool) -> anyhow::Result<()> {
        let dirty = self.slat.dirty_pages();
        ensure!(dirty == 0, "slat: {dirty} pages are dirty after clearing");
        let step = if thorough { 1 } else { 1021 };
        for frame in (0..self.pages).step_by(step) {
            let mapping = self.slat.mapping(frame);
            ensure!(
                mapping.is_some_and(|mapping| !mapping.writable),
                "slat: after clearing, frame {frame} is {mapping:?}"
            );
        }
        Ok(())
    }
}
