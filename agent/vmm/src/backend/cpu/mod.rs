//! What a guest may rely on of a CPU, as named facts, and whether a VM that was told the facts of
//! one host can live on another.
//!
//! Facts cross hosts, before any memory is reserved: text in, differences out. Who reads them from
//! a kernel is the backend's business; comparing them needs no kernel, so the rules of every
//! architecture are compiled and tested everywhere.
//!
//! # Invariants
//! * Only the destination judges, by its own rules. A fact that it does not know must be one of its
//!   own facts too, word for word: whoever sends it thinks that it matters.
//! * Source facts are a peer's word: how many are read and how much of each is shown is bounded.

mod riscv64;
mod x86_64;

use std::fmt;

/// More facts than any host has.
const MAX_FACTS: usize = 512;
/// Most differences that are told; a source may name as many extensions as it likes.
const MAX_DIFFERENCES: usize = 32;
/// Most characters of a name or a value that an error shows.
const MAX_SHOWN: usize = 80;

/// Frequencies closer than this (1 in 4,000, as the kernel's own tolerance of 250 ppm) are equal.
pub(in crate::backend) const TSC_TOLERANCE: u64 = 4000;

/// One fact, e.g. `x86.cpuid.7.0.ebx` = `0x1c` or `riscv.isa` = `rv64imafdc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFact {
    /// Dotted; the architecture comes first.
    pub name: String,
    /// Numbers are hexadecimal with `0x`, or decimal.
    pub value: String,
}

impl CpuFact {
    pub(in crate::backend) fn new(name: impl Into<String>, value: impl fmt::Display) -> Self {
        Self {
            name: name.into(),
            value: value.to_string(),
        }
    }

    /// Its value, when that is a number.
    fn number(&self) -> Option<u64> {
        match self.value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => self.value.parse().ok(),
        }
    }
}

/// Why a VM of the source's CPU cannot live here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuDifference {
    /// Of the fact.
    pub name: String,
    /// Its value at the source.
    pub source: String,
    /// Its value here; `none` where this host has no such fact.
    pub here: String,
}

impl CpuDifference {
    fn new(name: &str, source: &str, here: &str) -> Self {
        let shown = |text: &str| text.escape_default().take(MAX_SHOWN).collect();
        Self {
            name: shown(name),
            source: shown(source),
            here: shown(here),
        }
    }
}

impl fmt::Display for CpuDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, source, here } = self;
        write!(f, "{name}: {source} at the source, {here} here")
    }
}

/// What a value that is not there is called.
const NONE: &str = "none";

/// What keeps a VM that was told `source` from living on a host of this program's architecture with
/// the facts `own`. Nothing, when it can. Both are empty for the software backend, whose guest code
/// is portable.
#[must_use]
pub fn compare_facts(source: &[CpuFact], own: &[CpuFact]) -> Vec<CpuDifference> {
    let mut differences = compare_as(std::env::consts::ARCH, source, own);
    differences.truncate(MAX_DIFFERENCES);
    differences
}

fn compare_as(architecture: &str, source: &[CpuFact], own: &[CpuFact]) -> Vec<CpuDifference> {
    if source.len() > MAX_FACTS {
        let most = format!("at most {MAX_FACTS}");
        return vec![CpuDifference::new(
            "number of facts",
            &source.len().to_string(),
            &most,
        )];
    }
    if source.is_empty() && own.is_empty() {
        return Vec::new();
    }
    match architecture {
        "x86_64" => x86_64::compatible(source, own),
        "riscv64" => riscv64::compatible(source, own),
        _ => {
            let own = Own(own);
            source.iter().filter_map(|fact| own.same(fact)).collect()
        }
    }
}

/// This host's facts, as the rules look at them. Each rule gives the difference, if there is one.
#[derive(Clone, Copy, Debug)]
struct Own<'a>(&'a [CpuFact]);

impl<'a> Own<'a> {
    fn find(self, name: &str) -> Option<&'a CpuFact> {
        self.0.iter().find(|fact| fact.name == name)
    }

    fn differs(self, fact: &CpuFact) -> CpuDifference {
        let here = self.find(&fact.name).map_or(NONE, |own| own.value.as_str());
        CpuDifference::new(&fact.name, &fact.value, here)
    }

    /// The values are the same.
    fn same(self, fact: &CpuFact) -> Option<CpuDifference> {
        let own = self.find(&fact.name);
        (own.map(|own| &own.value) != Some(&fact.value)).then(|| self.differs(fact))
    }

    /// Both are numbers and `allowed` of (source, here). Where this host has no such fact, it is 0.
    fn numbers(
        self,
        fact: &CpuFact,
        allowed: impl FnOnce(u64, u64) -> bool,
    ) -> Option<CpuDifference> {
        let own = self.find(&fact.name).map_or(Some(0), CpuFact::number);
        let fine = fact
            .number()
            .zip(own)
            .is_some_and(|(source, own)| allowed(source, own));
        (!fine).then(|| self.differs(fact))
    }

    /// Facts without which nothing can be said, and which the source left out.
    fn missing(self, source: &[CpuFact], needed: &[&str]) -> Vec<CpuDifference> {
        needed
            .iter()
            .filter(|name| source.iter().all(|fact| fact.name != **name))
            .map(|name| {
                let here = self.find(name).map_or(NONE, |own| own.value.as_str());
                CpuDifference::new(name, NONE, here)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn facts(pairs: &[(&str, &str)]) -> Vec<CpuFact> {
        pairs
            .iter()
            .map(|(name, value)| CpuFact::new(*name, value))
            .collect()
    }

    /// Names of the facts that differ.
    pub(super) fn names(differences: &[CpuDifference]) -> Vec<&str> {
        differences.iter().map(|one| one.name.as_str()).collect()
    }

    #[test]
    fn the_software_backend_has_no_facts_and_fits_everywhere() {
        for architecture in ["x86_64", "riscv64", "other"] {
            assert_eq!(compare_as(architecture, &[], &[]), []);
        }
    }

    #[test]
    fn what_no_rule_knows_must_be_here_word_for_word() {
        let own = facts(&[
            ("x86.vendor", "A"),
            ("x86.physical_bits", "48"),
            ("x86.new", "7"),
        ]);
        let told = |value| {
            let mut source = own.clone();
            source[2].value = String::from(value);
            compare_as("x86_64", &source, &own)
        };
        assert_eq!(told("7"), []);
        assert_eq!(names(&told("8")), ["x86.new"]);
        assert_eq!(
            compare_as("other", &facts(&[("other.x", "1")]), &[]),
            [CpuDifference::new("other.x", "1", "none")]
        );
    }

    #[test]
    fn a_peers_words_are_bounded_and_escaped() {
        let long = facts(&[("x\n", &"9".repeat(5000))]);
        let [difference] = &compare_as("other", &long, &[])[..] else {
            panic!("one difference");
        };
        assert_eq!(difference.name, "x\\n");
        assert_eq!(difference.source.len(), MAX_SHOWN);
        let many = vec![CpuFact::new("x", 1); MAX_FACTS + 1];
        assert_eq!(compare_as("x86_64", &many, &many).len(), 1);
    }

    #[test]
    fn a_difference_reads_as_a_sentence_of_an_error() {
        let difference = CpuDifference::new("x86.tsc_khz", "2400000", "3000000");
        assert_eq!(
            difference.to_string(),
            "x86.tsc_khz: 2400000 at the source, 3000000 here"
        );
    }
}
