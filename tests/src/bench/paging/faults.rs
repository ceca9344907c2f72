//! A page that is not mapped, from the touch until the touching thread goes on: resolved by
//! `slat pager`, with its mirror, beside a process that reads faults and maps pages.
//!
//! Three orders of touching, each of all pages of a view once:
//!
//! * *at random* and *far apart*: every page costs the bare handler a fault. Slat maps the group of
//!   sixteen around it, so most touches are none: their p99 is that of a fault, their p50 is not.
//!   Samples are percentiles of one round over all pages.
//! * *in order*: the pager maps what comes next, and most pages cost no fault. The sample is what a
//!   page cost in all; the same is shown of touching at random.
//!
//! Bare handlers of one thread and of as many as the pager has take part, each with a view of its
//! own; a row is of the one that was faster in it. Rounds take turns.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::{
    bare::Bare,
    touch::{Order, each, mean, orders, percentile},
    vm::{PATIENCE, Paged, View},
};
use crate::{
    bench::rows::{Goal, Row, Unit},
    guest::MIB,
};

/// Pages of a view: 64 MiB.
const PAGES: usize = 16 << 10;
/// Rounds that do not count.
const WARM_UP: u32 = 1;
/// Threads of bare handlers: one, and as many as resolve faults in a pager (one that reads them,
/// two that help it).
const BARE: [u64; 2] = [1, 3];
/// Most threads that touch.
const TOUCHING: usize = 4;
/// Between two looks at what the mirror says.
const LOOK: Duration = Duration::from_millis(1);
/// What a fault may cost beside a bare one.
const GOAL: Goal = Goal::AtMost(1.3);
/// What the mirror may take of what it maps: as much as page tables of the Common MMU.
const MIRROR: Goal = Goal::AtMost(0.0025);

/// What is touched, and what is taken of it.
#[derive(Clone, Copy, Debug)]
struct Round {
    order: Order,
    /// Contents are gone, too.
    missing: bool,
    /// Percentiles; otherwise what a page costs in all.
    each: bool,
}

const ROUNDS: [Round; 5] = [
    Round {
        order: Order::Random,
        missing: false,
        each: true,
    },
    Round {
        order: Order::Apart,
        missing: false,
        each: true,
    },
    Round {
        order: Order::Random,
        missing: true,
        each: true,
    },
    Round {
        order: Order::Random,
        missing: false,
        each: false,
    },
    Round {
        order: Order::Ascending,
        missing: false,
        each: false,
    },
];

impl Round {
    fn how(self) -> &'static str {
        match self.order {
            Order::Random => "at random",
            Order::Apart => "far apart",
            Order::Ascending => "in order",
        }
    }

    /// Of what a sample has: for people, and for programs.
    fn names(self, threads: usize) -> Vec<[String; 2]> {
        let (how, missing) = (self.how(), self.missing);
        let key = how.replace(' ', "-");
        if !self.each {
            let name = format!("a page, {threads} thread(s) touching {how}");
            return vec![[name, format!("pages.{key}.{threads}")]];
        }
        let (what, kind) = match missing {
            true => ("a fault without contents", "missing"),
            false => ("a touch", "faults"),
        };
        let name = |percent| {
            [
                format!("{what}, {threads} thread(s) touching {how}, p{percent}"),
                format!("{kind}.{key}.{threads}.p{percent}"),
            ]
        };
        vec![name(50), name(99)]
    }

    /// One sample for each name.
    fn samples(self, view: &View, threads: usize, seed: u64) -> Vec<f64> {
        let orders = orders(self.order, PAGES, threads, seed);
        if !self.each {
            return vec![mean(&view.view, &orders)];
        }
        let mut all = each(&view.view, &orders);
        vec![percentile(&mut all, 50), percentile(&mut all, 99)]
    }

    fn goal(self) -> Option<Goal> {
        self.each.then_some(GOAL)
    }
}

/// Both sides.
struct Sides {
    slat: Paged,
    bare: Vec<Bare>,
    /// Faults that each had in the rounds that counted, Slat first, and pages touched.
    faults: Vec<u64>,
    pages: u64,
}

impl Sides {
    fn faults_so_far(&self) -> anyhow::Result<Vec<u64>> {
        let slat = self.slat.state()?.faults;
        let mut all = vec![slat.missing + slat.minor];
        for bare in &self.bare {
            all.push(bare.faults()?);
        }
        Ok(all)
    }

