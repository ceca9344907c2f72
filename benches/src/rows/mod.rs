//! The rows: which operations, at which sizes, beside whom, with which goal.

mod fault;
mod flat;
mod harvest;
mod memory;
mod paged;
mod range;
mod threads;
mod translate;

use std::path::Path;

use crate::{
    peers::Generic,
    report::{Counted, Figure, Limit, Role, Row},
    ring::{self, Factory, Subject},
    slat::Slat,
    table::Table,
};

use self::paged::{Paged, Work};

/// Pages in a gibibyte.
const GIB: u64 = 1 << 18;

/// How much memory the rows are about.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    /// Pages of each size of the rows that have several.
    pub(crate) pages: Vec<u64>,
    /// Pages of the slot whose harvest finds every page dirty.
    pub(crate) dirty_slot: u64,
    /// Cores for two threads.
    pub(crate) cores: Vec<usize>,
}

impl Sizes {
    /// Those of the goals.
    pub(crate) fn full(cores: Vec<usize>) -> Self {
        Self {
            pages: vec![4 * GIB, 64 * GIB],
            dirty_slot: 16 * GIB,
            cores,
        }
    }

    /// Small ones.
    pub(crate) fn quick(cores: Vec<usize>) -> Self {
        Self {
            pages: vec![GIB / 4, GIB],
            dirty_slot: GIB / 4,
            cores,
        }
    }

    fn largest(&self) -> u64 {
        self.pages.iter().copied().max().unwrap_or(GIB)
    }
}

/// A size in words.
fn bytes(pages: u64) -> String {
    if pages >= GIB {
        format!("{} GiB", pages / GIB)
    } else {
        format!("{} MiB", pages >> 8)
    }
}

/// A subject to be.
struct Candidate {
    role: Role,
    name: String,
    make: Factory,
}

impl Candidate {
    fn new<S: Subject + 'static>(
        role: Role,
        name: impl Into<String>,
        make: impl FnOnce() -> S + Send + 'static,
    ) -> Self {
        Self {
            role,
            name: name.into(),
            make: Box::new(move || Box::new(make())),
        }
    }

    fn table<T: Table + 'static>(role: Role, pages: u64, work: Work) -> Self {
        Self::new(role, T::NAME, move || Paged::<T>::new(pages, work))
    }

    /// Slat and every peer at the same work.
    fn tables(pages: u64, work: &Work) -> Vec<Self> {
        let mut all = Self::peers(pages, work);
        all.insert(0, Self::table::<Slat>(Role::Slat, pages, work.clone()));
        all
    }

    fn peers(pages: u64, work: &Work) -> Vec<Self> {
        let mut peers = vec![Self::table::<Generic>(Role::Peer, pages, work.clone())];
        #[cfg(target_arch = "x86_64")]
        {
            use crate::peers::{Multiarch, X86};

            peers.push(Self::table::<Multiarch>(Role::Peer, pages, work.clone()));
            if !matches!(work, Work::ZapAll) {
                peers.push(Self::table::<X86>(Role::Peer, pages, work.clone()));
            }
        }
        peers
    }
}

enum Kind {
    /// Candidates in turns, and the operations that a run of each consists of.
    Timed(u64, Vec<Candidate>),
    /// Counted once.
    Counted(Box<dyn FnOnce() -> anyhow::Result<Counted>>),
    /// Not possible here.
    Skipped(String),
}

/// A row to be measured.
pub(crate) struct Plan {
    pub(crate) name: String,
    per: &'static str,
    kind: Kind,
    limits: Vec<Limit>,
    goal: Option<String>,
}

impl Plan {
    /// A row in nanoseconds a page.
    fn pages(name: impl Into<String>, pages: u64, candidates: Vec<Candidate>) -> Self {
        Self {
            name: name.into(),
            per: "page",
            kind: Kind::Timed(pages, candidates),
            limits: Vec::new(),
            goal: None,
        }
    }

    fn goal(mut self, text: &str, limits: &[Limit]) -> Self {
        self.goal = Some(text.to_owned());
        self.limits = limits.to_vec();
        self
    }

    /// One more subject of a timed row.
    fn also(&mut self, candidate: Candidate) {
        if let Kind::Timed(_, candidates) = &mut self.kind {
            candidates.push(candidate);
        }
    }

    /// Measures it. criterion's files go below `directory`.
    ///
    /// # Errors
    /// When a result was wrong.
    pub(crate) fn run(self, directory: &Path, number: usize) -> anyhow::Result<Row> {
        let mut row = Row {
            name: self.name,
            per: self.per,
            figures: Vec::new(),
            counted: None,
            limits: self.limits,
            goal: self.goal,
            skipped: None,
        };
        match self.kind {
            Kind::Counted(count) => row.counted = Some(count()?),
            Kind::Skipped(why) => row.skipped = Some(why),
            Kind::Timed(operations, candidates) => {
                let (who, make): (Vec<_>, Vec<_>) = candidates
                    .into_iter()
                    .map(|candidate| ((candidate.role, candidate.name), candidate.make))
                    .unzip();
                let stats = ring::measure(directory, &format!("row-{number}"), operations, make)?;
                row.figures = who
                    .into_iter()
                    .zip(stats)
                    .map(|((role, name), stat)| Figure { role, name, stat })
                    .collect();
            }
        }
        Ok(row)
    }
}

/// All rows in the order of the report.
pub(crate) fn all(sizes: &Sizes) -> Vec<Plan> {
    let mut plans = Vec::new();
    for &pages in &sizes.pages {
        plans.extend(range::rows(pages));
    }
    for &pages in &sizes.pages {
        plans.extend(fault::rows(pages, pages == sizes.largest()));
    }
    for &pages in &sizes.pages {
        plans.extend(translate::rows(pages));
    }
    plans.extend(threads::rows(&sizes.cores));
    plans.extend(harvest::rows(sizes.dirty_slot));
    plans.extend(memory::rows(sizes.largest()));
    plans
}
