//! What a host boots: the kernel out of its package, and a first file system with a shell, the
//! kernel's modules and the programs under test.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use slat_packages::Root;

use super::{archive::Archive, machine::Machine, modules, programs::Programs};

const INIT: &[u8] = include_bytes!("init.sh");
/// Where the loader of x86-64 programs is looked for.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// Files to boot from.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) files: PathBuf,
}

impl Image {
    /// Makes one in `folder`.
    ///
    /// # Errors
    /// When a package lacks something, or a file cannot be read or written.
    pub(crate) fn build(
        machine: Machine,
        root: &Root,
        programs: &Programs,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let files = folder.join("files.cpio");
        let to = File::create(&files).with_context(|| format!("creating {}", files.display()))?;
        let mut archive = Archive::new(BufWriter::new(to));
        for name in [
            "bin", "dev", "lib", "lib64", "modules", "proc", "srv", "sys", "tmp",
        ] {
            archive.directory(name)?;
        }
        archive.text("init", 0o755, INIT)?;
        archive.copy("bin/busybox", &root.path("usr/bin/busybox"))?;
        archive.link("bin/sh", "busybox")?;
        let mut order = String::new();
        for (name, content) in modules::in_order(root, &machine.modules())? {
            order.push_str(&format!("{name}.ko\n"));
            archive.text(&format!("modules/{name}.ko"), 0o644, &content)?;
        }
        archive.text("modules/order", 0o644, order.as_bytes())?;
        for (name, path) in programs.files() {
            archive.copy(&format!("bin/{name}"), path)?;
        }
        for library in programs.libraries() {
            let name = library.file_name().unwrap_or_default().display();
            archive.copy(&format!("lib/{name}"), library)?;
        }
        if machine == Machine::X86_64 {
            archive.copy(LOADER.trim_start_matches('/'), Path::new(LOADER))?;
        }
        archive.finish()?;
        let kernel = kernel(root)?;
        Ok(Self { kernel, files })
    }
}

/// The only kernel there is, packed or not.
fn kernel(root: &Root) -> anyhow::Result<PathBuf> {
    let boot = root.path("boot");
    for entry in fs::read_dir(&boot).with_context(|| format!("reading {}", boot.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("vmlinuz-") || name.starts_with("vmlinux-") {
            return Ok(path);
        }
    }
    bail!("{}: no kernel", boot.display());
}
