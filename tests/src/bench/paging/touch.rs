//! Threads that touch pages, as vCPUs do, and how long that took.

use std::{sync::atomic::Ordering, thread, time::Instant};

use slat_paging::PAGE;

use crate::bench::mapping::Mapping;

/// Pages between two touches that are far apart: more than a pager maps beside a page that it does
/// not see coming (16), so that no touch is spared its fault.
const APART: usize = 32;

/// In which order a thread touches the pages of its part, each once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// One after the other.
    Ascending,
    /// Every 32nd, then those after them, and so on.
    Apart,
    /// By chance.
    Random,
}

/// Numbers of pages by thread: all pages, each once. At random a thread's part is anywhere,
/// otherwise the threads' parts lie one after the other.
#[must_use]
pub fn orders(order: Order, pages: usize, threads: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut all: Vec<usize> = (0..pages).collect();
    if order == Order::Random {
        fastrand::Rng::with_seed(seed).shuffle(&mut all);
    }
    let parts = all.chunks(pages.div_ceil(threads.max(1)).max(1));
    let apart = |part: &[usize]| {
        let passes = (0..APART).flat_map(|first| part.iter().skip(first).step_by(APART));
        passes.copied().collect()
    };
    let own = |part: &[usize]| match order {
        Order::Apart => apart(part),
        _ => part.to_vec(),
    };
    parts.map(own).collect()
}

/// Runs a thread for each part at once; what each of them found.
fn at_once<T: Send>(orders: &[Vec<usize>], touch: impl Fn(&[usize]) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let touch = &touch;
        let touching: Vec<_> = orders
            .iter()
            .map(|pages| scope.spawn(move || touch(pages)))
            .collect();
        let ended = touching.into_iter().map(thread::ScopedJoinHandle::join);
        ended.flatten().collect()
    })
}

/// Nanoseconds of each touch of a page.
#[must_use]
pub fn each(view: &Mapping, orders: &[Vec<usize>]) -> Vec<f64> {
    let words = view.words();
    let touch = |page: &usize| {
        let begun = Instant::now();
        words[page * (PAGE / 8)].load(Ordering::Relaxed);
        begun.elapsed().as_nanos() as f64
    };
    at_once(orders, |pages| pages.iter().map(touch).collect::<Vec<_>>()).concat()
}

/// Nanoseconds a page: what it took the threads, on the average, to touch all of theirs.
#[must_use]
pub fn mean(view: &Mapping, orders: &[Vec<usize>]) -> f64 {
    let words = view.words();
    let all = |pages: &[usize]| {
        let begun = Instant::now();
        for page in pages {
            words[page * (PAGE / 8)].load(Ordering::Relaxed);
        }
        begun.elapsed().as_nanos() as f64 / pages.len().max(1) as f64
    };
    let means = at_once(orders, all);
    means.iter().sum::<f64>() / means.len().max(1) as f64
}

/// The value below which `percent` of these are.
#[must_use]
pub fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent / 100).min(values.len().saturating_sub(1));
    values.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_touched_once_in_every_order() {
        let view = Mapping::memfd(64 * PAGE).unwrap();
        for order in [Order::Ascending, Order::Apart, Order::Random] {
            for threads in 1..=5 {
                let orders = orders(order, 64, threads, 1);
                assert_eq!(orders.len(), threads);
                assert_eq!(each(&view, &orders).len(), 64);
                let mut all = orders.concat();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..64), "{order:?}");
            }
        }
        let mut values = [3.0, 1.0, 2.0, 4.0];
        assert_eq!(percentile(&mut values, 50), 3.0);
        assert_eq!(percentile(&mut values, 99), 4.0);
    }

    #[test]
    fn touches_that_are_apart_are_as_far_as_they_say() {
        let orders = orders(Order::Apart, 256, 2, 1);
        assert_eq!(orders[1][..5], [128, 160, 192, 224, 129]);
        let near = |pair: &[usize]| pair[0].abs_diff(pair[1]) < APART;
        assert!(!orders[0].windows(2).any(near));
    }
}