    /// Rows of one round with so many threads: by name, the one beside the faster bare handler.
    fn rows(&mut self, round: Round, threads: usize, runs: u32) -> anyhow::Result<Vec<Row>> {
        let beside = |bare: &Bare| -> Vec<Row> {
            let peer = format!("a bare handler, {} thread(s)", bare.threads);
            let row = |[name, key]: [String; 2]| {
                let row = Row::new(name, peer.as_str(), round.goal());
                row.keyed(key).in_pairs()
            };
            round.names(threads).into_iter().map(row).collect()
        };
        let mut rows: Vec<Vec<Row>> = self.bare.iter().map(beside).collect();
        for run in 0..runs + WARM_UP {
            let seed = u64::from(run) + 1;
            let before = self.faults_so_far()?;
            self.slat.forget(round.missing)?;
            let slat = round.samples(&self.slat.view, threads, seed);
            for (bare, rows) in self.bare.iter().zip(&mut rows) {
                bare.view.forget(round.missing)?;
                let peer = round.samples(&bare.view, threads, seed);
                if run >= WARM_UP {
                    for ((row, slat), peer) in rows.iter_mut().zip(&slat).zip(peer) {
                        row.add(*slat, peer);
                    }
                }
            }
            let after = self.faults_so_far()?;
            let more = after
                .iter()
                .zip(before)
                .map(|(after, before)| after - before);
            for (sum, more) in self.faults.iter_mut().zip(more) {
                *sum += more;
            }
            self.pages += PAGES as u64;
        }
        let mut rows = rows.into_iter();
        let mut fastest = rows.next().unwrap_or_default();
        for (fast, row) in rows.flat_map(|rows| rows.into_iter().enumerate()) {
            if row.peer_median() < fastest[fast].peer_median() {
                fastest[fast] = row;
            }
        }
        Ok(fastest)
    }

    /// Faults a page since this was asked for the last time, for people.
    fn faults_a_page(&mut self) -> String {
        let pages = std::mem::take(&mut self.pages).max(1) as f64;
        let each = self.faults.iter_mut().map(|faults| {
            let faults = std::mem::take(faults) as f64;
            format!("{:.3}", faults / pages)
        });
        each.collect::<Vec<_>>().join(", ")
    }
}

/// Rows for 1 to 4 touching threads, and what is to be said below them.
///
/// # Errors
/// When something refuses.
pub fn measure(runs: u32) -> anyhow::Result<(Vec<Row>, Vec<String>)> {
    let bare = BARE.map(|threads| Bare::start(PAGES, threads));
    let mut sides = Sides {
        slat: Paged::start(PAGES)?,
        bare: bare.into_iter().collect::<anyhow::Result<_>>()?,
        faults: vec![0; 1 + BARE.len()],
        pages: 0,
    };
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for round in ROUNDS {
        for threads in 1..=TOUCHING {
            rows.extend(sides.rows(round, threads, runs)?);
        }
        if !round.each && round.order == Order::Random {
            // It was said above.
            continue;
        }
        let how = round.how();
        let contents = if round.missing {
            ", without contents"
        } else {
            ""
        };
        notes.push(format!(
            "Faults a page, touching {how}{contents}: {} (Slat; bare handlers of {} and {} threads).",
            sides.faults_a_page(),
            BARE[0],
            BARE[1],
        ));
    }
    Ok((rows, notes))
}

/// A row of what the mirror takes of a guest of so many MiB that has all of it mapped.
///
/// # Errors
/// When something refuses.
pub fn mirror(memory_mib: u64) -> anyhow::Result<Row> {
    let pages = usize::try_from(memory_mib * MIB)? / slat_paging::PAGE;
    let slat = Paged::start(pages)?;
    let _ = mean(&slat.view.view, &orders(Order::Ascending, pages, 1, 0));
    // Whoever touched goes on as soon as the kernel has mapped; the mirror notes it a moment later.
    let begun = Instant::now();
    let state = loop {
        let state = slat.state()?;
        let mapped: u64 = state.mapped_pages.iter().sum();
        if mapped == pages as u64 {
            break state;
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "{mapped} of {pages} pages are mapped"
        );
        std::thread::sleep(LOOK);
    };
    let name = format!("the mirror of {memory_mib} MiB, all of it mapped by 4 KiB");
    let mut row = Row::new(name, "what it maps", Some(MIRROR));
    row = row.of(Unit::Bytes).keyed("mirror");
    row.add(state.mirror_bytes as f64, (memory_mib * MIB) as f64);
    Ok(row)
}
