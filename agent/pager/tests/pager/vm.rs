//! A VM process that is none: memory, views and a descriptor in the test's own address space, and a
//! thread that answers the pager.
//!
//! Whoever touches a view waits for the pager, as a vCPU would. All waits for words of the pager
//! are bounded; a touch is bounded by the test's own time limit.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};
use slat_pager::{Options, PagerError, run_with};
use slat_paging::{
    PAGE,
    bits::{Marks, SharedBits},
    uffd::{Offer, Uffd, Watch},
    wire::{
        Answer, Ask, FromPager, Layer, LayerMemory, Memory, PagerState, Problem, Setup, Socket,
        ToPager, VERSION,
    },
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A memory of the guest.
pub(crate) struct Mem {
    pub(crate) number: u32,
    pub(crate) file: OwnedFd,
    pub(crate) base_gfn: u64,
    pub(crate) pages: u64,
    pub(crate) view: View,
    pub(crate) loaded: Option<SharedBits>,
    pub(crate) origin: Option<u32>,
    pub(crate) read_only: bool,
}

/// A mapping of a memory file.
pub(crate) struct View {
    base: usize,
    len: usize,
}

impl View {
    pub(crate) fn new(file: &OwnedFd, pages: u64) -> Self {
        let len = pages as usize * PAGE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0) };
        Self {
            base: base.unwrap().expose_provenance(),
            len,
        }
    }

    pub(crate) fn address(&self) -> u64 {
        self.base as u64
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        let at = self.base + page as usize * PAGE;
        assert!(at + PAGE <= self.base + self.len);
        // SAFETY: inside a mapping that lives as long as the view, aligned, used by atomics alone.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(at) }
    }

    pub(crate) fn read(&self, page: u64) -> u64 {
        self.word(page).load(Ordering::SeqCst)
    }

    pub(crate) fn write(&self, page: u64, value: u64) {
        self.word(page).store(value, Ordering::SeqCst);
    }

    pub(crate) fn drop_mappings(&self, page: u64, pages: u64) -> i32 {
        let at = self.base + page as usize * PAGE;
        let at = std::ptr::with_exposed_provenance_mut(at);
        // SAFETY: inside the mapping; contents stay in the file.
        match unsafe { madvise(at, pages as usize * PAGE, Advice::LinuxDontNeed) } {
            Ok(()) => 0,
            Err(error) => error.raw_os_error(),
        }
    }

    /// By page, whether the kernel has it mapped, and whether it is write-protected.
    pub(crate) fn pagemap(&self) -> Vec<(bool, bool)> {
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut bytes = vec![0; self.len / PAGE * 8];
        let at = (self.base / PAGE * 8) as u64;
        std::os::unix::fs::FileExt::read_exact_at(&map, &mut bytes, at).unwrap();
        let (words, _) = bytes.as_chunks::<8>();
        let words = words.iter().map(|word| u64::from_ne_bytes(*word));
        words
            .map(|word| (word >> 63 & 1 == 1, word >> 57 & 1 == 1))
            .collect()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let base = std::ptr::with_exposed_provenance_mut(self.base);
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { munmap(base, self.len).unwrap() };
    }
}

/// What a VM begins with.
pub(crate) struct Config {
    /// Pages of each memory, and its number in the source.
    pub(crate) memories: Vec<(u64, Option<u32>)>,
    pub(crate) can_protect: bool,
    pub(crate) load_all: bool,
    pub(crate) watched: bool,
    pub(crate) options: Options,
}

impl Config {
    pub(crate) fn new(pages: u64) -> Self {
        Self {
            memories: vec![(pages, None)],
            can_protect: true,
            load_all: false,
            watched: true,
            options: Options::default(),
        }
    }
}

/// What is heard of a pager.
#[derive(Default)]
pub(crate) struct Heard {
    inner: Mutex<HeardInner>,
    changed: Condvar,
}

