//! Two threads beside one.
//!
//! The same pages are mapped by one thread and by two, in turns. *Disjoint*: each thread has its
//! own part of the guest. *Same region*: both are always in the same 2 MiB, each with its own part
//! of the pages, in random order; they wait for each other before each region, and the first fault
//! of a region races for its table. The baseline does the same with a bare compare-exchange on a
//! flat array and shows what the two cores give.
//!
//! Wall-clock time from the common start to the end of the slower thread. Two threads need two
//! cores at once, so another program on either would be counted against them; a run in which a
//! thread had to wait for its core is repeated, and of the repetitions the one that waited least
//! counts.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::ensure;

use super::plan::{Candidate, GIB, Kind, Plan, bytes};
use crate::{
    baseline::Atomics,
    clock,
    order::shuffle,
    report::{Limit, Role},
    ring::Subject,
    slat::{Slat, Vcpu},
    table::Table as _,
};

/// Runs for one result, at most.
const ATTEMPTS: usize = 10;
/// A run is good when its threads waited less than this part of it.
const WAITED: f64 = 0.01;
/// Pages of the guest: few, so that a run ends before another program comes along.
const PAGES: u64 = GIB;
/// Pages of 2 MiB.
const REGION: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Disjoint,
    SameRegion,
}

/// What several threads may fault into.
trait Shared: Sync {
    type Vcpu<'a>
    where
        Self: 'a;
    fn empty(pages: u64) -> Self;
    fn reset(&mut self);
    fn vcpu(&self) -> Self::Vcpu<'_>;
    fn fault(&self, vcpu: &mut Self::Vcpu<'_>, frame: u64) -> bool;
    fn is_mapped(&self, frame: u64) -> bool;
}

impl Shared for Slat {
    type Vcpu<'a> = Vcpu;

    fn empty(pages: u64) -> Self {
        <Slat as crate::table::Table>::new(pages)
    }

    fn reset(&mut self) {
        Slat::reset(self);
    }

    fn vcpu(&self) -> Vcpu {
        Slat::vcpu(self)
    }

    #[inline]
    fn fault(&self, vcpu: &mut Vcpu, frame: u64) -> bool {
        self.write(vcpu, frame)
    }

    fn is_mapped(&self, frame: u64) -> bool {
        self.mapping(frame).is_some()
    }
}

impl Shared for Atomics {
    type Vcpu<'a> = ();

    fn empty(pages: u64) -> Self {
        Self::new(pages)
    }

    fn reset(&mut self) {
        self.clear();
    }

    fn vcpu(&self) {}

    #[inline]
    fn fault(&self, (): &mut (), frame: u64) -> bool {
        self.exchange(frame)
    }

    fn is_mapped(&self, frame: u64) -> bool {
        // Only an empty entry can be exchanged.
        !self.exchange(frame)
    }
}

/// Waits until all threads are here, without sleeping.
#[derive(Default)]
struct Gate(AtomicUsize);

impl Gate {
    /// `round` counts from 1.
    fn meet(&self, threads: usize, round: usize) {
        self.0.fetch_add(1, Ordering::AcqRel);
        while self.0.load(Ordering::Acquire) < threads * round {
            spin_loop();
        }
    }
}

struct Threads<S> {
    shared: S,
    pages: u64,
    layout: Layout,
    /// One thread on each.
    cores: Vec<usize>,
    /// Each region's frames in random order, region by region.
    shuffled: Vec<u32>,
    mapped: AtomicU64,
}

impl<S: Shared> Threads<S> {
    fn new(pages: u64, layout: Layout, cores: Vec<usize>) -> Self {
        let mut shuffled: Vec<u32> = (0..pages as u32).collect();
        for (number, region) in shuffled.chunks_mut(REGION).enumerate() {
            shuffle(region, number as u64 + 1);
        }
        Self {
            shared: S::empty(pages),
            pages,
            layout,
            cores,
            shuffled,
            mapped: AtomicU64::new(0),
        }
    }

