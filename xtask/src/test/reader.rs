//! What libtest prints, line by line: counts, what was skipped, and which tests failed with the
//! first and the last of what they said.

use std::collections::VecDeque;

use crate::tally::{Fault, Skip, Tally};

/// How many lines of a failed test are kept for the end of the run, the first [`FIRST`] and the
/// last; all of them are shown at once. Why it failed comes first where logs follow.
const KEPT: usize = 30;
const FIRST: usize = 10;

/// Where in a program's output the next line stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Running,
    /// The output of tests that passed.
    Successes,
    /// The output of tests that failed; libtest lists their names below it.
    Failures,
}

/// What the lines of a test run add up to.
#[derive(Debug, Default)]
pub(super) struct Reader {
    pub(super) tally: Tally,
    part: Part,
    /// Whose output this is.
    test: String,
    said: VecDeque<String>,
}

impl Reader {
    /// Takes one line; true when it is worth showing.
    pub(super) fn line(&mut self, line: &str) -> bool {
        if self.skip(line) {
            return false;
        }
        let trimmed = line.trim_end();
        let header = trimmed.strip_prefix("---- ");
        if let Some(name) = header.and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.end_of_test();
            self.test = name.to_owned();
        } else if self.part == Part::Failures && !trimmed.is_empty() && trimmed != "failures:" {
            if self.said.len() == KEPT {
                self.said.remove(FIRST);
            }
            self.said.push_back(trimmed.to_owned());
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.end_of_test();
            self.part = Part::Running;
            self.tally.passed += count(result, "passed").unwrap_or(0);
            self.tally.failed += count(result, "failed").unwrap_or(0);
            return true;
        }
        match trimmed {
            "successes:" => self.part = Part::Successes,
            // Once before their output and once before their names, which are known by then.
            "failures:" => {
                self.end_of_test();
                self.part = Part::Failures;
            }
            _ => {}
        }
        let plain = line.starts_with("test ") && line.ends_with("... ok");
        !(self.part == Part::Successes || plain)
    }

    fn skip(&mut self, line: &str) -> bool {
        // A test's line may follow libtest's own on the same line when it was written past the
        // capture.
        let Some(at) = line.find("SKIPPED:") else {
            return false;
        };
        let started = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ..."));
        let name = started.map_or(self.test.as_str(), |(name, _)| name);
        self.tally.skipped.push(Skip {
            name: format!("test {name}"),
            why: line[at + "SKIPPED:".len()..].trim().to_owned(),
        });
        true
    }

    fn end_of_test(&mut self) {
        let said = std::mem::take(&mut self.said);
        let test = std::mem::take(&mut self.test);
        if self.part == Part::Failures && !test.is_empty() {
            self.tally.faults.push(Fault {
                name: format!("test {test}"),
                said: said.into(),
            });
        }
    }
}

/// The number before a word of the line that libtest ends with.
fn count(result: &str, word: &str) -> Option<usize> {
    let before = result.split(word).next()?;
    before.trim_end().rsplit([' ', ';']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_counted_and_what_was_skipped_or_failed_is_kept() {
        let text = "\nrunning 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\n\nsuccesses:\n\n---- b stdout ----\n\
                    SKIPPED: /dev/kvm cannot be opened\nnoise\n\nsuccesses:\n    a\n    b\n\n\
                    failures:\n\n---- c stdout ----\nwhy\n\n---- d::e stdout ----\n\nbecause\n\n\
                    failures:\n    c\n    d::e\n\n\
                    test result: FAILED. 2 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
                    test result: ok. 14 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let mut reader = Reader::default();
        let shown: Vec<&str> = text.lines().filter(|line| reader.line(line)).collect();
        assert_eq!((reader.tally.passed, reader.tally.failed), (16, 2));
        assert_eq!(
            reader.tally.skip_lines(),
            ["SKIPPED: test b: /dev/kvm cannot be opened"]
        );
        assert_eq!(
            reader.tally.fault_lines(),
            [
                "FAILED: test c",
                "    why",
                "FAILED: test d::e",
                "    because"
            ]
        );
        assert!(!reader.line("test a::d ... SKIPPED: no network"));
        assert_eq!(reader.tally.skipped[1].name, "test a::d");
        assert!(shown.contains(&"why") && shown.contains(&"test c ... FAILED"));
        assert!(!shown.contains(&"noise") && !shown.contains(&"test a ... ok"));
    }

    #[test]
    fn of_a_test_that_says_much_the_first_and_the_last_is_kept() {
        let mut reader = Reader::default();
        reader.line("failures:");
        reader.line("---- c stdout ----");
        for number in 0..100 {
            reader.line(&format!("line {number}"));
        }
        reader.line("failures:");
        let said = &reader.tally.faults[0].said;
        assert_eq!(said.len(), KEPT);
        assert_eq!(said.first().map(String::as_str), Some("line 0"));
        assert_eq!(said[FIRST], "line 80");
        assert_eq!(said.last().map(String::as_str), Some("line 99"));
    }
}
