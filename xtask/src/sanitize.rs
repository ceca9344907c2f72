//! Undefined behaviour: Miri, and ThreadSanitizer.
//!
//! Both need a nightly toolchain with a component that not every machine has; without it the check is skipped, with the
//! reason. Miri runs what is single-threaded or small (`cfg!(miri)` makes the tests smaller still) under strict provenance;
//! ThreadSanitizer the threads of `arch/tests/parallel.rs` on real processors.

use std::process::Command;

use crate::{shell, tally::Tally, workspace::Workspace};

/// What Miri runs: package, and which tests of it.
const UNDER_MIRI: [(&str, &[&str]); 2] = [
    ("slat-mmu", &["--lib"]),
    ("slat-arch", &["--lib", "--test", "parallel"]),
];

/// Races that are none: the standard library is not instrumented, so the channel of the test harness and the fence in the
/// last drop of an `Arc` look unordered.
const EXCUSED: &str = "race:std::sync::mpmc\nrace:drop_slow\n";

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// cargo of the nightly toolchain. The one that runs us has said which toolchain, and which rustc, is to be used.
fn nightly(workspace: &Workspace) -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").current_dir(&workspace.root);
    for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC"] {
        command.env_remove(variable);
    }
    command
}

/// Why Miri cannot run here, or nothing.
fn miri_is_missing(workspace: &Workspace) -> Option<String> {
    let mut command = nightly(workspace);
    command.args(["miri", "--version"]);
    match shell::output(&mut command) {
        Ok(_) => None,
        Err(_) => Some(
            "Miri: no nightly toolchain has it (rustup +nightly component add miri rust-src)"
                .to_owned(),
        ),
    }
}

/// `cargo xtask miri`.
///
/// # Errors
/// When a test fails or Miri finds undefined behaviour.
pub(crate) fn miri(workspace: &Workspace) -> anyhow::Result<Tally> {
    if let Some(why) = miri_is_missing(workspace) {
        return Ok(Tally::skipped(why));
    }
    let mut tally = Tally::default();
    for (package, tests) in UNDER_MIRI {
        let mut command = nightly(workspace);
        command
            .args(["miri", "test", "--locked", "-p", package])
            .args(tests);
        command.env("CARGO_TARGET_DIR", workspace.target_dir()?.join("miri"));
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
    let why = |what: &str| Some(format!("ThreadSanitizer: {what}"));
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

/// `cargo xtask tsan`.
///
/// # Errors
/// When a test fails or a data race is found.
pub(crate) fn tsan(workspace: &Workspace) -> anyhow::Result<Tally> {
    if let Some(why) = tsan_is_missing() {
        return Ok(Tally::skipped(why));
    }
    let mut command = nightly(workspace);
    command.args(["test", "--locked", "-p", "slat-arch", "--test", "parallel"]);
    // A target of its own, or build scripts and macros would be instrumented, too.
    command.args(["--target", TARGET]);
    command.env("CARGO_TARGET_DIR", workspace.target_dir()?.join("tsan"));
    // The standard library is as it is delivered, not instrumented: its locks are seen through the calls it makes.
    command.env(
        "RUSTFLAGS",
        "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer",
    );
    let folder = workspace.target_dir()?.join("tsan");
    std::fs::create_dir_all(&folder)?;
    let excused = folder.join("suppressions");
    std::fs::write(&excused, EXCUSED)?;
    command.env(
        "TSAN_OPTIONS",
        format!("halt_on_error=1 suppressions={}", excused.display()),
    );
    command.env("SLAT_PARALLEL_ROUNDS", "4");
    command.args(["--", "--test-threads=1"]);
    shell::run(&mut command)?;
    Ok(Tally::passed())
}
