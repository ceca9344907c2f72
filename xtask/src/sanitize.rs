//! Undefined behaviour: Miri, and ThreadSanitizer.
//!
//! Both need a nightly toolchain with a component that not every machine has; without it the check
//! is skipped, with the reason. Miri runs the unit tests and the threads of
//! `mmu/tests/parallel.rs` under strict provenance; ThreadSanitizer the threads of
//! `mmu/tests/parallel.rs` on real processors, after it has reported a race that is planted there.

use std::{process::Command, time::Duration};

use anyhow::ensure;

use crate::{
    shell::{self, Ended},
    tally::Tally,
    workspace::Workspace,
};

/// What Miri runs: package, and which tests of it.
const UNDER_MIRI: [(&str, &[&str]); 2] = [
    ("slat-mmu", &["--lib", "--test", "parallel"]),
    ("slat-arch", &["--lib"]),
];

/// Races that are none: the standard library is not instrumented, so the channel of the test
/// harness and the fence in the last drop of an `Arc` look unordered. The second hides true races
/// with destructors, too, which docs/proofs.md weighs; it cannot be had for some `Arc`s only,
/// because the fence is the same for all.
const EXCUSED: &str = "race:std::sync::mpmc\nrace:drop_slow\n";

/// For the planted race, with the build for all that follows.
const PLANTED_BOUND: Duration = Duration::from_secs(600);

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Why Miri cannot run here, or nothing.
fn miri_is_missing(workspace: &Workspace) -> Option<String> {
    let mut command = workspace.nightly();
    command.args(["miri", "--version"]);
    match shell::output(&mut command) {
        Ok(_) => None,
        Err(_) => Some(
            "no nightly toolchain has it (rustup +nightly component add miri rust-src)".to_owned(),
        ),
    }
}

/// `cargo xtask miri`.
///
/// # Errors
/// When a test fails or Miri finds undefined behaviour.
pub(crate) fn miri(workspace: &Workspace) -> anyhow::Result<Tally> {
    if let Some(why) = miri_is_missing(workspace) {
        return Ok(Tally::skipped("Miri", why));
    }
    let mut tally = Tally::default();
    for (package, tests) in UNDER_MIRI {
        let mut command = workspace.nightly();
        command
            .args(["miri", "test", "--locked", "-p", package])
            .args(tests);
        command.env("CARGO_TARGET_DIR", workspace.target_dir()?.join("miri"));
        // Leaks are for the tests to find, by the arena's count of frames in use: a lost table goes
        // with its arena.
        command.env(
            "MIRIFLAGS",
            "-Zmiri-strict-provenance -Zmiri-symbolic-alignment-check -Zmiri-ignore-leaks",
        );
        shell::run(&mut command)?;
        tally.add(Tally::passed());
    }
    Ok(tally)
}

/// Why ThreadSanitizer cannot run here, or nothing.
fn tsan_is_missing() -> Option<String> {
    let why = |what: &str| Some(what.to_owned());
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return why("only set up for x86-64 Linux");
    }
    let mut command = Command::new("rustc");
    command.args(["+nightly", "--print", "target-libdir", "--target", TARGET]);
    for variable in ["RUSTUP_TOOLCHAIN", "RUSTC"] {
        command.env_remove(variable);
    }
    let Ok(folder) = shell::output(&mut command) else {
        return why("no nightly toolchain");
    };
    let found = std::fs::read_dir(folder.trim()).is_ok_and(|files| {
        files
            .flatten()
            .any(|file| file.file_name().to_string_lossy().ends_with("_rt.tsan.a"))
    });
    if found {
        None
    } else {
        why("the nightly toolchain has no runtime for it")
    }
}

/// The tests of `mmu/tests/parallel.rs` under ThreadSanitizer. `tests` are the test program's
/// arguments.
fn under_tsan(workspace: &Workspace, tests: &[&str]) -> anyhow::Result<Command> {
    let mut command = workspace.nightly();
    command.args(["test", "--locked", "-p", "slat-mmu", "--test", "parallel"]);
    // A target of its own, or build scripts and macros would be instrumented, too.
    command.args(["--target", TARGET]);
    let folder = workspace.target_dir()?.join("tsan");
    command.env("CARGO_TARGET_DIR", &folder);
    // The standard library is as it is delivered, not instrumented: its locks are seen through the
    // calls it makes.
    command.env(
        "RUSTFLAGS",
        "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer",
    );
    std::fs::create_dir_all(&folder)?;
    let excused = folder.join("suppressions");
    std::fs::write(&excused, EXCUSED)?;
    command.env(
        "TSAN_OPTIONS",
        format!("halt_on_error=1 suppressions={}", excused.display()),
    );
    command.args(["--", "--test-threads=1"]).args(tests);
    Ok(command)
}

/// Nothing, if a run with a planted race ended with a report of that race, and not of another.
fn reported(race: &Ended) -> anyhow::Result<()> {
    let summary = race
        .stderr
        .lines()
        .find(|line| line.starts_with("SUMMARY: ThreadSanitizer: data race"));
    let planted = summary.is_some_and(|line| line.contains("planted_race"));
    let (status, stdout, stderr) = (race.status, &race.stdout, &race.stderr);
    ensure!(
        planted && !status.success(),
        "ThreadSanitizer did not report the planted race: {status}\n{stdout}{stderr}"
    );
    Ok(())
}

/// `cargo xtask tsan`: first the planted race, which must be reported, and its twin, which must not
/// be; then the real threads.
///
/// # Errors
/// When a test fails, a data race is found, or the planted one is not.
pub(crate) fn tsan(workspace: &Workspace) -> anyhow::Result<Tally> {
    if let Some(why) = tsan_is_missing() {
        return Ok(Tally::skipped("ThreadSanitizer", why));
    }
    let mut tally = Tally::default();
    let mut planted = under_tsan(
        workspace,
        &["--ignored", "--exact", "planted_race::relaxed"],
    )?;
    reported(&shell::bounded(&mut planted, PLANTED_BOUND)?)?;
    println!("ThreadSanitizer reports the planted race");
    tally.add(Tally::passed());
    let twin = ["--ignored", "--exact", "planted_race::ordered"];
    for tests in [&twin[..], &[]] {
        shell::run(&mut under_tsan(workspace, tests)?)?;
        tally.add(Tally::passed());
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn only_a_report_of_the_planted_race_counts() {
        let ended = |code: i32, stderr: &str| Ended {
            status: std::process::ExitStatus::from_raw(code << 8),
            stdout: String::new(),
            stderr: stderr.to_owned(),
        };
        let report = "WARNING\n#0 planted_race::x\nSUMMARY: ThreadSanitizer: data race a/planted_race.rs:3:4 in publish\n";
        assert!(reported(&ended(66, report)).is_ok());
        assert!(reported(&ended(0, report)).is_err(), "it went on");
        assert!(reported(&ended(66, &report.replace("a/planted_", ""))).is_err());
        assert!(reported(&ended(101, "planted_race failed")).is_err());
    }
}
