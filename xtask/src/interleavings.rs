//! The models of the Common MMU: every interleaving of small scenes (loom), random ones of a whole VM (shuttle).
//!
//! Both replace the atomics of `slat-mmu` by a cargo feature, so each is built in a folder of its own under `target`, with
//! optimisation (there are many schedules) and debug assertions (they are among what is checked). Features, never `--cfg
//! loom`: that would change other crates, too.

use std::{path::Path, process::Command};

use crate::{shell, tally::Tally, workspace::Workspace};

/// Schedules of each of the scenes of a whole VM.
const SCHEDULES: &str = "5000";

/// How a model is built, before any `--` of the command: with optimisation, debug assertions, and a folder of its own.
pub(crate) fn built(command: &mut Command, targets: &Path, feature: &str) {
    command.arg("--release");
    command.env("CARGO_TARGET_DIR", targets.join(feature));
    command.env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
}

/// Runs both; each model and scene counts as one check.
///
/// # Errors
/// When one fails.
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
                "slat-arch",
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
        tally.add(match shell::run(&mut command) {
            Ok(()) => Tally::passed(),
            Err(error) => Tally::of_faults(&[format!("{error:#}")]),
        });
    }
    Ok(tally)
}
