//! What is shared about a pager under one lock: the connection, what a pager is told when it
//! comes, and what it has yet to answer.

use std::{collections::BTreeMap, io, os::fd::AsFd as _, sync::Arc};

use slat_paging::wire::{Ask, Memory, PagerState, Setup, Socket, ToPager, VERSION, WireError};

use super::{
    asks::Asks,
    layers::{KeptLayer, borrowed},
    silence::Silence,
    snapshots::Snapshots,
    watcher::Watcher,
};
use crate::{
    backend::PagedGuest,
    memory::{MemoryFile, SlotMemory},
};

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// It has said who it is; there is nothing for it to do yet.
    Waiting,
    /// It was told everything.
    SetUp,
    /// It serves.
    Attached,
}

/// A connected pager.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) number: u64,
    pub(super) socket: Arc<Socket>,
    pub(super) pid: u32,
    pub(super) stage: Stage,
    /// It was told to end, and is nobody's pager any more.
    pub(super) stopping: bool,
}

/// What there is to do for a pager.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    /// What it has to know of the guest.
    pub(crate) guest: PagedGuest,
    /// Views are watched. Otherwise the source's pages are brought, and that is all.
    pub(crate) watched: bool,
    /// The views may have mappings that the next pager does not know.
    pub(crate) mapped: bool,
    /// Bring all pages of the source.
    pub(crate) load_all: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Inner {
    /// The process is to end.
    pub(super) over: bool,
    /// So many want the VM to end, and whoever asks the pager to give up.
    pub(super) ending: u32,
    /// Grows with everything that the machine looks at.
    pub(super) version: u64,
    pub(super) work: Option<Work>,
    last_memory: u32,
    pub(super) memories: BTreeMap<u32, Arc<SlotMemory>>,
    pub(super) source: Vec<KeptLayer>,
    /// A source was handed over.
    pub(super) has_source: bool,
    pub(super) snapshots: Snapshots,
    /// Snapshots that ended and that the machine has not heard of.
    pub(super) ended: Vec<u64>,
    /// The pager said that all of the source is there.
    pub(super) loaded: bool,
    pub(super) link: Option<Link>,
    pub(super) links: u64,
    pub(super) asks: Asks,
    /// Pagers that were set up and ended with work left.
    pub(super) restarts: u64,
    pub(super) told: PagerState,
    pub(super) silence: Silence,
}

impl Inner {
    pub(super) fn change(&mut self) {
        self.version += 1;
    }

    /// The link, when it is at least so far.
    pub(super) fn linked(&self, stage: Stage) -> Option<&Link> {
        let link = self.link.as_ref();
        link.filter(|link| link.stage >= stage && !link.stopping)
    }

    /// The number of a slot's memory.
    pub(super) fn memory_of(&self, slot: u32) -> Option<u32> {
        let mut all = self.memories.iter();
        let found = all.find(|(_, memory)| memory.spec().slot == slot);
        found.map(|(number, _)| *number)
    }

    /// A new memory, without a word to anybody.
    pub(super) fn put_memory(&mut self, memory: &Arc<SlotMemory>) -> u32 {
        self.last_memory += 1;
        self.memories.insert(self.last_memory, Arc::clone(memory));
        self.last_memory
    }

    /// Sends what has to be sent. A link that does not take it is closed.
    pub(super) fn flush(&mut self) {
        let Some(link) = self
            .link
            .as_ref()
            .filter(|link| link.stage == Stage::Attached && !link.stopping)
        else {
            return;
        };
        while let Some((request, ask)) = self.asks.next_unsent() {
            if let Err(error) = link.socket.send(&ToPager::Ask { request, ask }, &[]) {
                tracing::warn!(%error, pid = link.pid, "a pager takes no question");
                link.socket.close();
                return;
            }
        }
    }

    /// Tells a pager that was set up to end: it is nobody's any more. One that does not take it is
    /// closed.
    pub(super) fn stop(&mut self) {
        let link = self.link.as_mut();
        let Some(link) = link.filter(|link| link.stage >= Stage::SetUp && !link.stopping) else {
            return;
        };
        link.stopping = true;
        // All that it was to be told was sent under the lock, so this comes after it.
        let request = self.asks.number();
        let stop = ToPager::Ask {
            request,
            ask: Ask::Stop,
        };
        if let Err(error) = link.socket.send(&stop, &[]) {
            tracing::warn!(%error, pid = link.pid, "a pager cannot be told to stop");
            link.socket.close();
        }
    }

