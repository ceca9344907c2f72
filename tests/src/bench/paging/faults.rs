//! A fault of a page that is in the file, from the touch until the touching thread goes on:
//! resolved by `slat pager`, with its mirror, beside a thread that reads faults and maps pages.
//!
//! Every page of the view is touched once in random order, so that the pager's prefetch finds
//! nothing to guess. Samples are percentiles of one round over all pages; rounds take turns.

use super::{
    bare::Bare,
    touch::{at_random, percentile},
    vm::{Paged, View},
};
use crate::bench::rows::{Goal, Row};

/// Pages of a view: 64 MiB.
const PAGES: usize = 16 << 10;
/// Rounds that do not count.
const WARM_UP: u32 = 1;

/// Rows for 1 to 4 touching threads, at p50 and p99, and what the mirror takes.
///
/// # Errors
/// When something refuses.
pub fn measure(runs: u32) -> anyhow::Result<(Vec<Row>, String)> {
    let bare = View::new(PAGES)?;
    let _handler = Bare::start(std::sync::Arc::clone(&bare.uffd));
    let paged = Paged::start(PAGES)?;
    let mut rows = Vec::new();
    let mut mirror = String::new();
    for threads in 1..=4 {
        let row = |percent| {
            let name = format!("a fault, {threads} thread(s) touching at random, p{percent}");
            Row::new(name, "a bare handler", Some(Goal::AtMost(1.3)))
        };
        let (mut half, mut most) = (row(50), row(99));
        for run in 0..runs + WARM_UP {
            let seed = u64::from(run) + 1;
            bare.forget()?;
            let mut peer = at_random(&bare.view, threads, seed);
            paged.forget()?;
            let mut slat = at_random(&paged.view.view, threads, seed);
            if run >= WARM_UP {
                half.add(percentile(&mut slat, 50), percentile(&mut peer, 50));
                most.add(percentile(&mut slat, 99), percentile(&mut peer, 99));
            }
        }
        let state = paged.state()?;
        let mapped: u64 = state.mapped_pages.iter().sum();
        mirror = format!(
            "The mirror of {mapped} mapped pages takes {} bytes, {:.1} a page.",
            state.mirror_bytes,
            state.mirror_bytes as f64 / mapped.max(1) as f64
        );
        rows.extend([half, most]);
    }
    Ok((rows, mirror))
}
