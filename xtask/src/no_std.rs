//! Proof that `slat-mmu` and `slat-arch` need no std and are enough for a hypervisor: the stand-in
//! one of `examples/bare`.
//!
//! 1. Where the standard library of a bare-metal target is installed (it has no std at all), both
//!    crates and the example are built for it.
//! 2. Everywhere the example is built for this machine. It has a panic handler and an entry point
//!    of its own and links no library: a crate graph that contains std has std's handler already,
//!    so the compiler refuses it (`duplicate lang item`), whoever brought std in.
//! 3. On x86-64 Linux it runs, and must end with 0: a processor's walker agreed with the MMU at
//!    each step.
//!
//! Each way names itself in the output.

use std::{path::Path, process::Command, time::Duration};

use anyhow::bail;

use crate::{example, shell, tally::Tally, workspace::Workspace};

const CRATES: [&str; 2] = ["slat-mmu", "slat-arch"];
const BARE_METAL: [&str; 3] = [
    "x86_64-unknown-none",
    "riscv64gc-unknown-none-elf",
    "aarch64-unknown-none",
];
/// It takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// All three.
///
/// # Errors
/// When a build fails, or the example's run does.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let installed: Vec<_> = BARE_METAL
        .iter()
        .filter(|target| is_installed(target))
        .collect();
    for target in &installed {
        let mut command = workspace.cargo();
        command.args(["build", "--locked", "--quiet", "--target", target]);
        command.args(CRATES.iter().flat_map(|name| ["-p", name]));
        shell::run(&mut command)?;
        let mut command = example::cargo(workspace, "build")?;
        shell::run(command.args(["--quiet", "--target", target]))?;
        println!(
            "{} and {} build for {target}",
            CRATES.join(", "),
            example::NAME
        );
        tally.add(Tally::passed());
    }
    if installed.is_empty() {
        tally.add(Tally::skipped(
            "no-std for bare metal",
            "no such target is installed (rustup target add x86_64-unknown-none)",
        ));
    }
    build(workspace)?;
    tally.add(Tally::passed());
    tally.add(run_example(workspace)?);
    Ok(tally)
}

/// Whether rustc has the target's libraries.
fn is_installed(target: &str) -> bool {
    let mut command = Command::new("rustc");
    command.args(["--print", "target-libdir", "--target", target]);
    shell::output(&mut command).is_ok_and(|path| Path::new(path.trim()).is_dir())
}

/// Builds the example for this machine. Only Linux lets a program be linked without the system's
/// library.
fn build(workspace: &Workspace) -> anyhow::Result<()> {
    let links = cfg!(target_os = "linux");
    let mut command = example::cargo(workspace, if links { "build" } else { "check" })?;
    shell::run(command.arg("--quiet"))?;
    println!(
        "{} need no std: the panic handler of {} is the only one",
        CRATES.join(" and "),
        example::NAME
    );
    Ok(())
}

/// Runs it and shows what it says.
fn run_example(workspace: &Workspace) -> anyhow::Result<Tally> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Ok(Tally::skipped(
            format!("a run of {}", example::NAME),
            "its console and its end are system calls of x86-64 Linux",
        ));
    }
    let program = example::target_dir(workspace)?
        .join("debug")
        .join(example::NAME);
    let ended = shell::bounded(&mut Command::new(program), PATIENCE)?;
    print!("{}{}", ended.stdout, ended.stderr);
    if ended.stdout.is_empty() {
        bail!("{}: {}, and it said nothing", example::NAME, ended.status);
    }
    if !ended.status.success() {
        bail!("{}: {}", example::NAME, ended.status);
    }
    Ok(Tally::passed())
}
