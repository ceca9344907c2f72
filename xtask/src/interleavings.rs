//! The models of the Common MMU: every interleaving of small scenes (loom), random ones of a whole
//! VM (shuttle).
//!
//! Both replace the atomics of `slat-mmu` by a cargo feature, so each is built in a folder of its
//! own under `target`, with optimisation (there are many schedules) and debug assertions (they are
//! among what is checked). Features, never `--cfg loom`: that would change other crates, too.

use std::{path::Path, process::Command};

use anyhow::bail;

use crate::{tally::Tally, test, workspace::Workspace};

/// Schedules of each of the scenes of a whole VM.
const SCHEDULES: &str = "5000";

/// How a model is built, before any `--` of the command: with optimisation, debug assertions, and a
/// folder of its own.
pub(crate) fn built(command: &mut Command, targets: &Path, feature: &str) {
    command.arg("--release");
    command.env("CARGO_TARGET_DIR", targets.join(feature));
    command.env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
}

/// Runs both; each model and scene counts as one check, by the lines of libtest, so one that has
/// disappeared shows.
///
/// # Errors
/// When cargo cannot be started, or runs no test.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let runs: [(&str, &[&str]); 2] = [
        (
            "loom",
            &[
                "-p",
                "slat-mmu",
                "--features",
                "loom",
                "--lib",
                "--test",
                "loom_*",
            ],
        ),
        (
            "shuttle",
            &[
                "-p",
                "slat-mmu",
                "--features",
                "shuttle",
                "--test",
                "shuttle_vm",
            ],
        ),
    ];
    for (name, choice) in runs {
        let mut command = workspace.cargo();
        command.args(["test", "--locked"]).args(choice);
        built(&mut command, &workspace.target_dir()?, name);
        // In order and with what each has to say: how many interleavings, which seed.
        command.args(["--", "--nocapture", "--test-threads=1"]);
        if std::env::var_os("SLAT_SHUTTLE_SCHEDULES").is_none() {
            command.env("SLAT_SHUTTLE_SCHEDULES", SCHEDULES);
        }
        let (counted, _) = test::counted(&mut command)?;
        if counted.passed + counted.failed == 0 {
            bail!("{name}: no test ran");
        }
        tally.add(counted);
    }
    Ok(tally)
}
