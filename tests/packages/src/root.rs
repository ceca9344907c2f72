//! The directory that packages are unpacked into.
//!
//! The packages are of a Debian release of their own, so their programs run by their own loader
//! with their own libraries and nothing of the machine's.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

/// What was unpacked.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// What is in `folder`.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// A path below it, without a leading slash.
    #[must_use]
    pub fn path(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }

    /// Where its libraries are.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.path("usr/lib/x86_64-linux-gnu")
    }

    /// A program of it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(self.libraries());
        command.arg(self.path(program));
        // Another build's modules make QEMU abort; Bochs looks for its own where the package would
        // have put them.
        command.env("QEMU_MODULE_DIR", self.libraries().join("qemu"));
        command.env("LTDL_LIBRARY_PATH", self.libraries().join("bochs/plugins"));
        command
    }
}

/// Writes `command`, without its environment but for `variables`, down as a program at `path`, for
/// others that want the path of one.
///
/// # Errors
/// When it cannot be written.
pub fn write_program(path: &Path, command: &Command, variables: &[&str]) -> anyhow::Result<()> {
    let quoted = |text: &std::ffi::OsStr| {
        let text = text.display().to_string();
        format!("'{}'", text.replace('\'', "'\\''"))
    };
    let mut line = String::from("#!/bin/sh\n");
    for (key, value) in command.get_envs() {
        if let Some(value) = value.filter(|_| variables.iter().any(|name| key == *name)) {
            line.push_str(&format!("export {}={}\n", key.display(), quoted(value)));
        }
    }
    line.push_str("exec");
    for word in std::iter::once(command.get_program()).chain(command.get_args()) {
        line.push_str(&format!(" {}", quoted(word)));
    }
    line.push_str(" \"$@\"\n");
    let writing = || format!("writing {}", path.display());
    fs::write(path, line).with_context(writing)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).with_context(writing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_written_down_runs_with_what_it_is_given() {
        let folder = slat_test_dir::TestDir::new();
        let path = folder.path().join("say");
        let mut command = Command::new("sh");
        command.args(["-c", "echo $WORD $HIDDEN $0 $1", "a b"]);
        command.env("WORD", "w").env("HIDDEN", "h");
        write_program(&path, &command, &["WORD"]).unwrap();
        let said = Command::new(path).arg("more").output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout), "w a b more\n");
    }
}
