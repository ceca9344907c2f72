//! Lookups.

use std::{hint::black_box, time::Duration};

use anyhow::ensure;

use super::{
    flat::Loading,
    paged::Work,
    plan::{Candidate, Plan, bytes},
};
use crate::{
    clock::timed,
    order::Order,
    report::{Limit, Role},
    ring::Subject,
    slat::Slat,
    table::{HOST_BASE, Table as _},
};

/// Lookups in a run of a random row; the table has as many pages as the row says.
const LOOKUPS: u64 = 4 << 20;

pub(super) fn rows(pages: u64) -> Vec<Plan> {
    let size = bytes(pages);
    let orders = [
        ("sequential", Order::sequential(pages)),
        ("random", Order::random(pages, LOOKUPS)),
    ];
    let mut plans = Vec::new();
    for (name, order) in &orders {
        let (baseline, count) = (order.clone(), order.len());
        let mut all = Candidate::tables(pages, &Work::Translate(order.clone()));
        all.push(Candidate::new(Role::Baseline, "load", move || {
            Loading::new(pages, baseline)
        }));
        plans.push(
            Plan::pages(format!("translate, {name}, {size}"), count, all)
                .goal("not slower than the fastest peer", &[Limit::Peer(1.0)]),
        );
    }
    for (what, way) in [
        ("translate, a guard each", Way::Translate),
        ("access, a read", Way::Access),
    ] {
        for (name, order) in &orders {
            let (own, count) = (order.clone(), order.len());
            // The peers' only lookup, which has no guard: for comparison, and no goal.
            let mut all = Candidate::peers(pages, &Work::Translate(order.clone()));
            let slat = move || Guarded::new(pages, own, way);
            all.insert(0, Candidate::new(Role::Slat, Slat::NAME, slat));
            plans.push(Plan::pages(format!("{what}, {name}, {size}"), count, all));
        }
    }
    plans
}

/// Which lookup.
#[derive(Clone, Copy)]
enum Way {
    /// Where a frame leads, asked by whoever comes.
    Translate,
    /// A vCPU's read that missed its TLB.
    Access,
}

/// Lookups under a guard each.
struct Guarded {
    slat: Slat,
    order: Order,
    way: Way,
    result: u64,
}

impl Guarded {
    fn new(pages: u64, order: Order, way: Way) -> Self {
        let mut slat = Slat::new(pages);
        slat.populate(0, pages);
        Self {
            slat,
            order,
            way,
            result: 0,
        }
    }

    fn look_up(&self, frames: impl Iterator<Item = u64>) -> u64 {
        match self.way {
            Way::Translate => self.slat.translate_each(frames),
            Way::Access => self.slat.access_each(frames),
        }
    }
}

impl Subject for Guarded {
    fn prepare(&mut self) {}

    fn run(&mut self) -> Duration {
        timed(|| {
            self.result = black_box(match &self.order {
                Order::Sequential { pages } => self.look_up(0..black_box(*pages)),
                Order::Random { frames, count } => {
                    self.look_up(frames[..*count].iter().map(|&frame| u64::from(frame)))
                }
            });
        })
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        let expected = self.order.sum() + HOST_BASE * self.order.len();
        ensure!(
            self.result == expected,
            "slat: the host frames sum up to {}, not {expected}",
            self.result
        );
        Ok(())
    }
}
