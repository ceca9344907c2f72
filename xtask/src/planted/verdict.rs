//! What the end of a test program means. Only a test that ran and failed, crashed or hung has
//! caught anything.

use anyhow::bail;

use crate::shell::Ended;

/// What a program says that was to run `count` tests; `None`: it had to be ended. With a bug
/// planted they must fail, without one they must pass.
///
/// # Errors
/// When it is not so, or the tests do not exist.
pub(super) fn judge(
    ended: Option<&Ended>,
    count: usize,
    planted: bool,
) -> anyhow::Result<&'static str> {
    let plural = if count == 1 { "test" } else { "tests" };
    let header = format!("running {count} {plural}\n");
    match (ended, planted) {
        (Some(ended), _) if !ended.stdout.contains(&header) => bail!("there are no such {plural}"),
        (Some(ended), false) if ended.status.success() => Ok("passes"),
        (Some(ended), false) => bail!("fails\n{}{}", ended.stdout, ended.stderr),
        (None, false) => bail!("still runs at its bound"),
        (Some(ended), true) if ended.status.success() => bail!("passes"),
        (Some(ended), true) if ended.status.code().is_none() => Ok("crashes"),
        (Some(_), true) => Ok("fails"),
        (None, true) => Ok("hangs, ended at the bound"),
    }
}

/// What is shown of a panic; one may print a whole address space.
const SHOWN: usize = 120;

/// The head of what the first panic says.
pub(super) fn panic_of(stdout: &str) -> Option<String> {
    let mut lines = stdout.lines();
    lines.find(|line| line.contains(" panicked at "))?;
    lines.next().map(|line| line.chars().take(SHOWN).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn why_a_test_failed_is_said() {
        let stdout =
            "---- a stdout ----\n\nthread 'a' (7) panicked at x.rs:1:2:\nleft is not right\nnote\n";
        assert_eq!(panic_of(stdout).unwrap(), "left is not right");
        assert_eq!(panic_of("ok\n"), None);
    }

    #[test]
    fn only_a_test_that_ran_and_failed_has_caught_anything() {
        let ended = |raw, stdout: &str| Ended {
            status: std::process::ExitStatus::from_raw(raw),
            stdout: stdout.to_owned(),
            stderr: String::new(),
        };
        let one = "running 1 test\n";
        let failed = ended(101 << 8, one);
        let passed = ended(0, one);
        assert!(judge(Some(&passed), 1, true).is_err());
        assert!(judge(Some(&ended(0, "running 0 tests\n")), 1, false).is_err());
        assert!(judge(Some(&passed), 2, false).is_err());
        assert_eq!(judge(Some(&failed), 1, true).unwrap(), "fails");
        assert_eq!(judge(Some(&ended(6, one)), 1, true).unwrap(), "crashes");
        assert!(judge(None, 1, true).unwrap().starts_with("hangs"));
        assert!(judge(None, 1, false).is_err());
        assert!(judge(Some(&failed), 1, false).is_err());
        assert_eq!(judge(Some(&passed), 1, false).unwrap(), "passes");
    }
}
