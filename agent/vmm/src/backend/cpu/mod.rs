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

mod fact;
mod own;
pub(in crate::backend) mod riscv64;
#[cfg(test)]
mod samples;
pub(in crate::backend) mod x86_64;

pub(crate) use self::fact::{CpuDifference, CpuFact};
use self::own::Own;

/// More facts than any host has.
const MAX_FACTS: usize = 512;
/// Most differences that are told; a source may name as many extensions as it likes.
const MAX_DIFFERENCES: usize = 32;

/// What keeps a VM that was told `source` from living on a host of this program's architecture with
/// the facts `own`. Nothing, when it can. Both are empty for the software backend, whose guest code
/// is portable.
#[must_use]
pub(crate) fn compare_facts(source: &[CpuFact], own: &[CpuFact]) -> Vec<CpuDifference> {
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

#[cfg(test)]
mod tests {
    use super::{
        fact::MAX_SHOWN,
        samples::{facts, names},
        *,
    };

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
