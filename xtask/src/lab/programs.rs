//! The programs under test, built for a kind of host: `slat`, and where asked for the whole-system
//! tests and those of the VM's process.
//!
//! For x86-64 they are the machine's own, with the libraries they use: `slat` the release build, as
//! the demo has it, tests as `cargo xtask test` builds them. For RISC-V they are static, of the
//! profile `lab`, which takes less time to build, and the compiler is the toolchain's where it has
//! the target, and else out of packages, as is the linker (`riscv64-linux-gnu-gcc`). They share a
//! folder with `cargo xtask riscv64`, and with it what runs while building.
//!
//! Where tests are wanted for RISC-V, `slat` and the whole-system tests are built by one call of
//! cargo, and the VM's tests with the same packages chosen: cargo unites the features of what it
//! builds together, and with other features nearly every crate would be built again.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::machine::Machine;
use crate::{riscv64, shell, workspace::Workspace};
use anyhow::{Context as _, ensure};
use serde_json::Value;

/// As hosts know them.
pub(crate) const SLAT: &str = "slat";
/// The whole-system tests.
pub(crate) const SYSTEM: &str = "system";
/// The tests beside the code of the VM's process.
pub(crate) const VMM: &str = "vmm";

/// Test programs, and what cargo calls them.
const TESTS: [(&str, &str); 2] = [(SYSTEM, "system"), (VMM, "slat_vmm")];

