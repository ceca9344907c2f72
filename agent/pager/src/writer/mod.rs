//! The process that writes a saved VM: one file, and then it ends.
//!
//! It is told everything before it begins ([`slat_paging::wire`]), reads pages through the same
//! chain of layers as a pager does, and says how far it is. What it read of a snapshot it says to
//! be taken, so that the VM's pager need not keep it, and gives the memory of kept pages back
//! behind itself.
//!
//! # Threads
//! *workers* read and write runs of pages, next to each other in a file that they share; the first
//! that fails stops all. The *first thread* says how far they are and listens for the end of the
//! connection; then it ends at once, whatever a worker is in.
//!
//! *Locking*: one lock over where the next run begins and what failed (`work`).

mod job;
mod pages;
mod work;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slat_paging::wire::{FromWriter, Socket, ToWriter, Written};

pub(crate) use self::work::Work;
use self::{job::Job, pages::write};
use crate::error::{PagerError, Trouble};

/// Between two words of how far it is.
const PACE: Duration = Duration::from_millis(250);
/// How often it is looked whether the workers are done.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};
/// More do not make a disk faster.
const MOST_WORKERS: usize = 4;

/// Writes what it is told to.
///
/// # Errors
/// When the connection ends, or what came over it was wrong. That a file could not be written is
/// told to the other side, and is no error here.
pub fn run(socket: Socket) -> Result<(), PagerError> {
    let result = match Job::hear(&socket) {
        Ok(job) => write_out(&socket, job)?,
        Err(PagerError::Trouble(trouble)) => {
            // Who still speaks hears it when it listens.
            hear_out(&socket)?;
            Err(trouble)
        }
        Err(error) => return Err(error),
    };
    let last = match result {
        Ok(written) => FromWriter::Done(written),
        Err(trouble) => FromWriter::Failed(trouble.problem()),
    };
    Ok(socket.send(&last, &[])?)
}

/// Hears the rest of what is told, and forgets it.
fn hear_out(socket: &Socket) -> Result<(), PagerError> {
    while !matches!(socket.receive()?.message, ToWriter::Go) {}
    Ok(())
}

/// Has workers write it. What came of the file.
fn write_out(socket: &Socket, job: Job) -> Result<Result<Written, Trouble>, PagerError> {
    let work = Arc::new(Work::new(job));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..workers.min(MOST_WORKERS) {
        let own = Arc::clone(&work);
        let started = std::thread::Builder::new()
            .name("write".to_owned())
            .spawn(move || write(&own));
        started.map_err(PagerError::kernel("starting a thread"))?;
    }
    let (mut told, mut told_at) = (Written::default(), Instant::now());
    loop {
        if let Some(result) = work.result() {
            return Ok(result);
        }
        let now = work.written();
        if now != told && told_at.elapsed() >= PACE {
            socket.send(&FromWriter::Progress(now), &[])?;
            (told, told_at) = (now, Instant::now());
        }
        let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
        // Interrupted, or nothing: it is looked again.
        let _ = poll(&mut fds, Some(&LOOK));
        if !fds[0].revents().is_empty() {
            work.stop();
            return Err(PagerError::Wire(slat_paging::wire::WireError::Closed));
        }
    }
}
