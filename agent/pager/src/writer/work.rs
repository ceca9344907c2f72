//! What the writer's threads share: which run is next, how far it is, and how it ended.
//!
//! *Locking*: each lock is held for a look; `writer` before `progress`, and no other two.

use std::{
    fs::File,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use slat_image::{MemorySpec, Progress, Reader, Writer};
use slat_paging::wire::{ProblemKind, Written};

use super::job::{Job, failed};
use crate::{error::Trouble, source::Chain, sync::lock};

/// Pages of a run: 1 MiB, whole clusters.
const RUN: u64 = 256;

/// See the module.
pub(crate) struct Work {
    pub(super) name: String,
    pub(super) base: Option<Arc<Reader<File>>>,
    pub(super) chain: Chain,
    memories: Vec<MemorySpec>,
    /// `None` once the file is being finished. Whoever has a run has a copy; nobody else has.
    writer: Mutex<Option<Arc<Writer<File>>>>,
    /// When it was asked the last time.
    progress: Mutex<Progress>,
    next: Mutex<Next>,
    stopped: AtomicBool,
    done: AtomicU64,
    pub(super) empty: AtomicU64,
    all: u64,
}

#[derive(Default)]
struct Next {
    /// Index of the memory.
    memory: usize,
    page: u64,
    /// Workers that have a run.
    busy: usize,
    result: Option<Result<Written, Trouble>>,
}

impl Work {
    pub(super) fn new(job: Job) -> Self {
        Self {
            all: job.memories.iter().map(|memory| memory.pages).sum(),
            name: job.name,
            base: job.base,
            chain: job.chain,
            memories: job.memories,
            writer: Mutex::new(Some(Arc::new(job.writer))),
            progress: Mutex::default(),
            next: Mutex::default(),
            stopped: AtomicBool::new(false),
            done: AtomicU64::new(0),
            empty: AtomicU64::new(0),
        }
    }

    /// The next run: memory and pages. `None`: there is none.
    pub(super) fn take(&self) -> Option<(u32, Range<u64>)> {
        let mut next = lock(&self.next);
        if self.stopped.load(Relaxed) {
            return None;
        }
        loop {
            let memory = *self.memories.get(next.memory)?;
            if next.page < memory.pages {
                let pages = next.page..memory.pages.min(next.page + RUN);
                next.page = pages.end;
                next.busy += 1;
                return Some((memory.number, pages));
            }
            next.memory += 1;
            next.page = 0;
        }
    }

    /// A run is over. Whether it was the last: then the file is to be finished.
    pub(super) fn over(&self, pages: u64, result: Result<(), Trouble>) -> bool {
        let mut next = lock(&self.next);
        next.busy -= 1;
        match result {
            Ok(()) => {
                self.done.fetch_add(pages, Relaxed);
            }
            Err(trouble) => {
                self.stopped.store(true, Relaxed);
                next.result.get_or_insert(Err(trouble));
            }
        }
        next.busy == 0 && next.result.is_none() && self.done.load(Relaxed) == self.all
    }

    /// Nothing is taken any more.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all == 0
    }

    /// The file, for a run.
    pub(super) fn writer(&self) -> Result<Arc<Writer<File>>, Trouble> {
        let writer = lock(&self.writer).clone();
        writer.ok_or_else(|| Trouble::new(ProblemKind::Stopping, "the file is being finished"))
    }

    /// Makes the file whole, and says how it ended. Nobody has a run.
    pub(super) fn finish(&self) {
        let progress = self.progress();
        *lock(&self.progress) = progress;
        let writer = lock(&self.writer).take().and_then(Arc::into_inner);
        let Some(writer) = writer else {
            // Another worker does it.
            return;
        };
        let finished = writer.finish();
        let result = finished.map_err(|error| failed(&self.name, &error));
        let result = result.map(|summary| Written {
            file_bytes: summary.length,
            pages: summary.data_pages,
            ..self.written()
        });
        lock(&self.next).result.get_or_insert(result);
    }

    fn progress(&self) -> Progress {
        match &*lock(&self.writer) {
            Some(writer) => writer.progress(),
            None => *lock(&self.progress),
        }
    }

    pub(super) fn result(&self) -> Option<Result<Written, Trouble>> {
        lock(&self.next).result.clone()
    }

    pub(super) fn written(&self) -> Written {
        let progress = self.progress();
        Written {
            done: self.done.load(Relaxed),
            all: self.all,
            empty: self.empty.load(Relaxed),
            pages: progress.data_pages,
            file_bytes: progress.stored_bytes,
        }
    }
}
