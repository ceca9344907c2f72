//! A pager for tests, one thread: it resolves each fault as if it were a write, keeps what a
//! snapshot needs, brings pages from layers. What it is asked for beside that it does by the
//! simplest means.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slat_paging::{
    PAGE, Role,
    bits::{Marks, SharedBits},
    uffd::{Fault, FaultKind, Uffd},
    wire::{
        Answer, Ask, FromPager, Layer, LayerMemory, Load, Mapped, Memory, PagerState, Problem,
        ProblemKind, Setup, Socket, ToPager, VERSION, WireError,
    },
};

const SIZE: u64 = PAGE as u64;

/// What it has done, for the test.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) missing: AtomicU64,
    pub(super) minor: AtomicU64,
    pub(super) protected: AtomicU64,
    pub(super) kept: AtomicU64,
    pub(super) brought: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) mapped_before: AtomicBool,
    pub(super) watched: AtomicBool,
    /// It brings nothing.
    pub(super) stalls: AtomicBool,
    /// It answers no Begin.
    pub(super) mute: AtomicBool,
    /// It answers no Arm for as long as this is set, and serves faults.
    pub(super) holds_arms: AtomicBool,
    /// Times that it was told to arm.
    pub(super) arms: AtomicU64,
    /// Times that it was told that a snapshot ended.
    pub(super) ends: AtomicU64,
}

/// A running pager. Dropped, it is gone as if it was killed.
pub(super) struct FakePager {
    socket: Arc<Socket>,
    thread: Option<JoinHandle<Result<(), WireError>>>,
    pub(super) seen: Arc<Seen>,
}

impl FakePager {
    pub(super) fn connect(path: &Path) -> Self {
        Self::connect_as(path, Arc::default())
    }

    pub(super) fn connect_as(path: &Path, seen: Arc<Seen>) -> Self {
        let socket = Arc::new(Socket::connect(path).unwrap());
        let hello = FromPager::Hello {
            role: Role::Pager,
            version: VERSION,
            pid: 4711,
        };
        socket.send(&hello, &[]).unwrap();
        let thread = {
            let (socket, seen) = (Arc::clone(&socket), Arc::clone(&seen));
            std::thread::spawn(move || Worker::run(&socket, &seen))
        };
        Self {
            socket,
            thread: Some(thread),
            seen,
        }
    }

    /// Waits for its own end.
    pub(super) fn ended(mut self) -> Result<(), WireError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for FakePager {
    fn drop(&mut self) {
        self.socket.close();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Mem {
    said: Memory,
    file: File,
    loaded: Option<SharedBits>,
    mapped: BTreeSet<u64>,
}

struct Snap {
    active: bool,
    lease: OwnedFd,
    memories: BTreeMap<u32, (File, Marks)>,
    over: bool,
}

type SourceMemory = (LayerMemory, Vec<File>);

/// Layers without their leases.
pub(super) struct Source {
    pub(super) layers: Vec<(Layer, Vec<SourceMemory>)>,
}

impl Source {
    /// A page, from the layer that has it.
    pub(super) fn page(&self, origin: Option<u32>, page: u64) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        let mut origin = origin;
        for (_, memories) in &self.layers {
            let Some(number) = origin else { break };
            let (memory, fds) = memories
                .iter()
                .find(|(memory, _)| memory.number == number)
                .expect("the layer has it");
            let marks = Marks::open(fds[2].try_clone().unwrap().into(), memory.pages).unwrap();
            let kept = |bytes: &mut [u8; PAGE]| {
                fds[1].read_exact_at(bytes, page * SIZE).unwrap();
            };
            if marks.is_kept(page) {
                kept(&mut bytes);
                return bytes;
            }
            let unloaded = memory.has_loaded && {
                let fd = fds[3].try_clone().unwrap().into();
                !SharedBits::open(fd, memory.pages).unwrap().get(page)
            };
            if !unloaded {
                let at = memory.file_start + page * SIZE;
                fds[0].read_exact_at(&mut bytes, at).unwrap();
                if marks.is_kept(page) {
                    kept(&mut bytes);
                }
                return bytes;
            }
            origin = memory.origin;
        }
        bytes
    }
}

struct Worker<'a> {
    socket: &'a Socket,
    seen: &'a Seen,
    setup: Option<Setup>,
    uffd: Option<Uffd>,
    memories: BTreeMap<u32, Mem>,
    snapshots: BTreeMap<u64, Snap>,
    source: Source,
    /// Pages that may be written since the last arming.
    hot: Option<BTreeSet<(u32, u64)>>,
    later: VecDeque<(ToPager, Vec<OwnedFd>)>,
    requests: u64,
    ready: bool,
    told_loaded: bool,
    /// Arms that it has not answered.
    held: Vec<u64>,
    /// When it told its state by itself, and which.
    spoke: Option<Instant>,
    state: PagerState,
}

impl<'a> Worker<'a> {
    fn run(socket: &'a Socket, seen: &'a Seen) -> Result<(), WireError> {
        let mut worker = Self {
            socket,
            seen,
            setup: None,
            uffd: None,
            memories: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            source: Source { layers: Vec::new() },
            hot: None,
            later: VecDeque::new(),
            requests: 0,
            ready: false,
            told_loaded: false,
            held: Vec::new(),
            spoke: None,
            state: PagerState::default(),
        };
        while worker.step()? {}
        Ok(())
    }

