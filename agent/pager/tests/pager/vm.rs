//! A VM process that is none: memory, views and a descriptor in the test's own address space, and a
//! thread that answers the pager.
//!
//! Whoever touches a view waits for the pager, as a vCPU would. All waits for words of the pager
//! are bounded; a touch is bounded by the test's own time limit.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use slat_pager::{Options, PagerError, run_with};
use slat_paging::{
    bits::SharedBits,
    uffd::{Offer, Uffd, Watch},
    wire::{Answer, Ask, FromPager, Memory, PagerState, Problem, Setup, Socket, ToPager, VERSION},
};

use crate::{
    heard::{Heard, HeardInner, listen},
    layers::{LayerFds, Taken, send_snapshot},
    view::{Mem, View, file, word},
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

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

pub(crate) struct Vm {
    pub(crate) memories: Arc<Vec<Mem>>,
    pub(crate) offer: Offer,
    uffd: Uffd,
    pub(crate) can_protect: bool,
    load_all: bool,
    watched: bool,
    pub(crate) layers: Vec<LayerFds>,
    pub(crate) snapshots: Vec<Taken>,
    pager: Option<Pager>,
    last: AtomicU64,
}

pub(crate) struct Pager {
    pub(crate) socket: Arc<Socket>,
    heard: Arc<Heard>,
    listener: JoinHandle<()>,
    thread: JoinHandle<Result<(), PagerError>>,
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

    pub(crate) fn pager(&self) -> &Pager {
        self.pager.as_ref().unwrap()
    }

    /// Waits until something was heard.
    fn heard<T>(&self, what: impl FnMut(&mut HeardInner) -> Option<T>) -> T {
        self.pager().heard.wait(what)
    }

    /// What is heard of the pager.
    pub(crate) fn hears(&self) -> Arc<Heard> {
        Arc::clone(&self.pager().heard)
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
