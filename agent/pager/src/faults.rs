//! Reading the kernel's faults, and resolving what can be resolved at once.
//!
//! One thread reads. A fault whose page is there is resolved by it on the spot, and when several
//! come at once, one after the other: waking another thread would cost more than mappings do. Only
//! of very many at once, and where something is under way in the mirror, is the rest for handlers.
//! After a fault it looks for the next for a moment, and then sleeps until the kernel tells of one.
//!
//! Faults at addresses that are no memory's (yet) are remembered, and their threads woken when the
//! memories change: then they fault again.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slat_mmu::Vcpu;
use slat_paging::{
    PAGE,
    uffd::{Fault, Uffd},
};

use crate::{
    error::PagerError,
    memory::Memory,
    mirror::Mirror,
    queue::{Wait, Waiter},
    resolve::Resolved,
    shared::Shared,
    sync::{lock, read},
};

/// How often a mapping is tried before others get a turn.
const TRIES: u32 = 64;
/// The same where others may wait behind it: handlers take it up.
const FEW_TRIES: u32 = 8;
/// Reads in a row that may fail.
const MOST_UNREAD: u32 = 100;
/// Addresses that are remembered.
const MOST_STRAYS: usize = 1024;
/// The kernel tells of faults by itself; this is against a wake-up that is lost.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
/// Something is under way in the mirror, which takes as long as the VM process takes to answer.
const PAUSE: Duration = Duration::from_micros(50);

/// The thread that reads.
pub(crate) fn read_faults(shared: &Shared, mirror: &Mirror) {
    let mut vcpu = mirror.mmu.vcpu();
    let mut faults = Vec::new();
    let mut served: Option<Instant> = None;
    let mut unread = 0;
    while !shared.is_over() {
        faults.clear();
        match mirror.uffd.read(&mut faults) {
            Ok(()) => unread = 0,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                // Whoever faulted just now may well fault again, and others with it.
                if served.is_some_and(|at| at.elapsed() < shared.tuning.look_again) {
                    std::thread::yield_now();
                    continue;
                }
                served = None;
                wait_for_faults(&mirror.uffd, shared);
                continue;
            }
            Err(error) => {
                unread += 1;
                if unread == MOST_UNREAD {
                    // Another pager may have more luck; this one helps nobody.
                    return shared.fail(PagerError::kernel("reading faults")(error));
                }
                tracing::error!(%error, "reading faults");
                wait_for_faults(&mirror.uffd, shared);
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        }
        let since = Instant::now();
        let mut found: Vec<Wait> = Vec::with_capacity(faults.len());
        for fault in &faults {
            shared.stats.fault(fault.kind);
            match find(shared, fault) {
                Some((memory, page)) => found.push(Wait {
                    memory,
                    page,
                    waiter: Waiter {
                        thread: fault.thread,
                        write: fault.write,
                        kind: Some(fault.kind),
                        since,
                    },
                }),
                None => stray(shared, fault.address),
            }
        }
        // What has to be read is read while the others are mapped.
        let (here, away): (Vec<Wait>, Vec<Wait>) = found
            .into_iter()
            .partition(|wait| wait.memory.is_there(wait.page));
        away.into_iter().for_each(|wait| shared.want(wait));
        let mut here = here.into_iter();
        let own: Vec<Wait> = here.by_ref().take(shared.tuning.in_turn.max(1)).collect();
        here.for_each(|wait| shared.queue.push_ready(wait));
        for wait in own {
            shared.serve_for(&mut vcpu, wait, FEW_TRIES);
        }
        served = Some(Instant::now());
        if !shared.queue.wait_for_room() {
            return;
        }
    }
}

/// A thread that maps what could not be mapped at once.
pub(crate) fn handle(shared: &Shared, mirror: &Mirror) {
    let mut vcpu = mirror.mmu.vcpu();
    while !shared.is_over() {
        if let Some(wait) = shared.queue.take_ready() {
            shared.serve(&mut vcpu, wait);
        }
    }
}

fn find(shared: &Shared, fault: &Fault) -> Option<(Arc<Memory>, u64)> {
    let layout = read(&shared.layout);
    let (place, page) = layout.at_view(fault.address)?;
    Some((Arc::clone(&place.memory), page))
}

fn stray(shared: &Shared, address: u64) {
    let mut strays = lock(&shared.strays);
    if strays.contains(&address) {
        // A thread that was interrupted faults again.
    } else if strays.len() < MOST_STRAYS {
        strays.push(address);
    } else {
        tracing::warn!(address, "a fault outside of all memories is forgotten");
    }
}

fn wait_for_faults(uffd: &Uffd, shared: &Shared) {
    let mut fds = [
        PollFd::new(uffd, PollFlags::IN),
        PollFd::new(&shared.stop, PollFlags::IN),
    ];
    // Interrupted, or at the end of patience: the caller looks.
    let _ = poll(&mut fds, Some(&PATIENCE));
}

impl Shared {
    /// Maps a page for whoever waits for it, or puts it where it waits on.
    pub(crate) fn serve(&self, vcpu: &mut Vcpu, wait: Wait) {
        self.serve_for(vcpu, wait, TRIES);
    }

    fn serve_for(&self, vcpu: &mut Vcpu, wait: Wait, tries: u32) {
        for attempt in 0..tries {
            if self.is_over() {
                return;
            }
            let began = self.queue.retries();
            match self.resolve(vcpu, &wait.memory, wait.page, &wait.waiter) {
                Resolved::Done => {
                    let Waiter { thread, since, .. } = wait.waiter;
                    return self.stats.resolved(thread, since.elapsed());
                }
                Resolved::NotThere => return self.want(wait),
                Resolved::Again if attempt < TRIES / 2 => std::thread::yield_now(),
                Resolved::Again => std::thread::sleep(PAUSE),
                Resolved::Gone => return self.wake(&wait),
                Resolved::Failed(trouble) => {
                    self.queue.failed_to_map(wait, began);
                    return self.problems.set(trouble, began, &self.bell);
                }
            }
        }
        self.queue.push_ready(wait);
    }

    /// A page has to be read; where the guest goes on from page to page, those after it, too.
    fn want(&self, wait: Wait) {
        self.queue.push_fault(wait);
    }

    /// The memory of a fault is gone, or has moved: its thread tries again.
    fn wake(&self, wait: &Wait) {
        let layout = read(&self.layout);
        if let (Some(mirror), Some(place)) = (&self.mirror, layout.get(wait.memory.id)) {
            let address = place.view + wait.page * PAGE as u64;
            // Nobody waits in a view that is gone.
            let _ = mirror.uffd.wake(address, PAGE as u64);
        }
    }

    /// The memories have changed: faults outside of them may be inside now.
    pub(crate) fn wake_strays(&self) {
        let strays = std::mem::take(&mut *lock(&self.strays));
        if let Some(mirror) = &self.mirror {
            for address in strays {
                // A view that is gone has nobody who waits.
                let _ = mirror.uffd.wake(address, PAGE as u64);
            }
        }
    }
}
