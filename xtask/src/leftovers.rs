//! What a run may leave behind: `slat` and `slat-bare` processes of this build, guest memory, Unix
//! sockets, temporary files.
//!
//! Processes are known by the file they run from, so another checkout's are not ours. [`Scratch`]
//! is a temporary directory that is given to a run as its TMPDIR and must be empty again when the
//! run has ended.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use crate::{example, tally::Tally, workspace::Workspace};

/// How the temporary directories of the demo's, the tests' and this tool's runs begin.
const FLEETS: [&str; 3] = ["slat-d", "slat-test-", "slat-x"];

/// How much of what a left directory holds is named.
const NAMED: usize = 8;

/// The programs that runs start.
const PROGRAMS: [&str; 2] = ["slat", example::NAME];

/// A temporary directory of its own for one run.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one. Its path is short, because the path of a Unix socket has at most 107 bytes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn new(name: &str) -> anyhow::Result<Self> {
        let initial = name.chars().next().unwrap_or('x');
        let path = std::env::temp_dir().join(format!("slat-x{initial}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// Makes a command use it.
    pub(crate) fn give(&self, command: &mut Command) {
        command.env("TMPDIR", &self.0);
    }

    /// What is in it now. What a directory holds is said with it, since its own name may be a
    /// random one and say nothing of who made it.
    pub(crate) fn remains(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries
            .map(|entry| {
                format!(
                    "left in the temporary directory: {}{}",
                    entry.file_name().display(),
                    holding(&entry.path())
                )
            })
            .collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What should not be there was reported; the directory is this run's own.
        drop(fs::remove_dir_all(&self.0));
    }
}

/// ` (a directory, empty)` or ` (a directory, with vms, vms/web, ...)`, and nothing for a file.
fn holding(path: &Path) -> String {
    if !path.is_dir() {
        return String::new();
    }
    let mut names = Vec::new();
    let mut ahead = vec![path.to_owned()];
    while let Some(next) = ahead.pop().filter(|_| names.len() < NAMED) {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            let name = entry.path();
            let name = name.strip_prefix(path).unwrap_or(&name);
            names.push(name.display().to_string());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                ahead.push(entry.path());
            }
        }
    }
    names.sort_unstable();
    let more = if names.len() > NAMED { ", ..." } else { "" };
    names.truncate(NAMED);
    match names.is_empty() {
        true => " (a directory, empty)".to_owned(),
        false => format!(" (a directory, with {}{more})", names.join(", ")),
    }
}

/// Looks for everything.
///
/// # Errors
/// When cargo cannot say where it builds.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<Tally> {
    let mut faults = processes(&workspace.target_dir()?);
    let entries = fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten();
    let lines = command_lines();
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for path in entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
    {
        let text = path.display().to_string();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A directory that a living process names is a run's that goes on: another checkout's, or a
        // process reported above.
        if FLEETS.iter().any(|prefix| name.starts_with(prefix))
            && !lines.iter().any(|line| line.contains(&text))
        {
            faults.push(format!("temporary directory: {text}"));
            faults.extend(sockets(&table, &text));
        }
    }
    Ok(Tally::of_faults(&faults))
}

/// The command line of every process that may be looked at.
fn command_lines() -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|words| String::from_utf8_lossy(&words).replace('\0', " "))
        .collect()
}

/// Living processes of [`PROGRAMS`] that run from `target`, with the guest memory they hold.
pub(crate) fn processes(target: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(program) = fs::read_link(entry.path().join("exe")) else {
            continue;
        };
        // A program that was built anew meanwhile shows as `slat (deleted)`.
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
        if !program.starts_with(target) || !PROGRAMS.contains(&name) {
            continue;
        }
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        let memory = fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let memory = memory
            .filter(|fd| {
                fs::read_link(fd.path())
                    .is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
            })
            .count();
        found.push(format!(
            "process {}: {} ({memory} memfd)",
            entry.file_name().display(),
            line.trim_end()
        ));
    }
    found
}

/// Unix sockets still bound below `folder`, from `/proc/net/unix`.
fn sockets(table: &str, folder: &str) -> Vec<String> {
    let path = |line: &str| line.split_whitespace().nth(7).map(str::to_owned);
    let below = |path: &String| {
        let rest = path.strip_prefix(folder);
        rest.is_some_and(|rest| rest.starts_with('/'))
    };
    table
        .lines()
        .filter_map(path)
        .filter(below)
        .map(|path| format!("socket: {path}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_tells_what_stayed_and_takes_it_along() {
        let scratch = Scratch::new("test").unwrap();
        assert!(scratch.remains().is_empty());
        fs::write(scratch.0.join("vm.sock"), "").unwrap();
        assert_eq!(
            scratch.remains(),
            ["left in the temporary directory: vm.sock"]
        );
        fs::remove_file(scratch.0.join("vm.sock")).unwrap();
        fs::create_dir_all(scratch.0.join(".tmpx/vms")).unwrap();
        fs::create_dir(scratch.0.join("none")).unwrap();
        fs::write(scratch.0.join(".tmpx/vms/log"), "").unwrap();
        let mut remains = scratch.remains();
        remains.sort_unstable();
        assert_eq!(
            remains,
            [
                "left in the temporary directory: .tmpx (a directory, with vms, vms/log)",
                "left in the temporary directory: none (a directory, empty)"
            ]
        );
        let path = scratch.0.clone();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn bound_sockets_are_seen_in_the_kernels_table() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 20501 /tmp/slat-demo-x/agent/vms/a/vm.sock\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 20502 /run/other.sock\n";
        assert_eq!(
            sockets(table, "/tmp/slat-demo-x"),
            ["socket: /tmp/slat-demo-x/agent/vms/a/vm.sock"]
        );
    }

    #[test]
    fn a_process_is_known_by_its_program() {
        // This test's own program is not called slat.
        let own = std::env::current_exe().unwrap();
        assert!(
            processes(own.parent().unwrap())
                .iter()
                .all(|line| !line.contains("xtask"))
        );
    }
}
