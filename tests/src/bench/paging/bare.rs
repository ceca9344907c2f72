//! The peer: threads that read faults and map pages, and do nothing else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slat_paging::{PAGE, uffd::Uffd};

/// How long a thread waits before it looks whether it shall end.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// Resolves minor faults, until it is dropped.
#[derive(Debug)]
pub struct Bare {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bare {
    /// One thread, as `uffd` is told of faults.
    #[must_use]
    pub fn start(uffd: Arc<Uffd>) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&end);
        let thread = thread::spawn(move || {
            let mut faults = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                faults.clear();
                if uffd.read(&mut faults).is_err() {
                    // Nothing to read: it is waited for.
                    let _ = poll(&mut [PollFd::new(&*uffd, PollFlags::IN)], Some(&LOOK));
                }
                for fault in &faults {
                    uffd.map(fault.address, PAGE as u64, false, true);
                }
            }
        });
        Self {
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
