//! The directory of packages.
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

use crate::{Root, program::succeeds};

const SUITE: &str = "trixie";
const DPKG_STATUS: &str = "/var/lib/dpkg/status";
const OS_RELEASE: &str = "/etc/os-release";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const APT_BOUND: Duration = Duration::from_secs(240);
const UNPACK_BOUND: Duration = Duration::from_secs(60);

/// Of which release packages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Always the same one, whatever the machine runs; all that programs need comes with them.
    Fixed,
    /// The machine's own. What is installed is not fetched: programs run with the machine's
    /// libraries.
    Machine,
}

/// Packages that are fetched together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: &'static str,
    /// What apt is asked for, with all they depend on.
    pub packages: &'static [&'static str],
    /// Packages without what they depend on, because that is not needed or of another architecture.
    pub alone: &'static [&'static str],
    /// Packages that stand for another whose name has a version in it, as a kernel's: that one is
    /// fetched, alone.
    pub named_by: &'static [&'static str],
    /// What those two may be of.
    pub architectures: &'static str,
}

impl Set {
    /// Packages for this machine, with all they depend on.
    #[must_use]
    pub const fn of(name: &'static str, packages: &'static [&'static str]) -> Self {
        Self {
            name,
            packages,
            alone: &[],
            named_by: &[],
            architectures: "amd64",
        }
    }
}

/// The directory for packages.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    release: Release,
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

/// The first package in what `apt-cache depends` says.
fn depends_in(said: &str) -> Option<&str> {
    said.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
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
    pub fn open(folder: &Path, release: Release) -> anyhow::Result<Self> {
        for below in ["sources.d", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join("apt").join(below))
                .with_context(|| format!("making {}", folder.display()))?;
        }
        fs::create_dir_all(folder.join("root"))?;
        let lock = File::create(folder.join("lock"))?;
        lock.lock()
            .with_context(|| format!("locking {}", folder.display()))?;
        Ok(Self {
            folder: folder.to_owned(),
            release,
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
        let names = [set.packages, set.alone, set.named_by].concat();
        println!("fetching {}", names.join(", "));
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
            apt.join("sources.d/packages.sources"),
            format!(
                "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nArchitectures: {architectures}\nSigned-By: {KEYRING}\n",
                mirror()?,
                self.suite()?,
            ),
        )?;
        let path = apt.display();
        let status = match self.release {
            // An empty one: everything is downloaded, whatever this machine has.
            Release::Fixed => apt.join("status"),
            Release::Machine => DPKG_STATUS.into(),
        };
        if self.release == Release::Fixed {
            fs::write(&status, "")?;
        }
        let status = status.display();
        let list = architectures.replace(' ', "\"; \"");
        fs::write(
            apt.join("apt.conf"),
            format!(
                "Dir::Etc::SourceList \"/dev/null\";\nDir::Etc::SourceParts \"{path}/sources.d\";\n\
                 Dir::State \"{path}/state\";\nDir::State::Lists \"{path}/state/lists\";\n\
                 Dir::State::status \"{status}\";\nDir::Cache \"{path}/cache\";\n\
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
        let mut alone: Vec<String> = set.alone.iter().map(|name| (*name).to_owned()).collect();
        for name in set.named_by {
            alone.push(self.behind(name)?);
        }
        if !alone.is_empty() {
            let mut command = self.apt("apt-get");
            command.args(["download", "-qq"]).args(alone);
            let archives = self.folder.join("apt/cache/archives");
            succeeds(&command, &archives, "apt-download", APT_BOUND)?;
        }
        Ok(())
    }

    /// The first package that one depends on.
    fn behind(&self, name: &str) -> anyhow::Result<String> {
        let mut command = self.apt("apt-cache");
        command.args(["depends", name]);
        let said = succeeds(&command, &self.folder, "apt-cache", APT_BOUND)?;
        depends_in(&said)
            .map(str::to_owned)
            .with_context(|| format!("{name} depends on nothing"))
    }

    fn suite(&self) -> anyhow::Result<String> {
        match self.release {
            Release::Fixed => Ok(SUITE.to_owned()),
            Release::Machine => {
                let text = fs::read_to_string(OS_RELEASE).context(OS_RELEASE)?;
                let line = text
                    .lines()
                    .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
                let name = line.context("the machine's release has no code name")?;
                Ok(name.trim_matches('"').to_owned())
            }
        }
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

    #[test]
    fn what_stands_behind_a_name_is_found() {
        let said = "linux-image-amd64\n  Depends: linux-image-6.1-amd64\n  Depends: other\n";
        assert_eq!(depends_in(said), Some("linux-image-6.1-amd64"));
        assert_eq!(depends_in("linux-image-amd64\n"), None);
    }
}
