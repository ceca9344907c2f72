//! The processes beside a VM's: its pager, and the writer of a save. Started here, each in a
//! session of its own; both end by themselves when their socket closes.
//!
//! A pager outlives the agent as its VM does. It finds its VM by the VM's directory, and its
//! standard error is `<dir>/pager.log`, which it bounds itself. A writer has one end of a socket
//! pair as descriptor [`WRITER_FD`], and ends with the agent: its log is the agent's.

use std::{
    ffi::OsString,
    fs::OpenOptions,
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::PathBuf,
    process::Stdio,
};

use rustix::{
    io::{FdFlags, dup2, fcntl_setfd},
    process::setsid,
};
use slat_paging::wire::{Socket, WRITER_FD};
use slat_record::dir::VmDir;
use tokio::process::Command;

use super::process::Process;

/// How both are started.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    /// Program and leading arguments of a pager; `--dir` is added.
    pub(super) pager: Vec<OsString>,
    /// Program and arguments of a save's writer.
    pub(super) writer: Vec<OsString>,
}

/// The log of a VM's pager.
pub(super) fn pager_log(dir: &VmDir) -> PathBuf {
    dir.path().join("pager.log")
}

impl Programs {
    /// Starts the pager of the VM in `dir`. It connects by itself.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn start_pager(&self, dir: &VmDir) -> io::Result<Process> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(pager_log(dir))?;
        let mut command = command(&self.pager)?;
        command.arg("--dir").arg(dir.path()).stderr(log);
        // SAFETY: the closure runs between fork and exec and makes one system call, setsid, which
        // is async-signal-safe; it allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(|| setsid().map(drop).map_err(io::Error::from));
        }
        started(&mut command)
    }

    /// Starts a writer at the other end of a socket pair.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn start_writer(&self, socket: &Socket) -> io::Result<Process> {
        let mut command = command(&self.writer)?;
        let raw = socket.as_fd().as_raw_fd();
        // SAFETY: the closure runs between fork and exec and makes two or three system calls, which
        // are async-signal-safe; it allocates nothing and takes no lock. `raw` is open: `socket`
        // outlives the spawn below.
        unsafe {
            command.pre_exec(move || {
                setsid()?;
                place(raw)
            });
        }
        started(&mut command)
    }
}

/// Gives the child its end of the socket under the number that it knows.
fn place(raw: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor is open in the child that is being made, which alone uses it.
    let socket = unsafe { BorrowedFd::borrow_raw(raw) };
    if raw == WRITER_FD {
        // It is there already, and must only survive the exec.
        return Ok(fcntl_setfd(socket, FdFlags::empty())?);
    }
    // SAFETY: whatever the number named in the parent is replaced in this child alone, which runs
    // nothing else before its exec; it is never closed by this value.
    let mut at = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(WRITER_FD) });
    Ok(dup2(socket, &mut at)?)
}

fn command(program: &[OsString]) -> io::Result<Command> {
    let (program, arguments) = program
        .split_first()
        .ok_or_else(|| io::Error::other("no program is configured"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(false);
    Ok(command)
}

fn started(command: &mut Command) -> io::Result<Process> {
    let child = command.spawn()?;
    // Not yet reaped, so the number is still this child's.
    let pid = child
        .id()
        .ok_or_else(|| io::Error::other("it ended at once"))?;
    Process::new(pid, Some(child))
}
