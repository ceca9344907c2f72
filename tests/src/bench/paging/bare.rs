//! The peer: a process whose threads read faults and map pages, and do nothing else.
//!
//! It is as far from who faults as Slat's pager is: a process of its own, which is given the
//! descriptor over a socket. Each of its threads waits for faults, reads those that there are, and
//! resolves them by one call each. It keeps no table, looks up no memory and counts faults alone.
//!
//! On the socket: at first how many threads, with the descriptor, which is answered with 0; then
//! any number is a question for the faults so far. It ends with its socket.

use std::{
    io,
    os::fd::AsFd as _,
    path::Path,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use anyhow::{Context as _, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use slat_paging::{
    PAGE, SOCKET,
    uffd::{FaultKind, Uffd},
    wire::{Listener, Socket, WireError},
};

use super::vm::{PATIENCE, View};

/// What the benchmark's own program is started with as such a handler, before the socket's path.
pub const OPTION: &str = "--bare-handler";

/// A view whose faults such a process resolves.
#[derive(Debug)]
pub struct Bare {
    /// Its memory.
    pub view: View,
    /// How many threads resolve its faults.
    pub threads: u64,
    socket: Socket,
    process: Child,
    _dir: slat_test_dir::TestDir,
}

impl Bare {
    /// Starts one with so many threads, of this program, and waits until it serves.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(pages: usize, threads: u64) -> anyhow::Result<Self> {
        let view = View::new(pages)?;
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join(SOCKET);
        let listener = Listener::bind(&path)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(OPTION).arg(&path);
        let process = command.spawn().context("starting a bare handler")?;
        let bare = Self {
            socket: listener.accept()?,
            view,
            threads,
            process,
            _dir: dir,
        };
        bare.socket.set_patience(Some(PATIENCE))?;
        bare.socket.send(&threads, &[bare.view.uffd.as_fd()])?;
        ensure!(bare.socket.receive::<u64>()?.message == 0, "no handler");
        Ok(bare)
    }

    /// Faults so far.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn faults(&self) -> anyhow::Result<u64> {
        self.socket.send(&0_u64, &[])?;
        Ok(self.socket.receive::<u64>()?.message)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.socket.close();
        // It ends with its socket; should it not, it is ended.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// What the process does: resolves faults until its socket ends.
///
/// # Errors
/// When it is not told what to do.
pub fn serve(path: &Path) -> anyhow::Result<()> {
    let socket = Socket::connect(path)?;
    let mut first = socket.receive::<u64>()?;
    let uffd = Arc::new(Uffd::from_fd(first.fds.pop().context("no descriptor")?));
    let faults = Arc::new(AtomicU64::new(0));
    for _ in 0..first.message {
        let (uffd, faults) = (Arc::clone(&uffd), Arc::clone(&faults));
        // They end with the process.
        thread::spawn(move || resolve(&uffd, &faults));
    }
    socket.send(&0_u64, &[])?;
    loop {
        match socket.receive::<u64>() {
            Ok(_) => socket.send(&faults.load(Relaxed), &[])?,
            Err(WireError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn resolve(uffd: &Uffd, count: &AtomicU64) {
    let mut faults = Vec::new();
    loop {
        faults.clear();
        if let Err(error) = uffd.read(&mut faults) {
            if error.kind() != io::ErrorKind::WouldBlock {
                eprintln!("error: reading faults: {error}");
                return;
            }
            // Interrupted, or there is one: it is looked.
            let _ = poll(&mut [PollFd::new(uffd, PollFlags::IN)], None);
        }
        count.fetch_add(faults.len() as u64, Relaxed);
        for fault in &faults {
            let done = match fault.kind {
                FaultKind::Missing => uffd.zero(fault.address, PAGE as u64),
                _ => uffd.map(fault.address, PAGE as u64, false, true),
            };
            if done.error.is_some() {
                // Another thread was faster, or the page came meanwhile: who waits looks again.
                let _ = uffd.wake(fault.address, PAGE as u64);
            }
        }
    }
}
