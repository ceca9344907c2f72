//! The kernel as the owner of what the mirror stands for: a batch becomes calls of userfaultfd.
//!
//! Frames of the mirror's slots name pages of memories: each memory has a range of frames of its
//! own, apart from all others, so a change is always of one memory.
//!
//! | change | call | the kernel says |
//! |---|---|---|
//! | map | `CONTINUE`, protected or not | `EEXIST`: mapped already; the leave to write is set |
//! | | | `EFAULT`: not in the file. The fault's own page is zeroes then: `ZEROPAGE` |
//! | protect | `WRITEPROTECT` | |
//! | unmap | the VM process is asked | an error number |
//!
//! *Locking*: the table of views is read-locked while a batch is carried out, and write-locked by
//! who changes it, which therefore waits for batches: at most as long as the VM process has to
//! answer ([`Drops`]).

use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use slat_mmu::{Batch, Change, ChangeKind, ExternalTables, FlushRequest, Host, Refused};
use slat_paging::{PAGE, uffd::Uffd};

use crate::{
    drops::Drops,
    memory::Memory,
    sync::{read, write},
};

/// What is known of the fault that a thread is about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hint {
    /// The first page of its own that the mirror is asked to map, as a frame of the mirror's slot.
    pub(crate) own: u64,
    /// The kernel said that its page is not in the file: no use in trying to map it first.
    pub(crate) missing: bool,
    /// Its neighbours are made as well where they are not in the file.
    pub(crate) ahead: bool,
}

thread_local! {
    static HINT: Cell<Hint> = const {
        Cell::new(Hint {
            own: 0,
            missing: false,
            ahead: false,
        })
    };
}

