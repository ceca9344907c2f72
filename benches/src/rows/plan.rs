//! One row to be measured: its subjects, what a run of each consists of, its goal.

use std::path::Path;

use super::paged::{Paged, Work};
use crate::{
    peers::Generic,
    report::{Counted, Figure, Limit, Role, Row},
    ring::{self, Factory, Subject},
    slat::Slat,
    table::Table,
};

/// Pages in a gibibyte.
pub(super) const GIB: u64 = 1 << 18;

/// A size in words.
pub(super) fn bytes(pages: u64) -> String {
    if pages >= GIB {
        format!("{} GiB", pages / GIB)
    } else {
        format!("{} MiB", pages >> 8)
    }
}

/// A subject to be.
pub(super) struct Candidate {
    role: Role,
    name: String,
    make: Factory,
}

impl Candidate {
    pub(super) fn new<S: Subject + 'static>(
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
    pub(super) fn tables(pages: u64, work: &Work) -> Vec<Self> {
        let mut all = Self::peers(pages, work);
        all.insert(0, Self::table::<Slat>(Role::Slat, pages, work.clone()));
        all
    }

    pub(super) fn peers(pages: u64, work: &Work) -> Vec<Self> {
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

pub(super) enum Kind {
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
    pub(super) per: &'static str,
    pub(super) kind: Kind,
    pub(super) limits: Vec<Limit>,
    pub(super) goal: Option<String>,
}

impl Plan {
    /// A row in nanoseconds a page.
    pub(super) fn pages(name: impl Into<String>, pages: u64, candidates: Vec<Candidate>) -> Self {
        Self {
            name: name.into(),
            per: "page",
            kind: Kind::Timed(pages, candidates),
            limits: Vec::new(),
            goal: None,
        }
    }

    pub(super) fn goal(mut self, text: &str, limits: &[Limit]) -> Self {
        self.goal = Some(text.to_owned());
        self.limits = limits.to_vec();
        self
    }

    /// One more subject of a timed row.
    pub(super) fn also(&mut self, candidate: Candidate) {
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
