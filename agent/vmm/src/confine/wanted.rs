//! How a VM process is to be confined: what its command line says.

use std::{fmt, path::PathBuf, str::FromStr};

/// What becomes of a system call that is not listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// It is not made, the caller is told that the kernel lacks it, and the log says so. What no
    /// part of a VM process does by mistake, such as starting a program, ends the process.
    #[default]
    Refuse,
    /// The process ends.
    Kill,
    /// It is made; the kernel's audit log has it.
    Log,
    /// There is no filter.
    Off,
}

impl Seccomp {
    /// All of them, strictest first.
    pub const ALL: [Self; 4] = [Self::Kill, Self::Refuse, Self::Log, Self::Off];

    /// The word for it, as in `--vm-seccomp`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Kill => "kill",
            Self::Log => "log",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl FromStr for Seccomp {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.word() == word);
        found.ok_or_else(|| format!("\"{word}\" is none of kill, refuse, log, off"))
    }
}

/// How a VM process is to be confined.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// The VM's directory, all of which it may change; made when it is missing.
    pub dir: PathBuf,
    /// What becomes of unlisted system calls.
    pub seccomp: Seccomp,
    /// It may leave a core dump in its directory, which has the guest's memory in it.
    pub core_dumps: bool,
    /// It looks up names of hosts: it exports traces.
    pub looks_up_hosts: bool,
}