    fn step(&mut self) -> Result<bool, WireError> {
        while let Some((message, fds)) = self.later.pop_front() {
            if !self.hear(message, fds)? {
                return Ok(false);
            }
        }
        let mut polled = vec![PollFd::new(self.socket, PollFlags::IN)];
        if let Some(uffd) = self.uffd.as_ref().filter(|_| self.ready) {
            polled.push(PollFd::new(uffd, PollFlags::IN));
        }
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        poll(&mut polled, Some(&patience)).map_err(std::io::Error::from)?;
        let said = !polled[0].revents().is_empty();
        let faulted = polled.get(1).is_some_and(|fd| !fd.revents().is_empty());
        drop(polled);
        if faulted {
            let mut faults = Vec::new();
            drop(self.uffd.as_ref().unwrap().read(&mut faults));
            for fault in faults {
                self.resolve(&fault);
            }
        }
        if said {
            let packet = self.socket.receive::<ToPager>()?;
            if !self.hear(packet.message, packet.fds)? {
                return Ok(false);
            }
        }
        if !self.seen.holds_arms.load(Ordering::Relaxed) {
            for request in std::mem::take(&mut self.held) {
                let result = self.arm();
                self.socket
                    .send(&FromPager::Reply { request, result }, &[])?;
            }
        }
        let often = Duration::from_millis(500);
        if self.ready && self.spoke.is_none_or(|at| at.elapsed() >= often) {
            // One that is silent is taken for frozen.
            self.spoke = Some(Instant::now());
            let state = Box::new(self.state.clone());
            self.socket.send(&FromPager::State(state), &[])?;
        }
        self.look_at_leases()?;
        self.load_some()?;
        Ok(true)
    }

    /// In the background.
    fn load_some(&mut self) -> Result<(), WireError> {
        let asked = self.setup.as_ref().is_some_and(|setup| setup.load_all);
        let stalls = self.seen.stalls.load(Ordering::Relaxed);
        if !self.ready || !asked || stalls || self.told_loaded {
            return Ok(());
        }
        let mut left = 0;
        for number in self.memories.keys().copied().collect::<Vec<_>>() {
            for _ in 0..8 {
                let memory = &self.memories[&number];
                let bits = memory.loaded.as_ref();
                let next = bits
                    .map(|bits| bits.next_clear(0))
                    .filter(|at| *at < memory.said.pages);
                let Some(page) = next else { break };
                self.bring(number, page);
                left += 1;
            }
        }
        if left == 0 {
            self.load_all()?;
        }
        Ok(())
    }

    fn look_at_leases(&mut self) -> Result<(), WireError> {
        for (number, snapshot) in &mut self.snapshots {
            let mut polled = [PollFd::new(&snapshot.lease, PollFlags::IN)];
            let none = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            poll(&mut polled, Some(&none)).map_err(std::io::Error::from)?;
            if polled[0].revents().contains(PollFlags::HUP) {
                snapshot.over = true;
                let ended = FromPager::SnapshotEnded { snapshot: *number };
                self.socket.send(&ended, &[])?;
            }
        }
        self.snapshots.retain(|_, snapshot| !snapshot.over);
        Ok(())
    }

