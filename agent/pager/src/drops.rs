//! Asking the VM process to drop mappings, which only it can do (`MADV_DONTNEED`).
//!
//! *Locking*: one lock over the questions that are open; whoever waits does so on a condition with
//! it, for at most [`BOUND`]. It is the last lock that anybody takes. Questions are as many as
//! there are threads here that zap, each with the runs of one batch.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use slat_mmu::Refused;
use slat_paging::wire::{FromPager, Socket};

use crate::sync::{lock, wait};

/// How long the VM process has to answer. It drops gigabytes in milliseconds; one that is stopped
/// (a debugger, a frozen cgroup) may take longer, and then the mapping stays, and is said to.
const BOUND: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(crate) struct Drops {
    socket: Arc<Socket>,
    inner: Mutex<Inner>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    last: u64,
    /// What was answered to those that somebody waits for.
    open: HashMap<u64, Option<i32>>,
    over: bool,
}

impl Drops {
    pub(crate) fn new(socket: Arc<Socket>) -> Self {
        Self {
            socket,
            inner: Mutex::default(),
            answered: Condvar::new(),
        }
    }

    /// Asks; what to wait for.
    pub(crate) fn ask(&self, memory: u32, page: u64, pages: u64) -> Result<u64, Refused> {
        let request = {
            let mut inner = lock(&self.inner);
            if inner.over {
                return Err(Refused::Gone);
            }
            inner.last += 1;
            let request = inner.last;
            inner.open.insert(request, None);
            request
        };
        let question = FromPager::DropMappings {
            request,
            memory,
            page,
            pages,
        };
        match self.socket.send(&question, &[]) {
            Ok(()) => Ok(request),
            Err(_) => {
                lock(&self.inner).open.remove(&request);
                Err(Refused::Gone)
            }
        }
    }

    /// Waits for the answer.
    pub(crate) fn wait(&self, request: u64) -> Result<(), Refused> {
        let end = Instant::now() + BOUND;
        let mut inner = lock(&self.inner);
        loop {
            let answer = inner.open.get(&request).copied().flatten();
            let left = end.saturating_duration_since(Instant::now());
            let result = match answer {
                Some(0) => Ok(()),
                Some(libc::ESRCH) => Err(Refused::Gone),
                Some(errno) => Err(Refused::Failed(errno)),
                None if inner.over => Err(Refused::Gone),
                None if left.is_zero() => Err(Refused::Busy),
                None => {
                    inner = wait(&self.answered, inner, left);
                    continue;
                }
            };
            inner.open.remove(&request);
            return result;
        }
    }

    /// The VM process has answered. An answer that nobody waits for any more is dropped.
    pub(crate) fn dropped(&self, request: u64, errno: i32) {
        if let Some(answer) = lock(&self.inner).open.get_mut(&request) {
            *answer = Some(errno);
            self.answered.notify_all();
        }
    }

    /// Nobody will answer any more.
    pub(crate) fn end(&self) {
        lock(&self.inner).over = true;
        self.answered.notify_all();
    }
}
