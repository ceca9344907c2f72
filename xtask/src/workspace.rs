//! The workspace as cargo describes it, and its files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, anyhow, bail};
use serde_json::Value;

use crate::shell;

/// Where the sources are.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
}

/// A package of `cargo metadata`.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) version: String,
    /// `None` for packages of this workspace.
    pub(crate) source: Option<String>,
    pub(crate) license: Option<String>,
    /// Names of the packages it asks for, each with its kind: `normal`, `dev` or `build`.
    pub(crate) dependencies: Vec<(String, String)>,
}

/// The id of a package that another is built with, and as what: `normal`, `dev`, `build`.
pub(crate) type Edge = (String, Vec<String>);

/// What `cargo metadata` says, for the platform it runs on.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    /// By package id: what it is built with.
    pub(crate) resolved: Vec<(String, Vec<Edge>)>,
}

fn text(value: &Value, key: &str) -> Option<String> {
    value[key].as_str().map(str::to_owned)
}

fn kind(value: &Value) -> String {
    value["kind"].as_str().unwrap_or("normal").to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A cargo that is started does not inherit what the cargo above this program says of its package:
/// build scripts that name such a variable, as ring's do, would be run again each time, and all
/// that is built on them with them.
fn forget_package(command: &mut Command) {
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&variable);
        }
    }
}

impl Workspace {
    /// The workspace this tool belongs to.
    ///
    /// # Errors
    /// When it was not started by cargo.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let own = std::env::var_os("CARGO_MANIFEST_DIR")
            .ok_or_else(|| anyhow!("start it as `cargo xtask`"))?;
        let root = Path::new(&own)
            .parent()
            .ok_or_else(|| anyhow!("CARGO_MANIFEST_DIR has no parent"))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The cargo that started this tool, at the workspace's root.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        forget_package(&mut command);
        command
    }

    /// cargo of the nightly toolchain. The one that runs us has said which toolchain, and which
    /// rustc, is to be used.
    pub(crate) fn nightly(&self) -> Command {
        let mut command = Command::new("cargo");
        command.arg("+nightly").current_dir(&self.root);
        for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC"] {
            command.env_remove(variable);
        }
        forget_package(&mut command);
        command
    }

    /// Where cargo puts what it builds.
    ///
    /// # Errors
    /// When cargo cannot say.
    pub(crate) fn target_dir(&self) -> anyhow::Result<PathBuf> {
        let mut command = self.cargo();
        command.args(["metadata", "--format-version=1", "--no-deps"]);
        let value: Value = serde_json::from_str(&shell::output(&mut command)?)?;
        text(&value, "target_directory")
            .map(PathBuf::from)
            .ok_or_else(|| anyhow!("cargo metadata names no target directory"))
    }

    /// All packages this platform is built from.
    ///
    /// # Errors
    /// When cargo fails, e.g. because Cargo.lock is out of date.
    pub(crate) fn metadata(&self) -> anyhow::Result<Metadata> {
        self.metadata_of("Cargo.toml")
    }

    /// All packages that the package of another manifest, outside the workspace, is built from on
    /// this platform.
    ///
    /// # Errors
    /// As for [`metadata`](Self::metadata).
    pub(crate) fn metadata_of(&self, manifest: &str) -> anyhow::Result<Metadata> {
        let host = shell::output(Command::new("rustc").arg("-vV"))?
            .lines()
            .find_map(|line| line.strip_prefix("host: ").map(str::to_owned))
            .ok_or_else(|| anyhow!("rustc -vV names no host"))?;
        let mut command = self.cargo();
        command.args(["metadata", "--format-version=1", "--locked"]);
        command.args(["--manifest-path", manifest]);
        command.args(["--filter-platform", &host]);
        let value: Value = serde_json::from_str(&shell::output(&mut command)?)?;
        let packages = list(&value["packages"])
            .iter()
            .map(package)
            .collect::<anyhow::Result<Vec<_>>>()?;
        let resolved = list(&value["resolve"]["nodes"])
            .iter()
            .filter_map(|node| {
                let deps = list(&node["deps"]).iter().filter_map(|dep| {
                    let kinds = list(&dep["dep_kinds"]).iter().map(kind).collect();
                    Some((text(dep, "pkg")?, kinds))
                });
                Some((text(node, "id")?, deps.collect()))
            })
            .collect();
        if packages.is_empty() {
            bail!("cargo metadata lists no package");
        }
        Ok(Metadata { packages, resolved })
    }

    /// Files below `folders` (or one file each) whose names end in one of `endings`, as paths from
    /// the root, sorted.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub(crate) fn files(&self, folders: &[&str], endings: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut open: Vec<PathBuf> = folders
            .iter()
            .map(|folder| self.root.join(folder))
            .collect();
        while let Some(path) = open.pop() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                // What is built, and what a fuzzer keeps.
                let made = ["target", "corpus", "artifacts"].contains(&&*name);
                if made || (name.starts_with('.') && path != self.root) {
                    continue;
                }
                let entries =
                    fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))?;
                for entry in entries {
                    open.push(entry?.path());
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path.strip_prefix(&self.root)?.to_owned());
            }
        }
        found.sort();
        Ok(found)
    }

    /// A file's text.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read(&self, path: impl AsRef<Path>) -> anyhow::Result<String> {
        let path = path.as_ref();
        fs::read_to_string(self.root.join(path))
            .with_context(|| format!("reading {}", path.display()))
    }
}

fn package(value: &Value) -> anyhow::Result<Package> {
    let needed = |key| text(value, key).ok_or_else(|| anyhow!("a package without {key}"));
    let dependencies = list(&value["dependencies"])
        .iter()
        .filter_map(|dependency| Some((text(dependency, "name")?, kind(dependency))));
    Ok(Package {
        id: needed("id")?,
        name: needed("name")?,
        version: needed("version")?,
        source: text(value, "source"),
        license: text(value, "license"),
        dependencies: dependencies.collect(),
    })
}

impl Metadata {
    /// The packages of this workspace, by name.
    pub(crate) fn own(&self) -> Vec<&Package> {
        let mut own: Vec<_> = self
            .packages
            .iter()
            .filter(|package| package.source.is_none())
            .collect();
        own.sort_by(|a, b| a.name.cmp(&b.name));
        own
    }

    /// Everything that is linked into `package`: normal dependencies and theirs, by name.
    pub(crate) fn linked(&self, package: &Package) -> Vec<&str> {
        let mut seen = vec![package.id.as_str()];
        let mut next = 0;
        while let Some(id) = seen.get(next).copied() {
            next += 1;
            let deps = self
                .resolved
                .iter()
                .filter(|(node, _)| node == id)
                .flat_map(|(_, deps)| deps);
            for (dep, kinds) in deps {
                if kinds.iter().any(|kind| kind == "normal") && !seen.contains(&dep.as_str()) {
                    seen.push(dep);
                }
            }
        }
        let name = |id: &&str| self.packages.iter().find(|package| package.id == *id);
        let mut names: Vec<&str> = seen[1..]
            .iter()
            .filter_map(name)
            .map(|package| package.name.as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}