    /// Tells a pager everything. The caller has woken who waits.
    pub(super) fn set_up(&mut self, watcher: &Watcher) -> Result<(), WireError> {
        let (Some(work), Some(link)) = (&mut self.work, &mut self.link) else {
            return Err(WireError::Closed);
        };
        let fd = watcher.fd().filter(|_| work.watched);
        let setup = Setup {
            version: VERSION,
            format: work.guest.format.clone(),
            vcpus: work.guest.vcpus.clone(),
            watched: fd.is_some(),
            can_protect: fd.is_some() && watcher.offer().is_ok_and(|offer| offer.protect),
            load_all: work.load_all,
            mapped: work.mapped,
        };
        // Whoever comes next finds what this one maps.
        work.mapped = work.watched;
        let (socket, watched) = (Arc::clone(&link.socket), work.watched);
        link.stage = Stage::SetUp;
        let fds: Vec<_> = fd.into_iter().collect();
        socket.send(&ToPager::Setup(setup), &fds)?;
        for (number, memory) in &self.memories {
            tell_memory(&socket, *number, memory, watched)?;
        }
        for layer in &self.source {
            let message = ToPager::Layer(layer.layer.clone());
            socket.send(&message, &borrowed(&layer.fds))?;
            for memory in &layer.memories {
                let message = ToPager::LayerMemory(memory.memory.clone());
                socket.send(&message, &borrowed(&memory.fds))?;
            }
        }
        let paged = self.snapshots.all.iter().filter(|(_, one)| !one.still);
        for (snapshot, _) in paged {
            self.tell_snapshot(&socket, *snapshot)?;
        }
        socket.send(&ToPager::Ready, &[])
    }

    /// Tells a pager of a snapshot and its memories.
    pub(super) fn tell_snapshot(&self, socket: &Socket, number: u64) -> Result<(), WireError> {
        let Some(snapshot) = self.snapshots.all.get(&number) else {
            return Ok(());
        };
        let message = ToPager::Snapshot {
            snapshot: number,
            active: snapshot.active,
        };
        socket.send(&message, &[snapshot.lease.as_fd()])?;
        for (memory, slot) in &self.memories {
            let file = slot.file();
            self.tell_kept(socket, *memory, &file, Some(number))?;
        }
        Ok(())
    }

    /// Tells a pager which snapshots a memory is part of, or of one of them.
    pub(super) fn tell_kept(
        &self,
        socket: &Socket,
        memory: u32,
        file: &MemoryFile,
        only: Option<u64>,
    ) -> Result<(), WireError> {
        let of = self.snapshots.of(file);
        for (snapshot, slot) in of.filter(|(number, _)| only.is_none_or(|only| only == *number)) {
            let message = ToPager::SnapshotMemory { snapshot, memory };
            socket.send(&message, &slot.fds())?;
        }
        Ok(())
    }

    /// Drops mappings of a memory's view, as its pager asks.
    pub(super) fn view_of(
        &self,
        memory: u32,
        page: u64,
        pages: u64,
    ) -> io::Result<Arc<SlotMemory>> {
        let found = self.memories.get(&memory).filter(|slot| {
            let end = page.checked_add(pages);
            pages > 0 && end.is_some_and(|end| end <= slot.spec().pages)
        });
        found
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }
}

/// Tells a pager of a memory.
pub(super) fn tell_memory(
    socket: &Socket,
    number: u32,
    memory: &SlotMemory,
    watched: bool,
) -> Result<(), WireError> {
    let (spec, file) = (memory.spec(), memory.file());
    let origin = memory.origin();
    let origin = origin.and_then(|origin| Some((origin.number(), origin.loaded()?)));
    let message = Memory {
        memory: number,
        slot: spec.slot,
        base_gfn: spec.base_gfn,
        pages: spec.pages,
        view: if watched { memory.guest().address() } else { 0 },
        file_start: file.start(),
        read_only: spec.read_only,
        origin: origin.as_ref().map(|(number, _)| *number),
        has_loaded: origin.is_some(),
    };
    let mut fds = vec![file.as_fd()];
    fds.extend(origin.as_ref().map(|(_, loaded)| loaded.as_fd()));
    socket.send(&ToPager::Memory(message), &fds)
}
