//! What a bare-metal program prints.
//!
//! ```text
//! slat-oracle 1 3          protocol version, number of lines that follow (all hexadecimal)
//! 0 9090c310800001b8 0     status 0: the word that was found, 0
//! 17 4000 1000             any other status: the CPU's cause or exit code, two words about it
//! 100 0 0                  status 100: the store went where the load did not
//! end
//! ```
//!
//! A line `stop: unsupported: …` says that this machine lacks what is asked about, any other
//! `stop: …` why the program gave up. Whatever is not exactly this, an output that ends early above
//! all, is an error: no answer may be lost in silence.

use std::{error::Error, fmt};

use anyhow::{Context as _, bail, ensure};

/// The machine lacks what is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported(pub String);

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Unsupported {}

/// The status of a query that a store answered inconsistently.
pub const STORE_LOST: u64 = 0x100;

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0, or the machine's cause or exit code.
    pub status: u64,
    /// The word found, or the first word about the fault.
    pub first: u64,
    /// The second word about the fault.
    pub second: u64,
}

fn number(word: &str) -> anyhow::Result<u64> {
    u64::from_str_radix(word, 16).with_context(|| format!("not a hexadecimal number: {word:?}"))
}

/// Reads all answers.
///
/// # Errors
/// When the output is not a whole one with `count` answers.
pub fn parse(output: &str, count: usize) -> anyhow::Result<Vec<Answer>> {
    if let Some(why) = output.lines().find_map(|line| line.strip_prefix("stop: ")) {
        if let Some(lacks) = why.strip_prefix("unsupported: ") {
            return Err(Unsupported(lacks.to_owned()).into());
        }
        bail!("the program gave up: {why}");
    }
    ensure!(
        output.ends_with('\n') || output.is_empty(),
        "the output ends within a line"
    );
    let mut lines = output.lines();
    let head = lines.next().context("the program printed nothing")?;
    let promised = head
        .strip_prefix("slat-oracle 1 ")
        .with_context(|| format!("the output begins with {head:?}"))?;
    ensure!(
        number(promised)? == count as u64,
        "{count} queries were asked, {promised} (hexadecimal) read"
    );
    let mut answers = Vec::with_capacity(count);
    for at in 0..count {
        let line = lines
            .next()
            .with_context(|| format!("the output ends after {at} of {count} answers"))?;
        let words: Vec<&str> = line.split(' ').collect();
        let [status, first, second] = words[..] else {
            bail!("answer {at} of {count} is {line:?}");
        };
        answers.push(Answer {
            status: number(status)?,
            first: number(first)?,
            second: number(second)?,
        });
    }
    ensure!(
        lines.next() == Some("end"),
        "the output does not end with the word"
    );
    ensure!(lines.next().is_none(), "the output goes on after its end");
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "slat-oracle 1 2\n0 9090c310800001b8 0\n17 4000 1000\nend\n";

    #[test]
    fn a_whole_output_is_read() {
        let answers = parse(WHOLE, 2).unwrap();
        assert_eq!(
            answers[1],
            Answer {
                status: 0x17,
                first: 0x4000,
                second: 0x1000
            }
        );
        assert_eq!(answers[0].first, 0x9090_c310_8000_01b8);
    }

    #[test]
    fn every_truncated_output_is_an_error() {
        for end in 0..WHOLE.len() {
            assert!(parse(&WHOLE[..end], 2).is_err(), "{:?}", &WHOLE[..end]);
        }
    }

    #[test]
    fn what_is_not_an_answer_is_an_error() {
        assert!(parse(WHOLE, 3).is_err());
        assert!(parse(&WHOLE.replace("17 4000 1000", "17 4000"), 2).is_err());
        assert!(parse(&WHOLE.replace("4000", "-4000"), 2).is_err());
        assert!(parse(&format!("{WHOLE}more\n"), 2).is_err());
        let error = parse("stop: unforeseen trap 2 80000000\n", 2).unwrap_err();
        assert!(error.to_string().contains("unforeseen trap 2"), "{error}");
        assert!(!error.is::<Unsupported>());
        let error = parse("stop: unsupported: no hgatp mode\n", 2).unwrap_err();
        assert_eq!(error.downcast::<Unsupported>().unwrap().0, "no hgatp mode");
    }
}
