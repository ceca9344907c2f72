//! What a command found: counts of what passed and failed, with what was skipped, what failed and
//! what failed once, by name. Names and words are printed last, where a reader of a long run looks.

use std::{collections::BTreeMap, fmt};

/// A check that could not be made here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Skip {
    pub(crate) name: String,
    pub(crate) why: String,
}

/// A check that failed, with some of what it said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) name: String,
    pub(crate) said: Vec<String>,
}

/// Counts of checks. A plain command counts as one check, a test run as its tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: Vec<Skip>,
    /// What is known of those that failed. It may be less than `failed`.
    pub(crate) faults: Vec<Fault>,
    /// Those that failed in a run and passed when they were run again by themselves. They count as
    /// passed.
    pub(crate) flaky: Vec<Fault>,
}

impl Fault {
    /// A line that names it, under `word`, and its words below.
    fn lines(&self, word: &str) -> impl Iterator<Item = String> {
        let said = self.said.iter().map(|line| format!("    {line}"));
        std::iter::once(format!("{word}: {}", self.name)).chain(said)
    }
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
    pub(crate) fn skipped(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            skipped: vec![Skip {
                name: name.into(),
                why: why.into(),
            }],
            ..Self::default()
        }
    }

    /// One check that found these faults; each is printed.
    pub(crate) fn of_faults(faults: &[String]) -> Self {
        for fault in faults {
            eprintln!("fault: {fault}");
        }
        let Some((first, more)) = faults.split_first() else {
            return Self::passed();
        };
        let fault = Fault {
            name: first.clone(),
            said: more.to_vec(),
        };
        Self {
            faults: vec![fault],
            ..Self::failed()
        }
    }

    /// A line for each check that was skipped; those with one reason follow each other.
    pub(crate) fn skip_lines(&self) -> Vec<String> {
        let mut by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for skip in &self.skipped {
            by_reason.entry(&skip.why).or_default().push(&skip.name);
        }
        let line = |why: &str, name: &str| format!("SKIPPED: {name}: {why}");
        by_reason
            .into_iter()
            .flat_map(|(why, names)| names.into_iter().map(move |name| line(why, name)))
            .collect()
    }

    /// What failed, and what failed once, with what they said.
    pub(crate) fn fault_lines(&self) -> Vec<String> {
        let flaky = self.flaky.iter().flat_map(|fault| fault.lines("FLAKY"));
        let faults = self.faults.iter().flat_map(|fault| fault.lines("FAILED"));
        flaky.chain(faults).collect()
    }

    /// Adds another's counts.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
        self.faults.extend(other.faults);
        self.flaky.extend(other.flaky);
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
        tally.add(Tally::skipped("one", "no /dev/kvm"));
        tally.add(Tally::skipped("miri", "no nightly"));
        tally.add(Tally::skipped("two", "no /dev/kvm"));
        assert_eq!(tally.to_string(), "1 passed, 1 failed, 3 skipped");
        assert_eq!(
            tally.skip_lines(),
            [
                "SKIPPED: one: no /dev/kvm",
                "SKIPPED: two: no /dev/kvm",
                "SKIPPED: miri: no nightly",
            ]
        );
        tally.flaky.push(Fault {
            name: "test c".into(),
            said: vec!["why".into()],
        });
        assert_eq!(
            tally.fault_lines(),
            ["FLAKY: test c", "    why", "FAILED: a", "    b"]
        );
    }
}
