//! What a command found: counts of what passed and failed, and the reasons for what was skipped.

use std::{collections::BTreeMap, fmt};

/// Counts of checks. A plain command counts as one check, a test run as its tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// One reason for each check that could not be made here.
    pub(crate) skipped: Vec<String>,
}

impl Tally {
    /// One check that passed.
    pub(crate) fn passed() -> Self {
        Self {
            passed: 1,
            ..Self::default()
        }
    }

    /// One check that failed; why was printed.
    pub(crate) fn failed() -> Self {
        Self {
            failed: 1,
            ..Self::default()
        }
    }

    /// One check that cannot be made here.
    pub(crate) fn skipped(why: impl Into<String>) -> Self {
        Self {
            skipped: vec![why.into()],
            ..Self::default()
        }
    }

    /// One check that found these faults; each is printed.
    pub(crate) fn of_faults(faults: &[String]) -> Self {
        for fault in faults {
            eprintln!("fault: {fault}");
        }
        if faults.is_empty() {
            Self::passed()
        } else {
            Self::failed()
        }
    }

    /// Why checks were skipped, each reason once, with how many it kept from being made.
    pub(crate) fn reasons(&self) -> BTreeMap<&str, usize> {
        let mut reasons = BTreeMap::new();
        for why in &self.skipped {
            *reasons.entry(why.as_str()).or_default() += 1;
        }
        reasons
    }

    /// Adds another's counts.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed,
            self.skipped.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_print_as_ci_reads_them() {
        let mut tally = Tally::passed();
        tally.add(Tally::of_faults(&["a".into(), "b".into()]));
        tally.add(Tally::skipped("no /dev/kvm"));
        tally.add(Tally::skipped("no /dev/kvm"));
        assert_eq!(tally.to_string(), "1 passed, 1 failed, 2 skipped");
        assert_eq!(
            tally.reasons().into_iter().collect::<Vec<_>>(),
            [("no /dev/kvm", 2)]
        );
    }
}