/// As hosts know it, and the file.
type Named = (&'static str, PathBuf);

/// Files to put on hosts.
#[derive(Debug)]
pub(crate) struct Programs {
    files: Vec<Named>,
    libraries: Vec<PathBuf>,
}

/// How cargo builds for a kind of host.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    workspace: &'a Workspace,
    environment: Vec<(&'static str, String)>,
    /// Of `slat`.
    profile: &'a str,
    /// Of tests.
    tests: &'a str,
    target: Option<&'static str>,
}

impl Programs {
    /// Builds them; of the test programs those that are wanted.
    ///
    /// # Errors
    /// When one does not compile.
    pub(crate) fn build(builder: &Builder<'_>, tests: &[&str]) -> anyhow::Result<Self> {
        let files = match builder.target {
            None => Self::native(builder, tests)?,
            Some(_) => Self::foreign(builder, tests)?,
        };
        let libraries = match builder.target {
            None => libraries(&files)?,
            Some(_) => Vec::new(),
        };
        Ok(Self { files, libraries })
    }

    fn native(builder: &Builder<'_>, tests: &[&str]) -> anyhow::Result<Vec<Named>> {
        let slat = builder.cargo("build", &["-p", "slat", "--bin", "slat"], &[(SLAT, "slat")])?;
        // All of the workspace at once is what `cargo xtask test` has built.
        let names: Vec<_> = TESTS
            .into_iter()
            .filter(|(program, _)| tests.contains(program))
            .collect();
        if names.is_empty() {
            return Ok(slat);
        }
        let tests = builder.cargo("test", &["--no-run", "--workspace"], &names)?;
        Ok([slat, tests].concat())
    }

    fn foreign(builder: &Builder<'_>, tests: &[&str]) -> anyhow::Result<Vec<Named>> {
        if tests.is_empty() {
            return builder.cargo("build", &["-p", "slat", "--bin", "slat"], &[(SLAT, "slat")]);
        }
        let [system, vmm] = TESTS;
        let chosen = ["-p", "slat", "-p", "slat-tests", "-p", "slat-vmm"];
        let what = [&chosen[..], &["--bin", "slat", "--test", "system"]].concat();
        let mut files = builder.cargo("build", &what, &[(SLAT, "slat"), system])?;
        files.retain(|(program, _)| *program == SLAT || tests.contains(program));
        if tests.contains(&VMM) {
            let what = [&["--no-run"], &chosen[..], &["--lib"]].concat();
            files.extend(builder.cargo("test", &what, &[vmm])?);
        }
        Ok(files)
    }

    /// Names and files.
    pub(crate) fn files(&self) -> &[(&'static str, PathBuf)] {
        &self.files
    }

    /// Libraries they use.
    pub(crate) fn libraries(&self) -> &[PathBuf] {
        &self.libraries
    }
}

impl<'a> Builder<'a> {
    /// Gets a compiler and a linker.
    ///
    /// # Errors
    /// When they cannot be had here.
    pub(crate) fn new(
        workspace: &'a Workspace,
        machine: Machine,
        profile: Option<&'a str>,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        match machine {
            Machine::X86_64 => Ok(Self {
                workspace,
                environment: Vec::new(),
                profile: profile.unwrap_or("release"),
                tests: profile.unwrap_or("dev"),
                target: None,
            }),
            Machine::Riscv64 => Self::cross(workspace, profile, folder),
        }
    }

    fn cross(
        workspace: &'a Workspace,
        profile: Option<&'a str>,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let linker = riscv64::c_compiler(folder)?;
        // Another compiler than the workspace's must not share its folder.
        let target_dir = riscv64::folder(workspace)?;
        let packages = target_dir.join("packages");
        let target_dir = target_dir.display().to_string();
        let mut environment = vec![
            ("CARGO_TARGET_DIR", target_dir),
            (
                "CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_LINKER",
                linker.clone(),
            ),
            (riscv64::CC, linker),
            (
                "CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_RUSTFLAGS",
                "-C target-feature=+crt-static".to_owned(),
            ),
        ];
        if !riscv64::has_target() {
            let rustc = riscv64::fetched(&packages)?;
            environment.push(("RUSTC", rustc.display().to_string()));
        }
        Ok(Self {
            workspace,
            environment,
            profile: profile.unwrap_or(riscv64::PROFILE),
            tests: profile.unwrap_or(riscv64::PROFILE),
            target: Some(riscv64::TARGET),
        })
    }

    /// Builds programs, each of which cargo calls by its second name, and says where they are.
    fn cargo(
        &self,
        verb: &str,
        what: &[&str],
        names: &[(&'static str, &str)],
    ) -> anyhow::Result<Vec<Named>> {
        let mut command = self.workspace.cargo();
        let profile = if verb == "test" {
            self.tests
        } else {
            self.profile
        };
        command.args([verb, "--locked", "--quiet", "--profile", profile]);
        command.args(what);
        command.args(self.target.iter().flat_map(|target| ["--target", *target]));
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        println!("{}", shell::line(&command));
        command.arg("--message-format=json-render-diagnostics");
        command.stderr(std::process::Stdio::inherit());
        let output = command.output().context("starting cargo")?;
        ensure!(output.status.success(), "cargo: {}", output.status);
        let said = String::from_utf8_lossy(&output.stdout);
        let file = |(program, name): &(&'static str, &str)| {
            let file = executable_in(&said, name);
            let file = file.with_context(|| format!("cargo names no executable of {name}"))?;
            Ok((*program, file))
        };
        names.iter().map(file).collect()
    }
}

/// The executable of that name in cargo's messages, which may tell of others that it needs.
fn executable_in(said: &str, name: &str) -> Option<PathBuf> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// Libraries that the programs are loaded with, once each.
fn libraries(files: &[(&str, PathBuf)]) -> anyhow::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = Vec::new();
    for (_, path) in files {
        let said = shell::output(Command::new("ldd").arg(path))?;
        found.extend(libraries_in(&said));
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn libraries_in(said: &str) -> Vec<PathBuf> {
    said.lines()
        .filter_map(|line| line.split_once("=> ")?.1.split_once(" (0x"))
        .map(|(path, _)| path.into())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(libraries_in(said), [PathBuf::from("/lib/libc.so.6")]);
    }

    #[test]
    fn an_executable_is_found_by_its_name() {
        let said = "{\"target\":{\"name\":\"system\"},\"executable\":null}\n\
                    {\"target\":{\"name\":\"system\"},\"executable\":\"/a/system-1\"}\nnoise\n\
                    {\"target\":{\"name\":\"oracles\"},\"executable\":\"/a/oracles\"}\n";
        let path = Some(PathBuf::from("/a/system-1"));
        assert_eq!(executable_in(said, "system"), path);
        assert_eq!(executable_in(said, "slat"), None);
    }
}