#[derive(Default)]
struct HeardInner {
    attached: bool,
    loaded: bool,
    closed: bool,
    ended: Vec<u64>,
    state: PagerState,
    replies: HashMap<u64, Result<Answer, Problem>>,
}

/// A layer as the pager of a child gets it.
pub(crate) struct LayerFds {
    pub(crate) layer: Layer,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) memories: Vec<(LayerMemory, Vec<OwnedFd>)>,
}

/// A snapshot as the VM process has it.
pub(crate) struct Taken {
    pub(crate) number: u64,
    lease_read: OwnedFd,
    /// Until somebody takes it.
    lease: Option<OwnedFd>,
    parts: Vec<(OwnedFd, Marks)>,
}

pub(crate) struct Vm {
    pub(crate) memories: Arc<Vec<Mem>>,
    pub(crate) offer: Offer,
    uffd: Uffd,
    can_protect: bool,
    load_all: bool,
    watched: bool,
    pub(crate) layers: Vec<LayerFds>,
    pub(crate) snapshots: Vec<Taken>,
    pager: Option<Pager>,
    last: AtomicU64,
}

struct Pager {
    socket: Arc<Socket>,
    heard: Arc<Heard>,
    listener: JoinHandle<()>,
    thread: JoinHandle<Result<(), PagerError>>,
}

pub(crate) fn file(name: &str, pages: u64) -> OwnedFd {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, pages * PAGE as u64).unwrap();
    fd
}

pub(crate) fn copy(fd: &impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}

impl Vm {
    /// `None`, and a word, where there is no userfaultfd.
    pub(crate) fn start(config: Config) -> Option<Self> {
        Self::start_with(config, Vec::new())
    }

    pub(crate) fn start_with(config: Config, layers: Vec<LayerFds>) -> Option<Self> {
        let (uffd, offer) = match Uffd::open() {
            Ok(opened) => opened,
            Err(error) => {
                println!("SKIPPED: {error}");
                return None;
            }
        };
        let can_protect = offer.protect && config.can_protect;
        let mut watch = Watch::MISSING | Watch::MINOR;
        watch.set(Watch::PROTECTED, can_protect);
        let mut gfn = 0x100;
        let memories = config
            .memories
            .iter()
            .zip(0..)
            .map(|(&(pages, origin), number)| {
                let file = file("test-memory", pages);
                let view = View::new(&file, pages);
                uffd.register(view.address(), view.len as u64, watch)
                    .unwrap();
                let base_gfn = gfn;
                gfn += pages + 3;
                Mem {
                    number,
                    file,
                    base_gfn,
                    pages,
                    view,
                    loaded: origin.map(|_| SharedBits::new("test-loaded", pages).unwrap()),
                    origin,
                    read_only: false,
                }
            });
        let mut vm = Self {
            memories: Arc::new(memories.collect()),
            offer,
            uffd,
            can_protect,
            load_all: config.load_all,
            watched: config.watched,
            layers,
            snapshots: Vec::new(),
            pager: None,
            last: AtomicU64::new(0),
        };
        vm.attach(config.options, false);
        Some(vm)
    }

