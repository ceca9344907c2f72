//! What a VM process may do to the rest of its host: as little as its work takes.
//!
//! A guest that breaks out of KVM, or a hostile migration stream, gets this process. So before it
//! has a second thread it gives up what it will not need ([`apply`]), in this order:
//!
//! | file | what |
//! |---|---|
//! | `wanted` | what was asked for |
//! | `limits` | core dumps or none, room for descriptors; files it makes are its user's alone |
//! | `early` | what is opened before |
//! | `privileges` | no new privileges, and no capabilities |
//! | `files` | landlock: its own directory, `/dev/kvm` and the few files it opens |
//! | `filter` | seccomp: the system calls that its threads make, by role |
//! | `calls` | those lists |
//! | `refused` | calls that the filter refused: caught, counted, reported |
//! | `arch` | numbers and registers that differ between architectures |
//!
//! What it needs is written down, and was found by tracing the whole-system tests on both backends
//! (ADR 7, `docs/adr/0007-confined-vm-processes.md`). What the kernel does not have is
//! left out, logged and reported ([`Confined::lacks`]); only seccomp, which an operator chooses by
//! name, must be had.
//!
//! A thread that does one thing for its whole life narrows itself further (`enter`). All of it is
//! inherited by threads and cannot be undone.

mod arch;
mod calls;
mod early;
mod files;
mod filter;
mod limits;
mod privileges;
mod refused;
#[cfg(test)]
mod tests;
mod wanted;

use std::{
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

pub(crate) use self::{calls::Role, early::userfaultfd, refused::new as newly_refused};
pub use self::{
    files::landlock_supported,
    wanted::{Confinement, Seccomp},
};

/// What was got of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confined {
    /// What becomes of unlisted system calls.
    pub seccomp: Seccomp,
    /// The version of landlock that holds; `None`: none does.
    pub landlock: Option<u32>,
    /// Descriptors that it may have open.
    pub descriptors: u64,
    /// What this kernel or this user did not get, and why.
    pub lacks: Vec<String>,
}

/// Why a VM process cannot be confined as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfineError {
    /// Its directory is out of reach of the user it runs as.
    #[error(
        "{path}: {source}; a VM process has no capabilities: run the agent as the user who owns \
         its state directory", path = path.display()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The filter of system calls was asked for and cannot be had.
    #[error("seccomp: {message}; --vm-seccomp off does without")]
    Seccomp {
        /// Why.
        message: String,
    },
}

/// Set once by [`apply`]; `None` until then, and for tests of other things.
static MODE: OnceLock<Seccomp> = OnceLock::new();

/// Confines this process for good. Call it before there is a second thread: others would keep what
/// this one gives up.
///
/// # Errors
/// See [`ConfineError`]; what was given up by then stays given up.
pub fn apply(wanted: &Confinement) -> Result<Confined, ConfineError> {
    let directory = |source| ConfineError::Directory {
        path: wanted.dir.clone(),
        source,
    };
    let mut lacks = Vec::new();
    early::open();
    limits::own_files_only();
    // Guest memory passes through the socket in it: the directory is its owner's alone.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&wanted.dir)
        .map_err(directory)?;
    let descriptors = limits::apply(wanted.core_dumps, &mut lacks);
    privileges::drop_all(&mut lacks);
    // Without capabilities root, too, needs the permission bits.
    std::fs::read_dir(&wanted.dir).map_err(directory)?;
    if wanted.core_dumps {
        work_in(&wanted.dir, &mut lacks);
    }
    let landlock = files::restrict(wanted, &mut lacks);
    if wanted.seccomp != Seccomp::Off {
        if wanted.seccomp == Seccomp::Refuse {
            refused::catch().map_err(|error| ConfineError::Seccomp {
                message: format!("its signal cannot be caught: {error}"),
            })?;
        }
        filter::install_process(wanted.seccomp, wanted.looks_up_hosts)
            .map_err(|message| ConfineError::Seccomp { message })?;
    }
    // Only a second call finds it set, and the first one's filters hold all the same.
    let _ = MODE.set(wanted.seccomp);
    Ok(Confined {
        seccomp: wanted.seccomp,
        landlock,
        descriptors,
        lacks,
    })
}

/// What a process beside a VM's gives up for good: core dumps, which would have guest memory in
/// them, and all capabilities; files that it makes are its user's alone. Says what was not got.
/// Call it before there is a second thread.
#[must_use]
pub fn give_up() -> Vec<String> {
    let mut lacks = Vec::new();
    limits::own_files_only();
    limits::apply(false, &mut lacks);
    privileges::drop_all(&mut lacks);
    lacks
}

/// The kernel writes a core dump without a path of its own into the working directory, and there it
/// may do what the process may. That it was started in is the agent's, and out of its reach.
fn work_in(dir: &Path, lacks: &mut Vec<String>) {
    if !dir.is_absolute() {
        // The same name would mean another place afterwards.
        lacks.push(format!("core dumps: {} is no absolute path", dir.display()));
    } else if let Err(error) = std::env::set_current_dir(dir) {
        lacks.push(format!("core dumps: {}: {error}", dir.display()));
    }
}

/// Narrows the calling thread to its role for the rest of its life. Nothing where the process is
/// not confined.
pub(crate) fn enter(role: Role) {
    let Some(mode) = MODE.get().filter(|mode| **mode != Seccomp::Off) else {
        return;
    };
    if let Err(error) = filter::install_role(*mode, role) {
        tracing::error!(?role, error, "a thread keeps the process's system calls");
    }
}
