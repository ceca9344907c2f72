//! What is found, and the exceptions that may only shrink.
//!
//! An exception is a finding's key with its count. More of it is a fault, and so is less: then the
//! exception is stale, and its count must be lowered, or it must go. `cargo xtask structure
//! --lower` does that, and never raises one.

use std::collections::BTreeMap;

/// How many findings of one key are shown.
const SHOWN: usize = 10;

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// What it is, without a line's number: the name of an exception.
    pub(super) key: String,
    /// What is said of it, with its place.
    pub(super) message: String,
    /// How much it counts.
    pub(super) weight: usize,
}

impl Finding {
    /// One that counts as one.
    pub(super) fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            message: message.into(),
            weight: 1,
        }
    }
}

/// How much there is of each key.
pub(super) fn counts(findings: &[Finding]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for finding in findings {
        *counts.entry(finding.key.as_str()).or_default() += finding.weight;
    }
    counts
}

/// What is not excused, and which excuses are stale.
pub(super) fn faults(findings: &[Finding], known: &BTreeMap<String, usize>) -> Vec<String> {
    let counts = counts(findings);
    let mut faults = Vec::new();
    for (key, count) in &counts {
        let excused = known.get(*key).copied().unwrap_or(0);
        if *count <= excused {
            continue;
        }
        let messages: Vec<&Finding> = findings.iter().filter(|it| it.key == *key).collect();
        let shown = messages.iter().take(SHOWN);
        faults.extend(shown.map(|finding| finding.message.clone()));
        faults.push(format!(
            "\"{key}\": {count} in all, {excused} of them known"
        ));
    }
    for (key, excused) in known {
        let count = counts.get(key.as_str()).copied().unwrap_or(0);
        if count < *excused {
            faults.push(format!(
                "stale exception: {key}: {excused} are known, {count} are there; cargo xtask structure --lower"
            ));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_excuses_its_count_and_may_only_shrink() {
        let findings = [
            Finding::new("a -> b", "x.rs:1: a imports b"),
            Finding::new("a -> b", "x.rs:2: a imports b"),
        ];
        let known = |count: usize| BTreeMap::from([("a -> b".to_owned(), count)]);
        assert!(faults(&findings, &known(2)).is_empty());
        let more = faults(&findings, &known(1));
        assert_eq!(more.len(), 3, "{more:?}");
        assert_eq!(more[1], "x.rs:2: a imports b");
        let stale = faults(&findings, &known(3));
        assert!(stale[0].starts_with("stale exception: a -> b: 3 are known, 2 are there"));
        assert_eq!(faults(&[], &known(1)).len(), 1);
        assert_eq!(faults(&findings, &BTreeMap::new()).len(), 3);
    }
}