    /// Where an address is.
    fn find(&self, address: u64) -> Option<(u32, u64)> {
        self.memories.iter().find_map(|(number, memory)| {
            let said = &memory.said;
            let offset = address.checked_sub(said.view)?;
            (offset < said.pages * SIZE).then_some((*number, offset / SIZE))
        })
    }

    fn resolve(&mut self, fault: &Fault) {
        let Some((number, page)) = self.find(fault.address) else {
            return;
        };
        let count = match fault.kind {
            FaultKind::Missing => &self.seen.missing,
            FaultKind::Minor => &self.seen.minor,
            FaultKind::WriteProtect => &self.seen.protected,
        };
        count.fetch_add(1, Ordering::Relaxed);
        self.bring(number, page);
        self.keep(number, page);
        let uffd = self.uffd.as_ref().unwrap();
        if fault.kind == FaultKind::WriteProtect {
            drop(uffd.unprotect(fault.address, SIZE, true));
        } else if uffd.map(fault.address, SIZE, false, true).bytes == 0 {
            uffd.zero(fault.address, SIZE);
            drop(uffd.unprotect(fault.address, SIZE, true));
        }
        drop(uffd.wake(fault.address, SIZE));
        self.memories.get_mut(&number).unwrap().mapped.insert(page);
        if let Some(hot) = &mut self.hot {
            hot.insert((number, page));
        }
    }

    /// Maps what is not mapped of the first pages, a thousand at most.
    fn prefault(&mut self, gfn: u64, pages: u64) -> Answer {
        let mut done = 0;
        for (number, page) in self.pages(gfn, pages.min(1000)) {
            let (said, mapped) = {
                let memory = &self.memories[&number];
                (memory.said.clone(), memory.mapped.contains(&page))
            };
            if said.base_gfn + page != gfn + done {
                break;
            }
            done += 1;
            if mapped {
                continue;
            }
            self.bring(number, page);
            let uffd = self.uffd.as_ref().unwrap();
            let address = said.view + page * SIZE;
            if uffd.map(address, SIZE, false, true).bytes == 0 {
                uffd.zero(address, SIZE);
            }
            self.memories.get_mut(&number).unwrap().mapped.insert(page);
        }
        Answer::Prefaulted { pages: done }
    }

    /// Contents from the source.
    fn bring(&mut self, number: u32, page: u64) {
        let memory = &self.memories[&number];
        let Some(loaded) = memory.loaded.as_ref().filter(|bits| !bits.get(page)) else {
            return;
        };
        let bytes = self.source.page(memory.said.origin, page);
        let at = memory.said.file_start + page * SIZE;
        memory.file.write_all_at(&bytes, at).unwrap();
        loaded.set(page);
        self.seen.brought.fetch_add(1, Ordering::Relaxed);
    }

