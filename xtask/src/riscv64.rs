//! The agent for RISC-V: its crates and their tests are checked for that target, warnings denied,
//! so that nothing of them is for x86-64 alone except behind the architecture façade. Nothing is
//! linked or run.
//!
//! The compiler is the toolchain's own where it has the target's standard library. Elsewhere one is
//! fetched out of Debian's packages, and so is a C compiler, for libzstd. Where one cannot be had,
//! the check is skipped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use slat_packages::{Release, Root, Set, Store, write_program};

use crate::{shell, tally::Tally, workspace::Workspace};

pub(crate) const TARGET: &str = "riscv64gc-unknown-linux-gnu";
/// The lab's, whose programs are built in the same folder: what runs while building is built once.
pub(crate) const PROFILE: &str = "lab";
const CRATES: [&str; 7] = [
    "slat-trust",
    "slat-record",
    "slat-image",
    "slat-paging",
    "slat-pager",
    "slat-vmm",
    "slat-daemon",
];

/// What says the C compiler to those who build with one.
pub(crate) const CC: &str = "CC_riscv64gc_unknown_linux_gnu";
/// It is the linker, too.
const GCC: &str = "riscv64-linux-gnu-gcc";
const GCC_PACKAGES: Set = Set::of(
    "linker",
    &["gcc-riscv64-linux-gnu", "libc6-dev-riscv64-cross"],
);

/// Checks them.
///
/// # Errors
/// When they do not compile.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let folder = folder(workspace)?;
    let mut check = workspace.cargo();
    let skipped = |what: &str, error: anyhow::Error| {
        let why = format!("{error:#}").replace('\n', "; ");
        Ok(Tally::skipped(
            "riscv64",
            format!("no {what} for {TARGET}: {why}"),
        ))
    };
    if !has_target() {
        match fetched(&folder.join("packages")) {
            Ok(rustc) => check.env("RUSTC", rustc),
            Err(error) => return skipped("Rust", error),
        };
    }
    match c_compiler(&folder) {
        Ok(compiler) => check.env(CC, compiler),
        Err(error) => return skipped("C compiler", error),
    };
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
    let mut rustc = Command::new("rustc");
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

/// A C compiler and linker: the machine's, or else one out of packages, kept in `folder`.
///
/// # Errors
/// When it cannot be had here.
pub(crate) fn c_compiler(folder: &Path) -> anyhow::Result<String> {
    if shell::output(Command::new(GCC).arg("--version")).is_ok() {
        return Ok(GCC.to_owned());
    }
    let kept = folder.join("linker");
    fs::create_dir_all(&kept)?;
    // It starts programs of its own by their paths: so they must run with the machine's libraries.
    let root: Root = Store::open(&kept, Release::Machine)?.get(GCC_PACKAGES)?;
    let mut command = Command::new(root.path("usr/bin").join(GCC));
    command.env("LD_LIBRARY_PATH", root.libraries());
    let program = kept.join(GCC);
    write_program(&program, &command, &["LD_LIBRARY_PATH"])?;
    Ok(program.display().to_string())
}