    /// A pager for the memories there are.
    pub(crate) fn attach(&mut self, options: Options, mapped: bool) {
        let (near, far) = Socket::pair().unwrap();
        let thread = std::thread::spawn(move || run_with(far, &options));
        let hello = near.receive::<FromPager>().unwrap().message;
        assert!(matches!(
            hello,
            FromPager::Hello {
                version: VERSION,
                ..
            }
        ));
        let setup = Setup {
            version: VERSION,
            format: "npt4".to_owned(),
            vcpus: Vec::new(),
            watched: self.watched,
            can_protect: self.can_protect,
            load_all: self.load_all,
            mapped,
        };
        let fds = [self.uffd.as_fd()];
        let fds = if self.watched { &fds[..] } else { &[] };
        near.send(&ToPager::Setup(setup), fds).unwrap();
        for (mem, slot) in self.memories.iter().zip(0..) {
            let message = Memory {
                memory: mem.number,
                slot,
                base_gfn: mem.base_gfn,
                pages: mem.pages,
                view: mem.view.address(),
                file_start: 0,
                read_only: mem.read_only,
                origin: mem.origin,
                has_loaded: mem.loaded.is_some(),
            };
            let mut fds = vec![mem.file.as_fd()];
            fds.extend(mem.loaded.as_ref().map(AsFd::as_fd));
            near.send(&ToPager::Memory(message), &fds).unwrap();
        }
        for layer in &self.layers {
            let fds: Vec<BorrowedFd<'_>> = layer.fds.iter().map(AsFd::as_fd).collect();
            near.send(&ToPager::Layer(layer.layer.clone()), &fds)
                .unwrap();
            for (memory, fds) in &layer.memories {
                let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
                near.send(&ToPager::LayerMemory(memory.clone()), &fds)
                    .unwrap();
            }
        }
        for taken in &self.snapshots {
            send_snapshot(&near, taken, true);
        }
        near.send(&ToPager::Ready, &[]).unwrap();
        let socket = Arc::new(near);
        let heard = Arc::new(Heard::default());
        let listener = {
            let (socket, heard) = (Arc::clone(&socket), Arc::clone(&heard));
            let memories = Arc::clone(&self.memories);
            std::thread::spawn(move || listen(&socket, &heard, &memories))
        };
        self.pager = Some(Pager {
            socket,
            heard,
            listener,
            thread,
        });
        self.heard(|heard| heard.attached.then_some(()));
    }

    fn pager(&self) -> &Pager {
        self.pager.as_ref().unwrap()
    }

