//! Faults in a mirror with their neighbours, for an owner that has nothing to do: the MMU's own
//! share. No peer has such a thing, so there is no goal beside one.

use std::time::Duration;

use anyhow::ensure;

use super::{
    flat::Exchanging,
    plan::{Candidate, Plan, bytes},
};
use crate::{clock::timed, order::Order, report::Role, ring::Subject, slat::Mirror};

pub(super) fn rows(pages: u64) -> Vec<Plan> {
    let row = |batch: u64| {
        let slat = Candidate::new(Role::Slat, "slat", move || Faults {
            mirror: Mirror::new(pages),
            pages,
            batch,
        });
        let baseline = Candidate::new(Role::Baseline, "compare-exchange", move || {
            Exchanging::new(pages, Order::sequential(pages))
        });
        let name = format!("mirror, fault {batch} pages, {}", bytes(pages));
        Plan::pages(name, pages, vec![slat, baseline])
    };
    [1, 16, 512].map(row).into()
}

/// All pages of a slot, `batch` neighbours with each fault.
struct Faults {
    mirror: Mirror,
    pages: u64,
    batch: u64,
}

impl Subject for Faults {
    fn prepare(&mut self) {
        self.mirror.unmap();
    }

    fn run(&mut self) -> Duration {
        timed(|| self.mirror.fault_batches(self.batch))
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        let (mapped, pages) = (self.mirror.mapped(), self.pages);
        ensure!(
            mapped == pages,
            "slat: {mapped} pages are mapped, not {pages}"
        );
        Ok(())
    }
}
