//! `cargo xtask riscv64`, where the toolchain has no RISC-V target: a rustc that has one, out of
//! Debian's packages. Prints the path of a program to set `RUSTC` to.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::Context as _;
use clap::Parser;
use slat_tests::oracle::fetch;

/// A Rust compiler with the standard library of RISC-V
#[derive(Debug, Parser)]
struct Args {
    /// Where packages are kept
    #[arg(long)]
    cache: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let cache = std::path::absolute(Args::parse().cache)?;
    fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let root = fetch::Store::open(&cache)?.get(fetch::RUST_RISCV64)?;
    let mut rustc = root.command("usr/bin/rustc");
    rustc.arg("--sysroot").arg(root.path("usr"));
    let words: Vec<String> = std::iter::once(rustc.get_program())
        .chain(rustc.get_args())
        .map(|word| format!("'{}'", word.display()))
        .collect();
    let program = cache.join("rustc");
    fs::write(
        &program,
        format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" ")),
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    println!("{}", program.display());
    Ok(())
}