    /// Waits until something was heard.
    fn heard<T>(&self, mut what: impl FnMut(&mut HeardInner) -> Option<T>) -> T {
        let heard = &self.pager().heard;
        let end = Instant::now() + PATIENCE;
        let mut inner = heard.inner.lock().unwrap();
        loop {
            if let Some(found) = what(&mut inner) {
                return found;
            }
            assert!(!inner.closed, "the pager is gone");
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "not heard: {:?}", inner.state);
            inner = heard.changed.wait_timeout(inner, left).unwrap().0;
        }
    }

    pub(crate) fn send(&self, ask: Ask) -> u64 {
        let request = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let ask = ToPager::Ask { request, ask };
        self.pager().socket.send(&ask, &[]).unwrap();
        request
    }

    pub(crate) fn reply(&self, request: u64) -> Result<Answer, Problem> {
        self.heard(|heard| heard.replies.remove(&request))
    }

    pub(crate) fn ask(&self, ask: Ask) -> Result<Answer, Problem> {
        let request = self.send(ask);
        self.reply(request)
    }

    pub(crate) fn done(&self, ask: Ask) {
        assert_eq!(self.ask(ask), Ok(Answer::Done));
    }

    pub(crate) fn state(&self) -> PagerState {
        match self.ask(Ask::State) {
            Ok(Answer::State(state)) => *state,
            other => panic!("{other:?}"),
        }
    }

    /// The state when no fault is under way: who waited goes on before its fault is settled.
    pub(crate) fn settled(&self) -> PagerState {
        let end = Instant::now() + PATIENCE;
        loop {
            let state = self.state();
            let faults = &state.faults;
            let all = faults.missing + faults.minor + faults.write_protect;
            if state.latency.buckets.iter().sum::<u64>() == all {
                return state;
            }
            assert!(Instant::now() < end, "not settled: {state:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for a state that was pushed.
    pub(crate) fn pushed<T>(&self, mut what: impl FnMut(&PagerState) -> Option<T>) -> T {
        self.heard(|heard| what(&heard.state))
    }

    pub(crate) fn loaded(&self) {
        self.heard(|heard| heard.loaded.then_some(()));
    }

    pub(crate) fn snapshot_ended(&self, number: u64) {
        self.heard(|heard| heard.ended.contains(&number).then_some(()));
    }

    pub(crate) fn mem(&self) -> &Mem {
        &self.memories[0]
    }

    pub(crate) fn read(&self, page: u64) -> u64 {
        self.mem().view.read(page)
    }

    pub(crate) fn write(&self, page: u64, value: u64) {
        self.mem().view.write(page, value);
    }

    /// What is in the memory file.
    pub(crate) fn contents(&self, page: u64) -> u64 {
        word(&self.mem().file, page)
    }

    /// Announces and arms a snapshot; [`Vm::begin`] begins it.
    pub(crate) fn arm(&mut self, number: u64) -> Answer {
        let (lease_read, lease) = rustix::pipe::pipe().unwrap();
        let parts = self
            .memories
            .iter()
            .map(|mem| (file("test-kept", mem.pages), Marks::new(mem.pages).unwrap()));
        let taken = Taken {
            number,
            lease_read,
            lease: Some(lease),
            parts: parts.collect(),
        };
        send_snapshot(&self.pager().socket, &taken, false);
        self.snapshots.push(taken);
        self.ask(Ask::Arm { snapshot: number }).unwrap()
    }

    pub(crate) fn begin(&self, number: u64) {
        self.done(Ask::Begin { snapshot: number });
    }

    /// Takes a snapshot, and forgets it: its layer, and then this VM's own layers below.
    pub(crate) fn fork(&mut self, number: u64) -> Vec<LayerFds> {
        self.arm(number);
        self.begin(number);
        self.layers_of(number)
    }

    /// The layers of a snapshot. Its lease is theirs from now on.
    pub(crate) fn layers_of(&mut self, number: u64) -> Vec<LayerFds> {
        let mut snapshots = self.snapshots.iter_mut();
        let taken = snapshots.find(|taken| taken.number == number).unwrap();
        let lease = taken.lease.take().unwrap();
        let memories = self.memories.iter().zip(&taken.parts);
        let memories = memories.map(|(mem, (kept, marks))| {
            let message = LayerMemory {
                number: mem.number,
                pages: mem.pages,
                file_start: 0,
                origin: mem.origin,
                has_loaded: mem.loaded.is_some(),
            };
            let mut fds = vec![copy(&mem.file), copy(kept), copy(marks)];
            fds.extend(mem.loaded.as_ref().map(copy));
            (message, fds)
        });
        let memories: Vec<_> = memories.collect();
        let own = LayerFds {
            layer: Layer::Snapshot {
                memories: memories.len() as u32,
                name: format!("snapshot {number}"),
                shared: false,
            },
            fds: vec![lease],
            memories,
        };
        let below = self.layers.iter().map(|layer| LayerFds {
            layer: layer.layer.clone(),
            fds: layer.fds.iter().map(copy).collect(),
            memories: layer
                .memories
                .iter()
                .map(|(memory, fds)| (memory.clone(), fds.iter().map(copy).collect()))
                .collect(),
        });
        std::iter::once(own).chain(below).collect()
    }

    /// A snapshot that has ended is not announced to the next pager.
    pub(crate) fn forget(&mut self, number: u64) {
        self.snapshots.retain(|taken| taken.number != number);
    }

    /// The connection ends, and the pager with it.
    pub(crate) fn kill_pager(&mut self) {
        let pager = self.pager.take().unwrap();
        pager.socket.close();
        pager.listener.join().unwrap();
        pager.thread.join().unwrap().unwrap();
    }

    /// Says stop, and hears how it ended.
    pub(crate) fn stop(mut self) {
        self.done(Ask::Stop);
        let pager = self.pager.take().unwrap();
        pager.thread.join().unwrap().unwrap();
        pager.socket.close();
        pager.listener.join().unwrap();
    }

    /// Who waits for a fault tries again.
    pub(crate) fn wake(&self) {
        for mem in self.memories.iter() {
            self.uffd
                .wake(mem.view.address(), mem.view.len as u64)
                .unwrap();
        }
    }

    /// The mirror's listing is what the kernel has mapped.
    pub(crate) fn assert_mirrored(&self) {
        let gfns: Vec<u64> = self.memories.iter().map(|mem| mem.base_gfn).collect();
        self.assert_mirrored_at(&gfns);
    }

    /// The same, with memories that have moved.
    pub(crate) fn assert_mirrored_at(&self, gfns: &[u64]) {
        // Answered when what a pager before this one had mapped is gone.
        self.ask(Ask::Mapped { gfn: 0, pages: 1 }).unwrap();
        self.settled();
        for (mem, &base_gfn) in self.memories.iter().zip(gfns) {
            let kernel = mem.view.pagemap();
            let mut mirror = vec![(false, false); kernel.len()];
            let (mut gfn, end) = (base_gfn, base_gfn + mem.pages);
            while gfn < end {
                let pages = end - gfn;
                let Ok(Answer::Mapped { runs, next }) = self.ask(Ask::Mapped { gfn, pages }) else {
                    panic!("no listing");
                };
                for run in runs {
                    for gfn in run.gfn..run.gfn + run.pages {
                        mirror[(gfn - base_gfn) as usize] = (true, !run.writable);
                    }
                }
                gfn = next;
            }
            for (page, (kernel, mirror)) in kernel.iter().zip(&mirror).enumerate() {
                assert_eq!(
                    kernel.0, mirror.0,
                    "page {page}: mapped by the kernel, by the mirror"
                );
                if self.can_protect && kernel.0 {
                    assert_eq!(kernel.1, mirror.1, "page {page}: protected");
                }
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(pager) = self.pager.take() {
            pager.socket.close();
            let listened = pager.listener.join();
            let ended = pager.thread.join();
            if !std::thread::panicking() {
                listened.unwrap();
                ended.unwrap().unwrap();
            }
        }
        for mem in self.memories.iter() {
            // Whoever still waits goes on.
            let _ = self
                .uffd
                .unregister(mem.view.address(), mem.view.len as u64);
        }
    }
}

fn send_snapshot(socket: &Socket, taken: &Taken, active: bool) {
    let snapshot = taken.number;
    let message = ToPager::Snapshot { snapshot, active };
    socket.send(&message, &[taken.lease_read.as_fd()]).unwrap();
    for ((kept, marks), memory) in taken.parts.iter().zip(0..) {
        let message = ToPager::SnapshotMemory { snapshot, memory };
        socket
            .send(&message, &[kept.as_fd(), marks.as_fd()])
            .unwrap();
    }
}

fn listen(socket: &Socket, heard: &Heard, memories: &[Mem]) {
    while let Ok(packet) = socket.receive::<FromPager>() {
        let mut inner = heard.inner.lock().unwrap();
        match packet.message {
            FromPager::Hello { .. } => panic!("hello again"),
            FromPager::Attached => inner.attached = true,
            FromPager::Reply { request, result } => {
                inner.replies.insert(request, result);
            }
            FromPager::DropMappings {
                request,
                memory,
                page,
                pages,
            } => {
                drop(inner);
                let errno = memories[memory as usize].view.drop_mappings(page, pages);
                // A pager that is gone does not hear it.
                let _ = socket.send(&ToPager::Dropped { request, errno }, &[]);
                continue;
            }
            FromPager::State(state) => inner.state = *state,
            FromPager::SnapshotEnded { snapshot } => inner.ended.push(snapshot),
            FromPager::Loaded => inner.loaded = true,
        }
        heard.changed.notify_all();
    }
    heard.inner.lock().unwrap().closed = true;
    heard.changed.notify_all();
}

/// The first word of a page of a file.
pub(crate) fn word(file: &OwnedFd, page: u64) -> u64 {
    let mut word = [0; 8];
    rustix::io::pread(file, &mut word, page * PAGE as u64).unwrap();
    u64::from_ne_bytes(word)
}

/// Ends those who look at it, also when its owner panics.
pub(crate) struct End<'a>(pub(crate) &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
