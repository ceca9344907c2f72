//! libFuzzer over the decoders of what comes from outside: the targets of `fuzz/`, which give input
//! to the same functions as the bounded rounds of the tests do.
//!
//! Needs cargo-fuzz, which not every machine has; without it the run is skipped, with the reason.
//! The bounded rounds need nothing and are made with the tests.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::{shell, tally::Tally, workspace::Workspace};

/// The package, from the workspace's root.
const FOLDER: &str = "fuzz";
/// Tests that write the valid inputs down: those that give damaged ones.
const SEEDERS: [&str; 2] = ["damaged", "a_harvest_survives"];

/// What is run, and for how long.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// One target of `fuzz/fuzz_targets`; all of them, one after the other, without it
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u32,
    /// Only say which targets there are
    #[arg(long)]
    list: bool,
}

/// `cargo xtask fuzz`.
///
/// # Errors
/// When there is no such target, or the valid inputs cannot be written down. A target that finds
/// something counts as failed, and the others are still tried.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<Tally> {
    let all = targets(workspace)?;
    if options.list {
        all.iter().for_each(|name| println!("{name}"));
        return Ok(Tally::default());
    }
    let chosen: Vec<String> = match &options.target {
        None => all,
        Some(name) if all.contains(name) => vec![name.clone()],
        Some(name) => bail!("no target {name}; there are {}", all.join(", ")),
    };
    let mut tally = Tally::default();
    if let Some(why) = is_missing(workspace) {
        for name in chosen {
            tally.add(Tally::skipped(format!("fuzz {name}"), &*why));
        }
        return Ok(tally);
    }
    seed(workspace)?;
    for name in chosen {
        let mut command = unstable(workspace);
        command.args(["fuzz", "run", "--fuzz-dir", FOLDER, &name, "--"]);
        command.arg(format!("-max_total_time={}", options.seconds));
        command.arg("-max_len=65536");
        tally.add(match shell::run(&mut command) {
            Ok(()) => Tally::passed(),
            Err(error) => Tally::of_faults(&[format!("{name}: {error:#}")]),
        });
    }
    Ok(tally)
}

/// Names of the targets.
fn targets(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let folder = workspace.root.join(FOLDER).join("fuzz_targets");
    let files = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut names: Vec<String> = files
        .flatten()
        .filter_map(|file| {
            let name = file.file_name().into_string().ok()?;
            name.strip_suffix(".rs").map(ToOwned::to_owned)
        })
        .collect();
    names.sort();
    Ok(names)
}

/// cargo that takes a sanitizer's flags: the nightly one or, where there is none, the workspace's,
/// told to take them.
fn unstable(workspace: &Workspace) -> Command {
    let mut command = workspace.nightly();
    if shell::output(command.arg("--version")).is_ok() {
        return workspace.nightly();
    }
    let mut command = workspace.cargo();
    command.env("RUSTC_BOOTSTRAP", "1");
    command
}

/// Why libFuzzer cannot run here, or nothing.
fn is_missing(workspace: &Workspace) -> Option<String> {
    let mut command = unstable(workspace);
    if shell::output(command.args(["fuzz", "--version"])).is_err() {
        return Some("no cargo-fuzz (cargo install cargo-fuzz)".to_owned());
    }
    None
}

/// The valid inputs, for libFuzzer to begin with, as the tests have them.
fn seed(workspace: &Workspace) -> anyhow::Result<()> {
    let corpus: PathBuf = workspace.root.join(FOLDER).join("corpus");
    let mut command = workspace.cargo();
    command.args([
        "test",
        "--locked",
        "--quiet",
        "-p",
        "slat-vmm",
        "-p",
        "slat-image",
        "--lib",
        "--",
    ]);
    command.args(SEEDERS);
    command.env("SLAT_FUZZ_SEEDS", corpus);
    shell::run(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_program() {
        let workspace = Workspace::find().unwrap();
        let manifest = workspace.root.join(FOLDER).join("Cargo.toml");
        let manifest = std::fs::read_to_string(manifest).unwrap();
        let names = targets(&workspace).unwrap();
        assert!(names.len() >= 8, "{names:?}");
        for name in &names {
            let path = format!("path = \"fuzz_targets/{name}.rs\"");
            assert!(manifest.contains(&path), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), names.len());
    }
}
