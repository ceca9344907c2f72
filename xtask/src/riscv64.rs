//! The agent for RISC-V: its crates and their tests are checked for that target, warnings denied,
//! so that nothing of them is for x86-64 alone except behind the architecture façade. Nothing is
//! linked or run.
//!
//! The compiler is the toolchain's own where it has the target's standard library. Elsewhere one is
//! fetched out of Debian's packages. Where neither can be had, the check is skipped.

use std::path::{Path, PathBuf};

use slat_packages::{Release, Set, Store, write_program};

use crate::{shell, tally::Tally, workspace::Workspace};

pub(crate) const TARGET: &str = "riscv64gc-unknown-linux-gnu";
/// The lab's, whose programs are built in the same folder: what runs while building is built once.
pub(crate) const PROFILE: &str = "lab";
const CRATES: [&str; 3] = ["slat-record", "slat-vmm", "slat-daemon"];

/// Checks them.
///
/// # Errors
/// When they do not compile.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let folder = folder(workspace)?;
    let mut check = workspace.cargo();
    if !has_target() {
        match fetched(&folder.join("packages")) {
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
    check.args(["check", "--locked", "--quiet", "--all-targets"]);
    check.args(["--target", TARGET]);
    check.args(["--profile", PROFILE]);
    check.args(CRATES.iter().flat_map(|name| ["-p", name]));
    shell::run(&mut check)?;
    println!("{} and their tests compile for {TARGET}", CRATES.join(", "));
    Ok(Tally::passed())
}

/// Where all of it is built. Another compiler than the workspace's must not share its folder: each
/// would undo the other's.
///
/// # Errors
/// When cargo does not say where it builds.
pub(crate) fn folder(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    Ok(workspace.target_dir()?.join("riscv64"))
}

/// Whether the toolchain has the target's standard library.
pub(crate) fn has_target() -> bool {
    let mut rustc = std::process::Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", TARGET]);
    shell::output(&mut rustc).is_ok_and(|path| Path::new(path.trim()).is_dir())
}

/// rustc with the standard libraries of this machine and of RISC-V. Only to check: a linker is the
/// machine's own, for what runs while building.
const PACKAGES: Set = Set {
    alone: &["rustc-web", "libstd-rust-web-dev:riscv64"],
    architectures: "amd64 riscv64",
    ..Set::of("rust-riscv64", &["base-files", "libstd-rust-web-dev"])
};

/// A compiler out of packages, kept in `folder`.
pub(crate) fn fetched(folder: &Path) -> anyhow::Result<PathBuf> {
    let root = Store::open(folder, Release::Fixed)?.get(PACKAGES)?;
    let mut rustc = root.command("usr/bin/rustc");
    rustc.arg("--sysroot").arg(root.path("usr"));
    let program = folder.join("rustc");
    write_program(&program, &rustc, &[])?;
    Ok(program)
}