    fn keep(&self, number: u32, page: u64) {
        for snapshot in self.snapshots.values().filter(|snapshot| snapshot.active) {
            let Some((kept, marks)) = snapshot.memories.get(&number) else {
                continue;
            };
            if marks.is_kept(page) {
                continue;
            }
            let memory = &self.memories[&number];
            let mut bytes = [0; PAGE];
            let at = memory.said.file_start + page * SIZE;
            memory.file.read_exact_at(&mut bytes, at).unwrap();
            kept.write_all_at(&bytes, page * SIZE).unwrap();
            marks.set_kept(page);
            self.seen.kept.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn hear(&mut self, message: ToPager, mut fds: Vec<OwnedFd>) -> Result<bool, WireError> {
        match message {
            ToPager::Setup(setup) => {
                self.seen
                    .mapped_before
                    .store(setup.mapped, Ordering::Relaxed);
                self.seen.watched.store(setup.watched, Ordering::Relaxed);
                assert_eq!(fds.len(), usize::from(setup.watched));
                self.uffd = fds.pop().map(Uffd::from_fd);
                self.setup = Some(setup);
            }
            ToPager::Memory(said) => {
                let bits = said.has_loaded.then(|| fds.remove(1));
                let memory = Mem {
                    file: fds.remove(0).into(),
                    loaded: bits.map(|fd| SharedBits::open(fd, said.pages).unwrap()),
                    mapped: BTreeSet::new(),
                    said: said.clone(),
                };
                assert!(self.memories.insert(said.memory, memory).is_none());
            }
            ToPager::Layer(layer) => self.source.layers.push((layer, Vec::new())),
            ToPager::LayerMemory(memory) => {
                let fds = fds.into_iter().map(File::from).collect();
                self.source.layers.last_mut().unwrap().1.push((memory, fds));
            }
            ToPager::Snapshot { snapshot, active } => {
                let snap = Snap {
                    active,
                    lease: fds.remove(0),
                    memories: BTreeMap::new(),
                    over: false,
                };
                self.snapshots.insert(snapshot, snap);
            }
            ToPager::SnapshotMemory { snapshot, memory } => {
                let pages = self.memories[&memory].said.pages;
                let marks = Marks::open(fds.remove(1), pages).unwrap();
                let snapshot = self.snapshots.get_mut(&snapshot).unwrap();
                let kept = fds.remove(0).into();
                snapshot.memories.insert(memory, (kept, marks));
            }
            ToPager::Ready => {
                self.ready = true;
                self.socket.send(&FromPager::Attached, &[])?;
                if !self.setup.as_ref().unwrap().watched {
                    self.load_all()?;
                }
            }
            ToPager::Ask {
                ask: Ask::Begin { .. },
                ..
            } if self.seen.mute.load(Ordering::Relaxed) => {}
            ToPager::Ask {
                request,
                ask: Ask::Arm { .. },
            } => {
                self.seen.arms.fetch_add(1, Ordering::Relaxed);
                self.held.push(request);
            }
            ToPager::Ask { request, ask } => {
                let stop = ask == Ask::Stop;
                let result = self.answer(ask)?;
                self.socket
                    .send(&FromPager::Reply { request, result }, &[])?;
                return Ok(!stop);
            }
            ToPager::Dropped { .. } => panic!("nobody asked"),
        }
        Ok(true)
    }

    fn load_all(&mut self) -> Result<(), WireError> {
        let all: Vec<(u32, u64)> = self
            .memories
            .iter()
            .flat_map(|(number, memory)| (0..memory.said.pages).map(|page| (*number, page)))
            .collect();
        for (number, page) in all {
            self.bring(number, page);
        }
        let bits = self
            .memories
            .values()
            .filter_map(|memory| memory.loaded.as_ref());
        let load = bits.fold(Load::default(), |load, bits| Load {
            loaded: load.loaded + bits.count(),
            all: load.all + bits.len(),
        });
        let state = PagerState {
            load,
            ..PagerState::default()
        };
        self.state = state.clone();
        self.socket.send(&FromPager::State(Box::new(state)), &[])?;
        if !self.told_loaded {
            self.told_loaded = true;
            self.socket.send(&FromPager::Loaded, &[])?;
        }
        Ok(())
    }

    /// Pages of a range, by memory.
    fn pages(&self, gfn: u64, pages: u64) -> Vec<(u32, u64)> {
        let mut found = Vec::new();
        for (number, memory) in &self.memories {
            let said = &memory.said;
            let from = gfn.max(said.base_gfn);
            let to = (gfn + pages).min(said.base_gfn + said.pages);
            found.extend((from..to).map(|gfn| (*number, gfn - said.base_gfn)));
        }
        found
    }

    /// Has the VM process drop mappings.
    fn unmap(&mut self, memory: u32, page: u64, pages: u64) -> Result<(), WireError> {
        self.requests += 1;
        let request = self.requests;
        let drop = FromPager::DropMappings {
            request,
            memory,
            page,
            pages,
        };
        self.socket.send(&drop, &[])?;
        loop {
            let packet = self.socket.receive::<ToPager>()?;
            match packet.message {
                ToPager::Dropped { request: of, errno } if of == request => {
                    assert_eq!(errno, 0);
                    break;
                }
                other => self.later.push_back((other, packet.fds)),
            }
        }
        let memory = self.memories.get_mut(&memory).unwrap();
        memory.mapped.retain(|at| *at < page || *at >= page + pages);
        Ok(())
    }

    fn protect(&self, number: u32, page: u64, pages: u64) {
        let said = &self.memories[&number].said;
        let start = said.view + page * SIZE;
        self.uffd
            .as_ref()
            .unwrap()
            .protect(start, pages * SIZE)
            .unwrap();
    }

    fn arm(&mut self) -> Result<Answer, Problem> {
        for (number, memory) in &self.memories {
            self.protect(*number, 0, memory.said.pages);
        }
        self.hot = Some(BTreeSet::new());
        Ok(Answer::Armed { left: 0, rounds: 1 })
    }

    fn answer(&mut self, ask: Ask) -> Result<Result<Answer, Problem>, WireError> {
        match ask {
            Ask::Remove { memory } => {
                let pages = self.memories[&memory].said.pages;
                self.unmap(memory, 0, pages)?;
                self.memories.remove(&memory);
            }
            Ask::Move { memory, base_gfn } => {
                let pages = self.memories[&memory].said.pages;
                self.unmap(memory, 0, pages)?;
                self.memories.get_mut(&memory).unwrap().said.base_gfn = base_gfn;
            }
            Ask::Begin { snapshot } => {
                for (number, page) in self.hot.take().unwrap_or_default() {
                    self.protect(number, page, 1);
                }
                let snapshot = self.snapshots.get_mut(&snapshot);
                let Some(snapshot) = snapshot else {
                    return Ok(Err(Problem {
                        kind: ProblemKind::Refused,
                        message: "no such snapshot".to_owned(),
                    }));
                };
                snapshot.active = true;
            }
            Ask::Unmap { gfn, pages } | Ask::Discard { gfn, pages } => {
                let punch = matches!(ask, Ask::Discard { .. });
                for (number, page) in self.pages(gfn, pages) {
                    if punch {
                        self.bring(number, page);
                        self.keep(number, page);
                        let memory = &self.memories[&number];
                        let how = rustix::fs::FallocateFlags::PUNCH_HOLE
                            | rustix::fs::FallocateFlags::KEEP_SIZE;
                        let at = memory.said.file_start + page * SIZE;
                        rustix::fs::fallocate(memory.file.as_fd(), how, at, SIZE).unwrap();
                        self.seen.discarded.fetch_add(1, Ordering::Relaxed);
                    }
                    self.unmap(number, page, 1)?;
                }
            }
            Ask::Load { gfn, pages, write } => {
                for (number, page) in self.pages(gfn, pages) {
                    self.bring(number, page);
                    if write {
                        self.keep(number, page);
                    }
                }
            }
            Ask::LoadAll => {
                if self.seen.stalls.load(Ordering::Relaxed) {
                    return Ok(Err(Problem {
                        kind: ProblemKind::SourceGone,
                        message: "told to fail".to_owned(),
                    }));
                }
                self.load_all()?;
            }
            Ask::Age { gfn, pages } => {
                let mut young = Vec::new();
                for (number, page) in self.pages(gfn, pages) {
                    let memory = &self.memories[&number];
                    if memory.mapped.contains(&page) {
                        young.push((memory.said.base_gfn + page, 1));
                        self.unmap(number, page, 1)?;
                    }
                }
                return Ok(Ok(Answer::Frames(young)));
            }
            Ask::Mapped { gfn, pages } => {
                let all = self.pages(gfn, pages).into_iter();
                let mapped = all.filter(|(number, page)| {
                    let memory = &self.memories[number];
                    memory.mapped.contains(page)
                });
                let runs = mapped.map(|(number, page)| Mapped {
                    gfn: self.memories[&number].said.base_gfn + page,
                    pages: 1,
                    writable: true,
                });
                let runs: Vec<Mapped> = runs.take(500).collect();
                let next = match runs.len() {
                    500 => runs[499].gfn + 1,
                    _ => gfn + pages,
                };
                return Ok(Ok(Answer::Mapped { runs, next }));
            }
            Ask::Prefault { gfn, pages } => return Ok(Ok(self.prefault(gfn, pages))),
            Ask::EndSnapshot { snapshot } => {
                self.seen.ends.fetch_add(1, Ordering::Relaxed);
                self.snapshots.remove(&snapshot);
            }
            Ask::Arm { .. } | Ask::Protect { .. } | Ask::Retry | Ask::State | Ask::Stop => {}
        }
        Ok(Ok(Answer::Done))
    }
}