/// For the next batch of this thread.
pub(crate) fn hint(hint: Hint) {
    HINT.set(hint);
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Owner {
    uffd: Arc<Uffd>,
    can_protect: bool,
    drops: Arc<Drops>,
    views: RwLock<Views>,
    ended: AtomicBool,
}

/// By first frame.
type Views = BTreeMap<u64, View>;

#[derive(Debug)]
struct View {
    memory: Arc<Memory>,
    /// Where it is in the VM process.
    address: u64,
    /// The memory's slot is gone, and the mappings with it.
    gone: bool,
}

impl Owner {
    pub(crate) fn new(uffd: Arc<Uffd>, can_protect: bool, drops: Arc<Drops>) -> Self {
        Self {
            uffd,
            can_protect,
            drops,
            views: RwLock::default(),
            ended: AtomicBool::new(false),
        }
    }

    pub(crate) fn add(&self, memory: Arc<Memory>, address: u64) {
        let view = View {
            address,
            gone: false,
            memory,
        };
        let mut views = write(&self.views);
        views.insert(view.memory.pfn, view);
    }

    /// Nothing of the memory is mapped any more, and nothing will be.
    pub(crate) fn gone(&self, memory: &Memory) {
        if let Some(view) = write(&self.views).get_mut(&memory.pfn) {
            view.gone = true;
        }
    }

    pub(crate) fn remove(&self, memory: &Memory) {
        write(&self.views).remove(&memory.pfn);
    }

    /// From now on the kernel is asked for nothing.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    fn unmap(&self, view: &View, page: u64, pages: u64) -> Result<Option<u64>, Refused> {
        if view.gone {
            return Ok(None);
        }
        let request = self.drops.ask(view.memory.id, page, pages)?;
        Ok(Some(request))
    }

    fn protect(&self, view: &View, page: u64, pages: u64, writable: bool) -> Result<(), Refused> {
        if view.gone || !self.can_protect {
            return Ok(());
        }
        let (start, len) = (view.at(page), pages * PAGE as u64);
        let result = if writable {
            self.uffd.unprotect(start, len, true)
        } else {
            self.uffd.protect(start, len)
        };
        result.map_err(|error| refused(&error))
    }

    /// Maps pages; how many from the first on, and why no more.
    fn map(
        &self,
        view: &View,
        page: u64,
        pages: u64,
        writable: bool,
        hint: Hint,
    ) -> (u64, Option<Refused>) {
        if view.gone {
            return (0, Some(Refused::Gone));
        }
        let mut at = 0;
        let own = |at: u64| view.memory.pfn + page + at == hint.own;
        let mut missing = hint.missing && own(0);
        // Each page needs two calls at most, unless somebody punches holes and fills them.
        for _ in 0..4 * pages + 16 {
            if at == pages {
                return (pages, None);
            }
            let (start, left) = (view.at(page + at), pages - at);
            let done = if missing {
                let left = if hint.ahead { left } else { 1 };
                match self.make(view, page + at, left, writable) {
                    Ok(done) => done,
                    Err(why) => return (at, Some(why)),
                }
            } else {
                let protected = !writable && self.can_protect;
                self.uffd.map(start, left * PAGE as u64, protected, true)
            };
            at += done.bytes / PAGE as u64;
            let Some(error) = done.error else {
                missing = false;
                continue;
            };
            match error.raw_os_error() {
                // A neighbour that is not in the file is not mapped, unless it is to be made.
                Some(libc::EFAULT) if !missing && (own(at) || hint.ahead) => missing = true,
                // In the file after all.
                Some(libc::EEXIST) if missing => missing = false,
                Some(libc::EEXIST) => {
                    // Mapped already, by a pager before this one or news that was old. Who waits
                    // is woken, too.
                    if let Err(why) = self.set_leave(view, page + at, writable) {
                        return (at, Some(why));
                    }
                    at += 1;
                }
                _ => return (at, Some(refused(&error))),
            }
        }
        (at, Some(Refused::Busy))
    }

    fn set_leave(&self, view: &View, page: u64, writable: bool) -> Result<(), Refused> {
        self.protect(view, page, 1, writable)?;
        let woken = self.uffd.wake(view.at(page), PAGE as u64);
        woken.map_err(|error| refused(&error))
    }

    /// Makes pages that are there and not in the file: zeroes.
    fn make(
        &self,
        view: &View,
        page: u64,
        left: u64,
        writable: bool,
    ) -> Result<slat_paging::uffd::Done, Refused> {
        let end = view.memory.there_until(page..page + left);
        if end == page {
            return Err(Refused::ContentsMissing);
        }
        if writable || !self.can_protect {
            return Ok(self.uffd.zero(view.at(page), (end - page) * PAGE as u64));
        }
        // A page of zeroes cannot be made protected in one call.
        let made = view.memory.file.allocate(page, 1);
        made.map_err(|error| refused(&error))?;
        Ok(self.uffd.map(view.at(page), PAGE as u64, true, true))
    }

    fn carry_out(&self, views: &Views, change: &mut Change, hint: Hint) -> Option<u64> {
        let found = views.range(..=change.pfn().0).next_back();
        let pages = change.gfns().pages();
        let found = found.and_then(|(_, view)| {
            let page = change.pfn().0 - view.memory.pfn;
            (page + pages <= view.memory.pages).then_some((view, page))
        });
        let Some((view, page)) = found else {
            // A memory that is gone has no mappings.
            match change.kind() {
                ChangeKind::Map { .. } => change.refuse(0, Refused::Gone),
                _ => change.accept(),
            }
            return None;
        };
        match change.kind() {
            ChangeKind::Map { writable, .. } => match self.map(view, page, pages, writable, hint) {
                (_, None) => change.accept(),
                (done, Some(why)) => change.refuse(done, why),
            },
            ChangeKind::Protect { writable } => match self.protect(view, page, pages, writable) {
                Ok(()) => change.accept(),
                Err(why) => change.refuse(0, why),
            },
            ChangeKind::Unmap => match self.unmap(view, page, pages) {
                Ok(None) => change.accept(),
                Ok(Some(request)) => return Some(request),
                Err(why) => change.refuse(0, why),
            },
        }
        None
    }
}

impl View {
    fn at(&self, page: u64) -> u64 {
        self.address + page * PAGE as u64
    }
}

impl ExternalTables for Owner {
    fn apply(&self, batch: &mut Batch) {
        let hint = HINT.take();
        if self.ended.load(Ordering::Acquire) {
            return batch.answer(Err(Refused::Gone));
        }
        let views = read(&self.views);
        // All questions first, so that the VM process answers them in one go.
        let changes = batch.changes_mut().iter_mut();
        let open: Vec<(usize, u64)> = changes
            .enumerate()
            .filter_map(|(at, change)| Some((at, self.carry_out(&views, change, hint)?)))
            .collect();
        for (at, request) in open {
            let change = &mut batch.changes_mut()[at];
            match self.drops.wait(request) {
                Ok(()) => change.accept(),
                Err(why) => change.refuse(0, why),
            }
        }
    }
}

impl Host for Owner {
    /// Only external roots are used, and their owner's answer stands for the flush.
    fn flush(&self, _: &FlushRequest) {}

    fn external(&self) -> Option<&dyn ExternalTables> {
        Some(self)
    }
}

/// What the kernel's error says to the mirror.
fn refused(error: &std::io::Error) -> Refused {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::ENOSPC) => Refused::NoMemory,
        Some(libc::ESRCH) => Refused::Gone,
        Some(libc::EFAULT) => Refused::ContentsMissing,
        Some(errno) => Refused::Failed(errno),
        None => Refused::Busy,
    }
}
