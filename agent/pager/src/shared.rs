//! What a pager's threads share.
//!
//! # Threads
//! *main* hears the VM process; *faults* reads the kernel's faults and resolves what can be
//! resolved at once; *handlers* and *loaders* do the rest ([`crate::queue`]); *asks* carry out what
//! the VM process asks for; the *ticker* tells the state and looks after leases; the *sweeper*
//! drops mappings that the mirror does not know. All end when the connection does.
//!
//! # Locking
//! From the outside to the inside; nobody takes one to the left of what it has:
//!
//! `snapshots` → `layout` → the MMU's locks and its owner's table of views → a memory's stripe →
//! `drops`, `queue`, `problems`, windows.
//!
//! Which source there is may be looked up with any of them; it is read with none. The VM process is
//! asked to drop mappings with `layout` held, for reading by what unmaps and for writing by what
//! moves: so it must answer without asking for anything first, and *main*, which hears the answers,
//! takes neither `layout` nor `snapshots`.

use std::sync::{
    Arc, Mutex, RwLock,
    atomic::{AtomicBool, Ordering},
};

use slat_paging::wire::{FromPager, Setup, Socket};

use crate::{
    bell::Bell,
    drops::Drops,
    error::PagerError,
    layout::Layout,
    mirror::{Frames, Mirror},
    options::Tuning,
    problems::Problems,
    queue::Queue,
    snapshots::Snapshots,
    source::Source,
    stats::Stats,
    sync::{lock, read, write},
};

/// See the module.
pub(crate) struct Shared {
    pub(crate) tuning: Tuning,
    pub(crate) setup: Setup,
    pub(crate) socket: Arc<Socket>,
    pub(crate) drops: Arc<Drops>,
    pub(crate) stats: Stats,
    pub(crate) layout: RwLock<Layout>,
    pub(crate) snapshots: Mutex<Snapshots>,
    /// `None`: the guest is not watched.
    pub(crate) mirror: Option<Mirror>,
    pub(crate) frames: Frames,
    pub(crate) queue: Queue,
    pub(crate) problems: Problems,
    source: RwLock<Option<Arc<dyn Source>>>,
    had_source: AtomicBool,
    told_loaded: AtomicBool,
    /// Wakes the ticker.
    pub(crate) bell: Bell,
    /// Wakes the reader of faults at the end.
    pub(crate) stop: Bell,
    /// There is no mapping any more that the mirror does not know.
    pub(crate) swept: AtomicBool,
    /// Faults outside of all memories.
    pub(crate) strays: Mutex<Vec<u64>>,
    /// What ended it, if it was not heard by who hears.
    failure: Mutex<Option<PagerError>>,
    over: AtomicBool,
}

/// What [`Shared::new`] needs.
pub(crate) struct Parts {
    pub(crate) tuning: Tuning,
    pub(crate) setup: Setup,
    pub(crate) socket: Arc<Socket>,
    pub(crate) drops: Arc<Drops>,
    pub(crate) mirror: Option<Mirror>,
    pub(crate) bells: [Bell; 2],
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        let [bell, stop] = parts.bells;
        let mapped = parts.setup.mapped && parts.mirror.is_some();
        Self {
            stats: Stats::new(&parts.setup.vcpus),
            problems: Problems::new(parts.tuning.loaders, parts.tuning.stalled_after),
            tuning: parts.tuning,
            setup: parts.setup,
            socket: parts.socket,
            drops: parts.drops,
            layout: RwLock::default(),
            snapshots: Mutex::default(),
            mirror: parts.mirror,
            frames: Frames::new(),
            queue: Queue::default(),
            source: RwLock::new(None),
            had_source: AtomicBool::new(false),
            told_loaded: AtomicBool::new(false),
            bell,
            stop,
            swept: AtomicBool::new(!mapped),
            strays: Mutex::default(),
            failure: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    pub(crate) fn set_source(&self, source: Arc<dyn Source>) {
        *write(&self.source) = Some(source);
        self.had_source.store(true, Ordering::Release);
    }

    /// Where pages come from, until all have come.
    pub(crate) fn source(&self) -> Option<Arc<dyn Source>> {
        read(&self.source).clone()
    }

    /// An error when a memory begins in a source that was never handed over: its faults would wait
    /// for ever.
    pub(crate) fn check_sources(&self) -> Result<(), PagerError> {
        let layout = read(&self.layout);
        let lacking = layout.places().find(|place| place.memory.origin.is_some());
        match lacking {
            Some(place) if !self.had_source.load(Ordering::Acquire) => {
                let memory = place.memory.id;
                let what = format!("memory {memory} has a source, and there is none");
                Err(PagerError::Protocol(what))
            }
            _ => Ok(()),
        }
    }

    /// Whether every page of every memory that has a source is there.
    pub(crate) fn is_loaded(&self) -> bool {
        let layout = read(&self.layout);
        layout.places().all(|place| place.memory.is_loaded())
    }

    /// Says once that the source is not needed any more, when that is so, and lets go of it.
    pub(crate) fn tell_if_loaded(&self) {
        if !self.had_source.load(Ordering::Acquire)
            || self.told_loaded.load(Ordering::Acquire)
            || !self.is_loaded()
            || self.told_loaded.swap(true, Ordering::AcqRel)
        {
            return;
        }
        *write(&self.source) = None;
        // A connection that ends is noticed by who reads it.
        let _ = self.socket.send(&FromPager::Loaded, &[]);
    }

    /// Ends the pager for a reason.
    pub(crate) fn fail(&self, error: PagerError) {
        *lock(&self.failure) = Some(error);
        self.socket.close();
    }

    /// Why the connection was closed, if it was closed here.
    pub(crate) fn take_failure(&self) -> Result<(), PagerError> {
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Ends all threads, each at the next thing it does.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
        if let Some(mirror) = &self.mirror {
            mirror.owner.end();
        }
        self.drops.end();
        self.queue.end();
        self.stop.ring();
        self.bell.ring();
    }

    /// The snapshot is not needed any more. Whether there was one.
    pub(crate) fn end_snapshot(&self, snapshot: u64) -> bool {
        let mut snapshots = lock(&self.snapshots);
        let ended = snapshots.remove(snapshot);
        let mut layout = write(&self.layout);
        for place in layout.places_mut() {
            place.guards.retain(|guard| guard.snapshot != snapshot);
        }
        // One that was armed and does not begin.
        layout.disarm(snapshot);
        ended
    }
}
