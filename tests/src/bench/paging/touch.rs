//! Threads that touch pages at random, as vCPUs do, and how long each touch took.

use std::{sync::atomic::Ordering, thread, time::Instant};

use slat_paging::PAGE;

use crate::bench::mapping::Mapping;

/// Nanoseconds of each first touch of a page: every page once, in random order, by so many threads
/// at once, each with a part of its own.
#[must_use]
pub fn at_random(view: &Mapping, threads: usize, seed: u64) -> Vec<f64> {
    let words = view.words();
    let per_page = PAGE / 8;
    let mut pages: Vec<usize> = (0..words.len() / per_page).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut pages);
    let part = pages.len().div_ceil(threads.max(1));
    thread::scope(|scope| {
        let touching: Vec<_> = pages
            .chunks(part)
            .map(|pages| {
                scope.spawn(move || {
                    let touch = |page: &usize| {
                        let begun = Instant::now();
                        words[page * per_page].load(Ordering::Relaxed);
                        begun.elapsed().as_nanos() as f64
                    };
                    pages.iter().map(touch).collect::<Vec<_>>()
                })
            })
            .collect();
        let join =
            |thread: thread::ScopedJoinHandle<'_, Vec<f64>>| thread.join().unwrap_or_default();
        touching.into_iter().flat_map(join).collect()
    })
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
    fn every_page_is_touched_once() {
        let view = Mapping::memfd(64 * PAGE).unwrap();
        for threads in 1..=5 {
            assert_eq!(at_random(&view, threads, 1).len(), 64);
        }
        let mut values = [3.0, 1.0, 2.0, 4.0];
        assert_eq!(percentile(&mut values, 50), 3.0);
        assert_eq!(percentile(&mut values, 99), 4.0);
    }
}
