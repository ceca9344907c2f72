//! One format's proof from its tables to its line.
//!
//! 1. The real MMU builds tables; entries that it never writes are laid over a dump of them.
//! 2. The oracle is shown to see: the hardware gets an image with one leaf's frame changed, then
//!    one with one leaf's write permission taken away. It must disagree about accesses through that
//!    leaf and about nothing else.
//! 3. The hardware answers all questions over the true image. Each answer must be the software's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use slat_mmu::{Access, FormatInfo, Leaf, Level, Pfn};

use super::{
    answer::Answer,
    ask::Subject,
    cpu::{EmulatedCpu, Job},
    format::Ops,
    guest::{Guest, Plan},
    image::{Image, Step},
    judge,
    patch::{self, Family},
    query::{Expected, Query},
    rng::Rng,
};

/// Mismatches that are told in full.
const TOLD: usize = 10;
/// Questions of a corrupted image.
const FEW: usize = 300;

/// What a format's run found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The format, with what is special about the machine.
    pub name: String,
    /// The emulator.
    pub machine: String,
    /// Bits of the largest guest physical address asked about.
    pub gpa_bits: u32,
    /// Entries of the format's root that questions went through, and how many it has.
    pub root_entries: (usize, u64),
    /// Questions by kind.
    pub kinds: BTreeMap<&'static str, usize>,
    /// Mismatches.
    pub mismatches: usize,
    /// The first of them.
    pub told: Vec<String>,
    /// From the first table to the last answer.
    pub took: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queries: usize = self.kinds.values().sum();
        write!(
            f,
            "{:<12} queries {queries}  mismatches {}  ({}, {} GPA bits, {} of {} root entries, {} kinds, {:.1} s)",
            self.name,
            self.mismatches,
            self.machine,
            self.gpa_bits,
            self.root_entries.0,
            self.root_entries.1,
            self.kinds.len(),
            self.took.as_secs_f64()
        )
    }
}

impl Report {
    /// Compares answers and counts them.
    fn add(&mut self, family: Family, image: &Image, queries: &[Query], answers: &[Answer]) {
        for (query, answer) in queries.iter().zip(answers) {
            *self.kinds.entry(query.kind).or_default() += 1;
            if !judge::agrees(family, query, answer) {
                self.mismatches += 1;
                if self.told.len() < TOLD {
                    self.told.push(tell(family, image, query, answer));
                }
            }
        }
    }
}

/// A format on a machine.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    /// What it is called.
    pub name: &'a str,
    /// The tables to build.
    pub plan: Plan,
    /// Who walks them.
    pub machine: &'a EmulatedCpu,
    /// The hardware sets A and D by itself where the format does not count on it.
    pub sets_ad: bool,
    /// How many questions.
    pub queries: usize,
}

