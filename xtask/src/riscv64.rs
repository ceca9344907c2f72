//! The agent for RISC-V: its crates are checked for that target, warnings denied, so that nothing
//! of them is for x86-64 alone except behind the architecture façade. Nothing is linked or run.
//!
//! The compiler is the toolchain's own where it has the target's standard library. Elsewhere one is
//! fetched out of Debian's packages. Where neither can be had, the check is skipped.

use std::path::{Path, PathBuf};

use crate::{shell, tally::Tally, workspace::Workspace};

const TARGET: &str = "riscv64gc-unknown-linux-gnu";
const CRATES: [&str; 3] = ["slat-record", "slat-vmm", "slat-daemon"];

/// Checks them.
///
/// # Errors
/// When they do not compile.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    // Another compiler than the workspace's must not share its folder: each would undo the other's.
    let folder = workspace.target_dir()?.join("riscv64");
    let mut check = workspace.cargo();
    if !has_target() {
        match fetched(workspace, &folder) {
            Ok(rustc) => check.env("RUSTC", rustc),
            Err(error) => {
                let why = format!("{error:#}").replace('\n', "; ");
                return Ok(Tally::skipped(
                    "riscv64",
                    format!("no Rust for {TARGET}: {why}"),
                ));
            }
        };
    }
    check.env("CARGO_TARGET_DIR", &folder);
    check.env("RUSTFLAGS", "-D warnings");
    check.args(["check", "--locked", "--quiet", "--target", TARGET]);
    check.args(CRATES.iter().flat_map(|name| ["-p", name]));
    shell::run(&mut check)?;
    println!("{} compile for {TARGET}", CRATES.join(", "));
    Ok(Tally::passed())
}

/// Whether the toolchain has the target's standard library.
fn has_target() -> bool {
    let mut rustc = std::process::Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", TARGET]);
    shell::output(&mut rustc).is_ok_and(|path| Path::new(path.trim()).is_dir())
}

/// A compiler out of packages.
fn fetched(workspace: &Workspace, folder: &Path) -> anyhow::Result<PathBuf> {
    let mut fetch = workspace.cargo();
    fetch.args(["run", "--locked", "--quiet", "-p", "slat-tests"]);
    fetch.args(["--bin", "rust-riscv64", "--", "--cache"]);
    fetch.arg(folder.join("packages"));
    let said = shell::output(&mut fetch)?;
    Ok(said.lines().last().unwrap_or_default().into())
}
