//! Subjects of a row take turns: one sample of each, round and round, so that what disturbs the
//! machine for a while disturbs all of them.
//!
//! criterion measures one benchmark from beginning to end, so each subject has its own criterion on
//! its own thread, and the threads are used as coroutines: exactly one runs at any time. A thread
//! gives the turn to the next one whenever criterion asks it for a sample, and leaves the ring when
//! its criterion is done; analysis runs inside the turn.
//!
//! *Locking*: the turn is behind one mutex; a thread that does not have it waits on the condition
//! variable. A thread that panics leaves the ring on its way out.

use std::{
    path::Path,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use criterion::{Criterion, SamplingMode};
use serde::Deserialize;

use crate::report::Stat;

/// One thing to be measured, with its state.
pub(crate) trait Subject {
    /// Brings about the state that a run begins with. Not timed.
    fn prepare(&mut self);

    /// Does it once; how long that took.
    fn run(&mut self) -> Duration;

    /// Checks what the run did; `thorough` checks every page. Not timed.
    ///
    /// # Errors
    /// What is wrong.
    fn verify(&mut self, thorough: bool) -> anyhow::Result<()>;
}

/// Makes a subject, on the thread that will measure it.
pub(crate) type Factory = Box<dyn FnOnce() -> Box<dyn Subject> + Send>;

/// criterion's least, and enough: each sample goes over millions of pages.
const SAMPLES: usize = 10;
/// What a subject's samples may take together. A long run takes longer, a short one is repeated
/// within a sample.
const TIME: Duration = Duration::from_millis(300);

struct Ring {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    turn: usize,
    members: Vec<bool>,
}

impl Ring {
    fn new(members: usize) -> Self {
        Self {
            state: Mutex::new(State {
                turn: 0,
                members: vec![true; members],
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, me: usize) {
        let state = self.state();
        drop(
            self.changed
                .wait_while(state, |state| state.turn != me)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn hand_on(&self, me: usize) {
        let mut state = self.state();
        let count = state.members.len();
        let next = (1..=count)
            .map(|step| (me + step) % count)
            .find(|&next| state.members[next]);
        state.turn = next.unwrap_or(me);
        drop(state);
        self.changed.notify_all();
    }
}

/// A place in the ring, given up when dropped.
struct Place<'a> {
    ring: &'a Ring,
    me: usize,
}

impl<'a> Place<'a> {
    /// Waits for the first turn.
    fn enter(ring: &'a Ring, me: usize) -> Self {
        ring.wait(me);
        Self { ring, me }
    }

    /// Lets each other member take its turn.
    fn next_turn(&self) {
        self.ring.hand_on(self.me);
        self.ring.wait(self.me);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.ring.state().members[self.me] = false;
        self.ring.hand_on(self.me);
    }
}

/// Measures `subjects` in turns. The result is nanoseconds for each of `operations` operations of a
/// run, in the same order. criterion's files go below `directory`.
///
/// # Errors
/// When a result was wrong or criterion's files cannot be read.
pub(crate) fn measure(
    directory: &Path,
    row: &str,
    operations: u64,
    subjects: Vec<Factory>,
) -> anyhow::Result<Vec<Stat>> {
    let ring = Ring::new(subjects.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = subjects
            .into_iter()
            .enumerate()
            .map(|(me, make)| {
                let ring = &ring;
                scope.spawn(move || {
                    let place = Place::enter(ring, me);
                    let outcome = one(directory, row, me, make(), &place);
                    outcome.and_then(|()| read(directory, row, me, operations))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .map_err(|_| anyhow!("a measuring thread panicked"))?
            })
            .collect()
    })
}

/// The whole of one subject's criterion.
fn one(
    directory: &Path,
    row: &str,
    me: usize,
    mut subject: Box<dyn Subject>,
    place: &Place<'_>,
) -> anyhow::Result<()> {
    let mut criterion = Criterion::default()
        .output_directory(directory)
        .without_plots()
        .with_output_color(false)
        .sample_size(SAMPLES)
        // A single run: it touches whatever was not touched yet.
        .warm_up_time(Duration::from_nanos(1))
        .measurement_time(TIME)
        .nresamples(1000);
    let mut outcome = Ok(());
    let mut thorough = true;
    let mut group = criterion.benchmark_group(row);
    group.sampling_mode(SamplingMode::Flat);
    group.bench_function(me.to_string(), |bencher| {
        place.next_turn();
        bencher.iter_custom(|times| {
            let mut sum = Duration::ZERO;
            for _ in 0..times {
                if outcome.is_err() {
                    break;
                }
                subject.prepare();
                sum += subject.run();
                outcome = subject.verify(std::mem::take(&mut thorough));
            }
            sum.max(Duration::from_nanos(1))
        });
    });
    group.finish();
    outcome
}

#[derive(Debug, Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Debug, Deserialize)]
struct Estimate {
    point_estimate: f64,
}

#[derive(Debug, Deserialize)]
struct Sample {
    iters: Vec<f64>,
    times: Vec<f64>,
}

/// What criterion found, from its files.
fn read(directory: &Path, row: &str, me: usize, operations: u64) -> anyhow::Result<Stat> {
    let place = directory.join(row).join(me.to_string()).join("new");
    let text = |name: &str| {
        let path = place.join(name);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    let estimates: Estimates = serde_json::from_str(&text("estimates.json")?)?;
    let sample: Sample = serde_json::from_str(&text("sample.json")?)?;
    let each = || {
        let pairs = sample.times.iter().zip(&sample.iters);
        pairs.map(|(time, iterations)| time / iterations / operations as f64)
    };
    Ok(Stat {
        median: estimates.median.point_estimate / operations as f64,
        min: each().fold(f64::INFINITY, f64::min),
        max: each().fold(0.0, f64::max),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn members_take_turns_until_each_has_left() {
        let ring = Ring::new(3);
        let order = Mutex::new(Vec::new());
        let running = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for me in 0..3 {
                let (ring, order, running) = (&ring, &order, &running);
                scope.spawn(move || {
                    let place = Place::enter(ring, me);
                    for _ in 0..=me {
                        place.next_turn();
                        assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0);
                        order.lock().unwrap().push(me);
                        running.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 1, 2, 2]);
    }
}