impl Trial<'_> {
    /// The whole proof.
    ///
    /// # Errors
    /// When it could not be carried out, or the oracle does not see a corrupted leaf.
    pub fn run(&self, seed: u64) -> anyhow::Result<Report> {
        let begin = Instant::now();
        let mut rng = Rng::new(seed);
        let guest = Guest::build(self.plan, &mut rng)?;
        let mut image = guest.image()?;
        let family = Family::of(image.ops())?;
        let patches = patch::apply(&mut image, &guest, self.plan, &mut rng)?;
        let subject = Subject {
            guest: &guest,
            image: &image,
            patches: &patches,
            plan: self.plan,
            sets_ad: self.sets_ad,
        };
        let queries = subject.queries(&mut rng, self.queries)?;
        let root = guest.root_register()?;
        println!(
            "{}: {} entries in use, {} patched; {} questions",
            self.name,
            image.present().len(),
            patches.len(),
            queries.len()
        );
        self.must_see("a frame changed", root, &image, &queries, |leaf| Leaf {
            pfn: Pfn(leaf.pfn.0 ^ 1),
            ..leaf
        })?;
        self.must_see("a permission changed", root, &image, &queries, |leaf| {
            Leaf {
                writable: false,
                ..leaf
            }
        })?;
        let mut report = Report {
            name: self.name.to_owned(),
            machine: self.machine.name.clone(),
            gpa_bits: bits(&queries),
            root_entries: root_entries(self.plan.ops.info, &queries),
            kinds: BTreeMap::new(),
            mismatches: 0,
            told: Vec::new(),
            took: Duration::ZERO,
        };
        report.add(family, &image, &queries, &self.ask(root, &image, &queries)?);

        // Where the root has no empty entry that can be asked about, one in use is overwritten, at
        // the very end.
        let mut rooted = image.clone();
        if !patches
            .iter()
            .any(|patch| patch.level == self.plan.ops.info.root_level)
            && let Some(patch) = patch::apply_to_root(&mut rooted, &guest, self.plan, &mut rng)?
        {
            let subject = Subject {
                image: &rooted,
                patches: &[patch],
                ..subject
            };
            let queries = subject.queries_of(&patch, &mut rng, FEW)?;
            report.add(
                family,
                &rooted,
                &queries,
                &self.ask(root, &rooted, &queries)?,
            );
        }
        report.took = begin.elapsed();
        Ok(report)
    }

    fn ask(&self, root: u64, image: &Image, queries: &[Query]) -> anyhow::Result<Vec<Answer>> {
        self.machine.run(Job {
            image: &image.bytes(),
            root,
            queries,
        })
    }

    /// Shows that a corrupted leaf is caught, and blamed for nothing else.
    fn must_see(
        &self,
        what: &str,
        root: u64,
        image: &Image,
        queries: &[Query],
        corrupt: impl Fn(Leaf) -> Leaf,
    ) -> anyhow::Result<()> {
        let family = Family::of(image.ops())?;
        let last = |query: &Query| image.walk(query.gfn()).last().copied();
        let usable = |query: &Query| {
            let written = query.access == Access::Write && query.kind == "4k leaf";
            last(query).filter(|step| written && step.level == Level::SIZE_4K)
        };
        let (victim, step): (&Query, Step) = queries
            .iter()
            .find_map(|query| Some((query, usable(query)?)))
            .context("no question writes through a 4 KiB leaf")?;
        let leaf = step.leaf().context("not a leaf")?;
        let mut wrong = image.clone();
        let raw = (image.ops().make_leaf)(&corrupt(leaf), step.level);
        ensure!(
            raw != step.raw && wrong.patch(step.at, raw),
            "nothing was corrupted"
        );

        let mut asked: Vec<Query> = queries.iter().take(FEW).copied().collect();
        asked.push(*victim);
        let answers = self.ask(root, &wrong, &asked)?;
        let seen: Vec<&Query> = asked
            .iter()
            .zip(&answers)
            .filter(|(query, answer)| !judge::agrees(family, query, answer))
            .map(|(query, _)| query)
            .collect();
        ensure!(
            seen.iter().any(|query| query.gpa == victim.gpa),
            "the oracle is blind: {what} in the leaf of gpa {:#x}, and it reports nothing",
            victim.gpa
        );
        if let Some(query) = seen
            .iter()
            .find(|query| last(query).is_none_or(|other| other.at != step.at))
        {
            // A mismatch that was there before is told in full by the run over the true image.
            let answers = self.ask(root, image, &asked)?;
            let before = asked
                .iter()
                .zip(&answers)
                .any(|(asked, answer)| *asked == **query && !judge::agrees(family, asked, answer));
            if !before {
                bail!(
                    "{what} in the leaf of gpa {:#x} changed the answer to {query}",
                    victim.gpa
                );
            }
        }
        println!(
            "{}: {what} in the leaf of gpa {:#x}: caught by {} of {} questions",
            self.name,
            victim.gpa,
            seen.len(),
            asked.len()
        );
        Ok(())
    }
}

/// Bits of the largest address that is asked about.
fn bits(queries: &[Query]) -> u32 {
    let largest = queries.iter().map(|query| query.gpa).max();
    u64::BITS - largest.unwrap_or(0).leading_zeros()
}

/// Different entries of the root that lie on the way of questions, and how many there are.
fn root_entries(format: FormatInfo, queries: &[Query]) -> (usize, u64) {
    let inside = queries
        .iter()
        .map(Query::gfn)
        .filter(|&gfn| gfn < format.max_gfn);
    let indices: BTreeSet<u64> = inside
        .map(|gfn| gfn.0 / Ops::span(format.root_level))
        .collect();
    (indices.len(), format.root_size as u64 / 8)
}

/// A mismatch with all that is needed to judge it.
fn tell(family: Family, image: &Image, query: &Query, answer: &Answer) -> String {
    let mut text = format!(
        "{query}: software {}, hardware {}",
        match query.expected {
            Expected::Leads(hpa) => format!("leads to {hpa:#x}"),
            other => other.to_string(),
        },
        judge::describe(family, answer)
    );
    for step in image.walk(query.gfn()) {
        let _infallible = write!(
            text,
            "\n    {:<4} at {:#x}: {:#018x} {:?}",
            step.level, step.at, step.raw, step.entry
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use slat_arch::{Ept4, Sv39x4};
    use slat_mmu::Format as _;

    use super::*;

    #[test]
    fn how_far_questions_reach_is_counted() {
        let query = |gpa| Query {
            gpa,
            access: Access::Read,
            kind: "test",
            expected: Expected::NotPresent,
        };
        let queries = [0x1000, 0xff_ffff_f000, 0x80_0000_0000].map(query);
        assert_eq!(bits(&queries), 40);
        assert_eq!(root_entries(Ept4::info(), &queries), (2, 512));
        // The last one that Sv39x4 translates, and two that it does not.
        let queries = [0x1ff_ffff_f000, 0x200_0000_0000, 1 << 62].map(query);
        assert_eq!(root_entries(Sv39x4::info(), &queries), (1, 2048));
        assert_eq!(bits(&[]), 0);
    }
}
