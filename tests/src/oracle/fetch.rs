//! Programs from Debian's packages, unpacked into a directory of the build; nothing is installed.
//!
//! apt resolves and downloads with state, lists and cache of its own, from the mirror that the
//! machine's own sources name. What was unpacked once is not asked for again, so a second run needs
//! no network.
//!
//! *Locking*: one process at a time works in the directory; [`Store`] holds a lock on it for as
//! long as it lives.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

use super::emulator::{Root, succeeds};

const SUITE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const APT_BOUND: Duration = Duration::from_secs(240);
const UNPACK_BOUND: Duration = Duration::from_secs(60);

/// Packages that are fetched together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: &'static str,
    /// What apt is asked for, with all they depend on.
    pub packages: &'static [&'static str],
    /// Packages without what they depend on, because that is not needed or of another architecture.
    pub alone: &'static [&'static str],
    /// What `alone` may be of.
    pub architectures: &'static str,
}

/// QEMU for RISC-V, with an assembler and a linker for it.
pub const RISCV: Set = Set {
    name: "riscv",
    packages: &[
        "base-files",
        "qemu-system-riscv",
        "binutils-riscv64-linux-gnu",
    ],
    alone: &[],
    architectures: "amd64",
};
/// QEMU for x86.
pub const X86: Set = Set {
    name: "x86",
    packages: &["base-files", "qemu-system-x86"],
    alone: &[],
    architectures: "amd64",
};
/// Bochs.
pub const BOCHS: Set = Set {
    name: "bochs",
    packages: &["base-files", "bochs"],
    alone: &[],
    architectures: "amd64",
};
/// rustc with the standard libraries of this machine and of RISC-V. Only to check: a linker is the
/// machine's own, for what runs while building.
pub const RUST_RISCV64: Set = Set {
    name: "rust-riscv64",
    packages: &["base-files", "libstd-rust-web-dev"],
    alone: &["rustc-web", "libstd-rust-web-dev:riscv64"],
    architectures: "amd64 riscv64",
};

/// The directory for packages.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    /// Architectures whose lists are there.
    updated: &'static str,
    /// Why a set cannot be had: each is tried once.
    failed: Vec<(Set, String)>,
    _lock: File,
}

fn entries(folder: &Path, ending: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The mirror for packages in apt's sources, of either form.
fn mirror_in(text: &str) -> Option<&str> {
    let names_one = |line: &&str| line.starts_with("URIs:") || line.starts_with("deb ");
    text.lines()
        .map(str::trim_start)
        .filter(names_one)
        .flat_map(str::split_whitespace)
        .find(|word| word.contains("://") && !word.contains("security"))
}

fn mirror() -> anyhow::Result<String> {
    let mut files = entries(Path::new("/etc/apt/sources.list.d"), ".sources").unwrap_or_default();
    files.push("/etc/apt/sources.list".into());
    files
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|text| mirror_in(&text).map(str::to_owned))
        .context("apt's sources name no mirror")
}

