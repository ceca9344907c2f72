//! Lookups.

use std::time::Duration;

use anyhow::ensure;

use super::{Candidate, Plan, bytes, flat::Loading, paged::Work};
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
        let (floor, count) = (order.clone(), order.len());
        let mut all = Candidate::tables(pages, &Work::Translate(order.clone()));
        all.push(Candidate::new(Role::Floor, "load", move || {
            Loading::new(pages, floor)
        }));
        plans.push(
            Plan::pages(format!("translate, {name}, {size}"), count, all)
                .goal("not slower than the fastest peer", &[Limit::Peer(1.0)]),
        );
    }
    for (name, order) in orders {
        let count = order.len();
        let slat = Candidate::new(Role::Slat, Slat::NAME, move || Guarded::new(pages, order));
        plans.push(Plan::pages(
            format!("translate, a guard each, {name}, {size}"),
            count,
            vec![slat],
        ));
    }
    plans
}

/// Lookups under a guard each.
struct Guarded {
    slat: Slat,
    order: Order,
    result: u64,
}

impl Guarded {
    fn new(pages: u64, order: Order) -> Self {
        let mut slat = Slat::new(pages);
        slat.populate(0, pages);
        Self {
            slat,
            order,
            result: 0,
        }
    }
}

impl Subject for Guarded {
    fn prepare(&mut self) {}

    fn run(&mut self) -> Duration {
        let Self {
            slat,
            order,
            result,
        } = self;
        timed(|| {
            *result = match order {
                Order::Sequential { pages } => slat.translate_each(0..*pages),
                Order::Random { frames, count } => {
                    slat.translate_each(frames[..*count].iter().map(|&frame| u64::from(frame)))
                }
            }
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
