//! A VM process as far as a pager sees one: memory in a file, a watched view of it, and the socket.
//! It has no guest: threads of the benchmark touch the view.

use std::{
    fs::File,
    os::fd::AsFd as _,
    process::{Child, Command},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use slat_paging::{
    PAGE, SOCKET,
    uffd::{Offer, Uffd, Watch},
    wire::{Answer, Ask, FromPager, Listener, Memory, PagerState, Setup, Socket, ToPager, VERSION},
};

use crate::{bench::mapping::Mapping, binary};

/// How long a pager may take for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// What is asked has numbers; there is one question at a time.
const REQUEST: u64 = 1;

/// Memory of which every page is in its file, and a view that has none of them mapped.
#[derive(Debug)]
pub struct View {
    file: File,
    /// What threads touch.
    pub view: Arc<Mapping>,
    /// Told of its faults.
    pub uffd: Arc<Uffd>,
    offer: Offer,
    pages: usize,
}

impl View {
    /// So many pages.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn new(pages: usize) -> anyhow::Result<Self> {
        let (uffd, offer) = Uffd::open()?;
        let file = File::from(memfd_create("slat-bench", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, (pages * PAGE) as u64)?;
        Mapping::of_file(&file, pages * PAGE)?.populate()?;
        let view = Mapping::of_file(&file, pages * PAGE)?;
        let mut watch = Watch::MISSING | Watch::MINOR;
        watch.set(Watch::PROTECTED, offer.protect);
        uffd.register(view.address(), (pages * PAGE) as u64, watch)?;
        Ok(Self {
            file,
            view: Arc::new(view),
            uffd: Arc::new(uffd),
            offer,
            pages,
        })
    }

    /// Forgets all mappings; contents, too, or has them all there.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn forget(&self, contents: bool) -> anyhow::Result<()> {
        self.contents(contents)?;
        Ok(self.view.drop_mappings(0, self.pages * PAGE)?)
    }

    /// Takes the contents away, or makes what is not there.
    fn contents(&self, gone: bool) -> anyhow::Result<()> {
        let mut flags = FallocateFlags::KEEP_SIZE;
        flags.set(FallocateFlags::PUNCH_HOLE, gone);
        Ok(fallocate(&self.file, flags, 0, (self.pages * PAGE) as u64)?)
    }
}

/// A view that a real pager serves.
#[derive(Debug)]
pub struct Paged {
    /// Its memory.
    pub view: View,
    socket: Arc<Socket>,
    answers: mpsc::Receiver<anyhow::Result<Answer>>,
    listening: Option<JoinHandle<()>>,
    pager: Child,
    _dir: slat_test_dir::TestDir,
}

impl Paged {
    /// Starts a pager and waits until it serves.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(pages: usize) -> anyhow::Result<Self> {
        let view = View::new(pages)?;
        let dir = slat_test_dir::TestDir::new();
        let listener = Listener::bind(&dir.path().join(SOCKET))?;
        let mut command = Command::new(binary::slat()?);
        command.env("SLAT_INSECURE_PLAINTEXT", "true");
        command.args(["pager", "--dir"]).arg(dir.path());
        let pager = command.spawn().context("starting a pager")?;
        let socket = listener.accept()?;
        socket.set_patience(Some(PATIENCE))?;
        let hello = socket.receive::<FromPager>()?.message;
        ensure!(matches!(hello, FromPager::Hello { .. }), "{hello:?}");
        let setup = Setup {
            version: VERSION,
            format: slat_arch_format().to_owned(),
            vcpus: Vec::new(),
            watched: true,
            can_protect: view.offer.protect,
            load_all: false,
            mapped: false,
        };
        socket.send(&ToPager::Setup(setup), &[view.uffd.as_fd()])?;
        let memory = Memory {
            memory: 1,
            slot: 0,
            base_gfn: 0,
            pages: pages as u64,
            view: view.view.address(),
            file_start: 0,
            read_only: false,
            origin: None,
            has_loaded: false,
        };
        socket.send(&ToPager::Memory(memory), &[view.file.as_fd()])?;
        socket.send(&ToPager::Ready, &[])?;
        loop {
            match socket.receive::<FromPager>()?.message {
                FromPager::Attached => break,
                FromPager::State(_) => {}
                other => bail!("{other:?} before it serves"),
            }
        }
        socket.set_patience(None)?;
        let socket = Arc::new(socket);
        let (answer, answers) = mpsc::channel();
        let (theirs, mapping) = (Arc::clone(&socket), Arc::clone(&view.view));
        let listening = thread::spawn(move || listen(&theirs, &mapping, &answer));
        Ok(Self {
            view,
            socket,
            answers,
            listening: Some(listening),
            pager,
            _dir: dir,
        })
    }

    /// Asks the pager, and waits for its answer.
    ///
    /// # Errors
    /// What it says, or that it says nothing.
    pub fn ask(&self, ask: Ask) -> anyhow::Result<Answer> {
        let request = REQUEST;
        self.socket.send(&ToPager::Ask { request, ask }, &[])?;
        self.answers.recv_timeout(PATIENCE).context("no answer")?
    }

    /// Forgets all mappings, through the pager; contents, too, or has them all there.
    ///
    /// # Errors
    /// As [`Paged::ask`].
    pub fn forget(&self, contents: bool) -> anyhow::Result<()> {
        let (gfn, pages) = (0, self.view.pages as u64);
        if contents {
            return self.ask(Ask::Discard { gfn, pages }).map(drop);
        }
        self.view.contents(false)?;
        self.ask(Ask::Unmap { gfn, pages }).map(drop)
    }

    /// How it stands.
    ///
    /// # Errors
    /// As [`Paged::ask`].
    pub fn state(&self) -> anyhow::Result<PagerState> {
        match self.ask(Ask::State)? {
            Answer::State(state) => Ok(*state),
            other => bail!("{other:?} in place of a state"),
        }
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        self.socket.close();
        if let Some(listening) = self.listening.take() {
            drop(listening.join());
        }
        // It ends with its socket; should it not, it is ended.
        drop(self.pager.kill());
        drop(self.pager.wait());
    }
}

/// The name of this machine's family of formats.
fn slat_arch_format() -> &'static str {
    if cfg!(target_arch = "riscv64") {
        "sv48x4"
    } else {
        "ept4"
    }
}

fn listen(socket: &Socket, view: &Mapping, answer: &mpsc::Sender<anyhow::Result<Answer>>) {
    while let Ok(packet) = socket.receive::<FromPager>() {
        match packet.message {
            FromPager::DropMappings {
                request,
                page,
                pages,
                ..
            } => {
                let dropped = view.drop_mappings(page as usize * PAGE, pages as usize * PAGE);
                let errno = dropped
                    .err()
                    .map_or(0, |error| error.raw_os_error().unwrap_or(-1));
                drop(socket.send(&ToPager::Dropped { request, errno }, &[]));
            }
            FromPager::Reply { result, .. } => {
                let result = result.map_err(|problem| anyhow::anyhow!("{problem:?}"));
                if answer.send(result).is_err() {
                    return;
                }
            }
            _ => {}
        }
    }
}
