//! What the tests of the rules share.

use super::fact::{CpuDifference, CpuFact};

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