    /// What thread `me` does.
    fn thread(&self, me: usize, gate: &Gate) -> Part {
        let threads = self.cores.len();
        let mut vcpu = self.shared.vcpu();
        let mut mapped = 0;
        let mut fault = |frame| mapped += u64::from(self.shared.fault(&mut vcpu, frame));
        gate.meet(threads, 1);
        let waited = clock::waited_for_core();
        let begun = Instant::now();
        match self.layout {
            Layout::Disjoint => {
                let share = self.pages / threads as u64;
                let first = share * me as u64;
                (first..first + share).for_each(&mut fault);
            }
            Layout::SameRegion => {
                let share = REGION / threads;
                for (number, region) in self.shuffled.chunks(REGION).enumerate() {
                    if threads > 1 {
                        gate.meet(threads, number + 2);
                    }
                    let mine = &region[share * me..share * (me + 1)];
                    mine.iter().for_each(|&frame| fault(u64::from(frame)));
                }
            }
        }
        let done = Instant::now();
        let waited = clock::waited_for_core().saturating_sub(waited);
        self.mapped.fetch_add(mapped, Ordering::Relaxed);
        Part {
            begun,
            done,
            waited,
        }
    }

    /// All threads once: how long it took, and how long threads waited for their cores.
    fn race(&self) -> (Duration, Duration) {
        let gate = Gate::default();
        let parts: Vec<_> = std::thread::scope(|scope| {
            let gate = &gate;
            let threads: Vec<_> = self
                .cores
                .iter()
                .enumerate()
                .map(|(me, &core)| {
                    scope.spawn(move || {
                        clock::pin(core).expect("a core that the process may use");
                        self.thread(me, gate)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("faulting does not panic"))
                .collect()
        });
        let begun = parts.iter().map(|part| part.begun).min();
        let done = parts.iter().map(|part| part.done).max();
        let waited = parts.iter().map(|part| part.waited).sum();
        match (begun, done) {
            (Some(begun), Some(done)) => (done - begun, waited),
            _ => (Duration::ZERO, waited),
        }
    }
}

/// One thread's part of a run.
struct Part {
    begun: Instant,
    done: Instant,
    waited: Duration,
}

impl<S: Shared> Subject for Threads<S> {
    /// Each attempt of a run begins with an empty table.
    fn prepare(&mut self) {}

    fn run(&mut self) -> Duration {
        let mut best: Option<(Duration, Duration)> = None;
        for _ in 0..ATTEMPTS {
            self.shared.reset();
            *self.mapped.get_mut() = 0;
            let (took, waited) = self.race();
            if best.is_none_or(|(_, least)| waited < least) {
                best = Some((took, waited));
            }
            if waited < took.mul_f64(WAITED) {
                break;
            }
        }
        best.unwrap_or_default().0
    }

    fn verify(&mut self, thorough: bool) -> anyhow::Result<()> {
        let mapped = *self.mapped.get_mut();
        ensure!(
            mapped == self.pages,
            "{mapped} of {} faults mapped a page",
            self.pages
        );
        let step = if thorough { 1 } else { 1021 };
        for frame in (0..self.pages).step_by(step) {
            ensure!(self.shared.is_mapped(frame), "frame {frame} is not mapped");
        }
        Ok(())
    }
}

pub(super) fn rows(cores: &[usize]) -> Vec<Plan> {
    let pages = PAGES;
    let row = |name: &str, layout: Layout| {
        let name = format!("two threads, {name}, {}", bytes(pages));
        let Some(two) = cores.get(..2).map(<[usize]>::to_vec) else {
            let mut plan = Plan::pages(name, pages, Vec::new());
            plan.kind = Kind::Skipped("this process may use one core only".to_owned());
            return plan;
        };
        let one = vec![two[0]];
        let subject = |role, name: &str, cores: Vec<usize>, baseline: bool| {
            if baseline {
                Candidate::new(role, name, move || {
                    Threads::<Atomics>::new(pages, layout, cores)
                })
            } else {
                Candidate::new(role, name, move || {
                    Threads::<Slat>::new(pages, layout, cores)
                })
            }
        };
        let all = vec![
            subject(Role::Slat, "slat", two.clone(), false),
            subject(Role::OneThread, "slat, one thread", one.clone(), false),
            subject(Role::Baseline, "compare-exchange, two threads", two, true),
            subject(Role::Other, "compare-exchange, one thread", one, true),
        ];
        Plan::pages(name, pages, all)
    };
    vec![
        row("disjoint regions", Layout::Disjoint).goal(
            "at least 1.8x the pages/s of one thread",
            &[Limit::OneThread(1.8)],
        ),
        row("same 2 MiB region", Layout::SameRegion).goal(
            "not below the pages/s of one thread",
            &[Limit::OneThread(1.0)],
        ),
    ]
}