impl Store {
    /// Opens the store in `folder`, which is made if there is none. Waits for another process that
    /// uses it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        for below in ["sources.d", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join("apt").join(below))
                .with_context(|| format!("making {}", folder.display()))?;
        }
        fs::create_dir_all(folder.join("root"))?;
        let lock = File::create(folder.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        Ok(Self {
            folder: folder.to_owned(),
            updated: "",
            failed: Vec::new(),
            _lock: lock,
        })
    }

    fn marker(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.ready"))
    }

    /// The packages of `set`, unpacked; fetched if they are not there yet.
    ///
    /// # Errors
    /// When they cannot be had here, with the reason.
    pub fn get(&mut self, set: Set) -> anyhow::Result<Root> {
        let root = Root::new(self.folder.join("root"));
        if self.marker(set.name).exists() {
            return Ok(root);
        }
        ensure!(
            cfg!(target_arch = "x86_64"),
            "the packages are for x86-64 machines"
        );
        if let Some((_, why)) = self.failed.iter().find(|(failed, _)| *failed == set) {
            bail!("{why}");
        }
        println!("fetching {}", [set.packages, set.alone].concat().join(", "));
        if let Err(error) = self.download(set).and_then(|()| self.unpack()) {
            let why = format!("{error:#}").replace('\n', "; ");
            self.failed.push((set, why.clone()));
            bail!("{why}");
        }
        fs::write(self.marker(set.name), "")?;
        Ok(root)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt/apt.conf"));
        command
    }

    fn update(&mut self, architectures: &'static str) -> anyhow::Result<()> {
        if self.updated == architectures {
            return Ok(());
        }
        let apt = self.folder.join("apt");
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing (package debian-archive-keyring)");
        }
        fs::write(
            apt.join("sources.d/oracles.sources"),
            format!(
                "Types: deb\nURIs: {}\nSuites: {SUITE}\nComponents: main\nArchitectures: {architectures}\nSigned-By: {KEYRING}\n",
                mirror()?
            ),
        )?;
        // An empty status: everything is downloaded, whatever this machine has.
        fs::write(apt.join("status"), "")?;
        let path = apt.display();
        let list = architectures.replace(' ', "\"; \"");
        fs::write(
            apt.join("apt.conf"),
            format!(
                "Dir::Etc::SourceList \"/dev/null\";\nDir::Etc::SourceParts \"{path}/sources.d\";\n\
                 Dir::State \"{path}/state\";\nDir::State::Lists \"{path}/state/lists\";\n\
                 Dir::State::status \"{path}/status\";\nDir::Cache \"{path}/cache\";\n\
                 Dir::Cache::archives \"{path}/cache/archives\";\nAPT::Architecture \"amd64\";\n\
                 APT::Architectures {{ \"{list}\"; }};\nAPT::Sandbox::User \"\";\nAPT::Install-Recommends \"false\";\n\
                 Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nDebug::NoLocking \"true\";\n"
            ),
        )?;
        let mut command = self.apt("apt-get");
        command.args(["update", "-qq", "-o", "APT::Update::Error-Mode=any"]);
        succeeds(&command, &self.folder, "apt-update", APT_BOUND)?;
        self.updated = architectures;
        Ok(())
    }

    fn download(&mut self, set: Set) -> anyhow::Result<()> {
        self.update(set.architectures)?;
        let mut command = self.apt("apt-get");
        command.args(["install", "-qq", "-y", "--download-only"]);
        command.args(set.packages);
        succeeds(&command, &self.folder, "apt-install", APT_BOUND)?;
        if !set.alone.is_empty() {
            let mut command = self.apt("apt-get");
            command.args(["download", "-qq"]).args(set.alone);
            let archives = self.folder.join("apt/cache/archives");
            succeeds(&command, &archives, "apt-download", APT_BOUND)?;
        }
        Ok(())
    }

    /// Unpacks every archive that is not yet.
    fn unpack(&self) -> anyhow::Result<()> {
        let mut archives = entries(&self.folder.join("apt/cache/archives"), ".deb")?;
        // It has the links from /lib to /usr/lib, through which the others unpack.
        archives.sort_by_key(|path| !path.to_string_lossy().contains("/base-files_"));
        for archive in archives {
            let done = archive.with_extension("unpacked");
            if !done.exists() {
                let mut command = Command::new("dpkg");
                command
                    .arg("-x")
                    .arg(&archive)
                    .arg(self.folder.join("root"));
                succeeds(&command, &self.folder, "dpkg", UNPACK_BOUND)?;
                fs::write(done, "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_machines_own() {
        let new = "Types: deb\nURIs: http://mirror.example/debian-security\nURIs: http://mirror.example/debian\n";
        assert_eq!(mirror_in(new), Some("http://mirror.example/debian"));
        let old = "# deb http://wrong.example/\ndeb [arch=amd64] http://mirror.example/debian trixie main\n";
        assert_eq!(mirror_in(old), Some("http://mirror.example/debian"));
        assert_eq!(mirror_in(""), None);
    }
}
