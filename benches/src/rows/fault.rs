//! Faults one by one and in batches.

use super::{
    flat::Exchanging,
    paged::Work,
    plan::{Candidate, Plan, bytes},
};
use crate::{
    order::Order,
    report::{Limit, Role},
};

/// Faults in a run of a random row, at most: as many as 32 GiB have pages, so that each table of 64
/// GiB is filled to 0.5.
const FAULTS: u64 = 8 << 20;

/// `largest`: the size that the goal for random faults is about.
pub(super) fn rows(pages: u64, largest: bool) -> Vec<Plan> {
    let size = bytes(pages);
    let row = |name: &str, order: Order| {
        let count = order.len();
        let mut all = Candidate::tables(pages, &Work::Fault(order.clone()));
        all.push(Candidate::new(
            Role::Baseline,
            "compare-exchange",
            move || Exchanging::new(pages, order),
        ));
        Plan::pages(format!("fault, {name}, {size}"), count, all)
    };
    let mut random = row("random", Order::random(pages, FAULTS));
    if largest {
        random = random.goal("at most 1.5x the fastest peer's map", &[Limit::Peer(1.5)]);
    }
    let mut plans = vec![
        row("sequential", Order::sequential(pages))
            .goal("at most 5x the compare-exchange", &[Limit::Baseline(5.0)]),
        random,
    ];
    for batch in [16, 64, 512] {
        let all = Candidate::tables(pages, &Work::Batch(batch));
        plans.push(
            Plan::pages(format!("pre-fault {batch} pages, {size}"), pages, all).goal(
                "at most 2x the fastest peer's range map",
                &[Limit::Peer(2.0)],
            ),
        );
    }
    plans
}
