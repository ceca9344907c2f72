//! Proof that `slat-mmu` and `slat-arch` need no std, in the strongest way this machine allows.
//!
//! 1. Where the standard library of a bare-metal target is installed (it has no std at all), both are built for it.
//! 2. Everywhere: a static library with a panic handler of its own is built on both. A crate graph that contains std has
//!    std's handler already, so the compiler refuses it (`duplicate lang item`), whoever brought std in.
//!
//! Both ways name themselves in the output.

use std::{fs, path::Path, process::Command};

use anyhow::Context as _;

use crate::{shell, tally::Tally, workspace::Workspace};

const CRATES: [&str; 2] = ["slat-mmu", "slat-arch"];
const BARE_METAL: [&str; 3] = [
    "x86_64-unknown-none",
    "riscv64gc-unknown-none-elf",
    "aarch64-unknown-none",
];

const PROBE: &str = r#"//! Has the panic handler that std would have.
#![no_std]
extern crate alloc;
extern crate slat_arch;
extern crate slat_mmu;

use core::alloc::{GlobalAlloc, Layout};

struct NoMemory;

// SAFETY: null is the answer for "no memory", and nothing is ever handed out to be freed.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static MEMORY: NoMemory = NoMemory;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
"#;

/// Both proofs.
///
/// # Errors
/// When a build fails.
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
        println!("{} build for {target}", CRATES.join(" and "));
        tally.add(Tally::passed());
    }
    if installed.is_empty() {
        println!(
            "no bare-metal target is installed (rustup target add x86_64-unknown-none adds that proof)"
        );
    }
    probe(workspace)?;
    println!(
        "{} link no std: a panic handler beside them is the only one",
        CRATES.join(" and ")
    );
    tally.add(Tally::passed());
    Ok(tally)
}

/// Whether rustc has the target's libraries.
fn is_installed(target: &str) -> bool {
    let mut command = Command::new("rustc");
    command.args(["--print", "target-libdir", "--target", target]);
    shell::output(&mut command).is_ok_and(|path| Path::new(path.trim()).is_dir())
}

fn probe(workspace: &Workspace) -> anyhow::Result<()> {
    let target = workspace.target_dir()?;
    let folder = target.join("xtask/no-std");
    fs::create_dir_all(folder.join("src")).context("making the probe")?;
    let path = |name: &str| workspace.root.join(name).display().to_string();
    let manifest = format!(
        "[package]\nname = \"no-std-probe\"\nedition = \"2024\"\n\n[lib]\ncrate-type = [\"staticlib\"]\n\n\
         [dependencies]\nslat-arch = {{ path = {:?} }}\nslat-mmu = {{ path = {:?} }}\n\n\
         [profile.dev]\npanic = \"abort\"\n\n[workspace]\n",
        path("arch"),
        path("mmu"),
    );
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::write(folder.join("src/lib.rs"), PROBE)?;
    // The versions of the workspace, not newer ones.
    fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))?;
    let mut command = workspace.cargo();
    command.args(["build", "--quiet", "--manifest-path"]);
    command.arg(folder.join("Cargo.toml"));
    command
        .arg("--target-dir")
        .arg(target.join("xtask/no-std/target"));
    shell::run(&mut command)
}
