//! The test that a planted bug must make fail, written as `cargo test` takes it:
//! `-p PACKAGE [--features FEATURE] (--lib | --test PROGRAM) NAME`.

use std::time::Duration;

use anyhow::{anyhow, bail};

/// For one test; what runs longer hangs.
const BOUND: Duration = Duration::from_secs(60);
/// For one model, which has many schedules to try, on a machine that has other things to do.
const MODEL_BOUND: Duration = Duration::from_secs(600);

/// One test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) package: String,
    /// The model checker whose atomics the package is built on.
    pub(super) feature: Option<String>,
    /// The program of `tests/` that has the test; without one it is the library's.
    pub(super) program: Option<String>,
    /// With its modules, as `--exact` takes it.
    pub(super) name: String,
}

impl Target {
    /// Reads one.
    ///
    /// # Errors
    /// When it has another form.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let wrong = || {
            anyhow!(
                "`test` is not `-p PACKAGE [--features FEATURE] (--lib NAME | --test PROGRAM NAME)`: {text}"
            )
        };
        let ["-p", package, rest @ ..] = words.as_slice() else {
            bail!(wrong());
        };
        let (feature, rest) = match rest {
            ["--features", feature, rest @ ..] => (Some(*feature), rest),
            rest => (None, rest),
        };
        let (program, name) = match rest {
            ["--lib", name] => (None, name),
            ["--test", program, name] => (Some(*program), name),
            _ => bail!(wrong()),
        };
        Ok(Self {
            package: (*package).to_owned(),
            feature: feature.map(str::to_owned),
            program: program.map(str::to_owned),
            name: (*name).to_owned(),
        })
    }

    /// What runs longer hangs.
    pub(super) fn bound(&self) -> Duration {
        if self.feature.is_some() {
            MODEL_BOUND
        } else {
            BOUND
        }
    }

    /// The test's function.
    pub(super) fn function(&self) -> &str {
        self.name.rsplit("::").next().unwrap_or_default()
    }

    /// Whether both tests are in one program, built alike.
    pub(super) fn is_beside(&self, other: &Self) -> bool {
        (&self.package, &self.feature, &self.program)
            == (&other.package, &other.feature, &other.program)
    }

    /// The program, as `cargo test` takes it.
    pub(super) fn arguments(&self) -> Vec<&str> {
        let mut arguments = vec!["-p", self.package.as_str()];
        if let Some(feature) = &self.feature {
            arguments.extend(["--features", feature]);
        }
        match &self.program {
            None => arguments.push("--lib"),
            Some(program) => arguments.extend(["--test", program]),
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_read_and_given_to_cargo_as_it_was_written() {
        for text in [
            "-p slat-arch --test history a::b",
            "-p slat-mmu --lib models::a",
            "-p slat-mmu --features loom --lib models::a",
        ] {
            let target = Target::parse(text).unwrap();
            let again = format!("{} {}", target.arguments().join(" "), target.name);
            assert_eq!(again, text);
        }
        for text in ["slat-arch --lib a", "-p a --test b", "-p a --bin b c", ""] {
            assert!(Target::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_model_may_take_longer_and_is_another_program() {
        let plain = Target::parse("-p slat-mmu --lib a::b").unwrap();
        let model = Target::parse("-p slat-mmu --features loom --lib a::c").unwrap();
        assert!(model.bound() > plain.bound());
        assert!(!model.is_beside(&plain));
        assert!(plain.is_beside(&Target::parse("-p slat-mmu --lib x").unwrap()));
        assert_eq!(plain.function(), "b");
    }
}
