//! A file whose reads can be held, as a disk or a file server that does not answer holds them.
//!
//! It is a file system of one file, which the kernel asks for over `/dev/fuse`: the file is its
//! root, and is mounted over the path of an ordinary file, whose bytes it gives. A read by a pager
//! that touches the held part waits until [`StallingFile::let_go`]; all else is answered at once.
//! One thread reads requests. It ends with the value, and then the kernel fails what still waits.
//!
//! Of the protocol there is what reading needs (`include/uapi/linux/fuse.h`); fields are in this
//! machine's byte order. The kernel only asks what the file system said it can do.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    ops::Range,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context as _;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const ACCESS: u32 = 34;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
/// Before each request: length, what, which, of which file, who asks.
const HEADER: usize = 40;
/// No request is longer, and the kernel wants at least that much room.
const LONGEST: usize = 1 << 18;
/// Past the page cache, so that what is asked is what somebody reads.
const DIRECT: u32 = 1;
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub struct StallingFile {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    fuse: File,
    file: File,
    held: Range<u64>,
    waiting: Mutex<Waiting>,
    ends: AtomicBool,
}

#[derive(Debug)]
struct Waiting {
    holds: bool,
    reads: Vec<Ask>,
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    unique: u64,
    offset: u64,
    size: usize,
}

impl StallingFile {
    /// Puts one over a file, and holds what pagers read of `held`.
    ///
    /// # Errors
    /// When this process may not, or the kernel has no FUSE.
    pub fn over(path: &Path, held: Range<u64>) -> anyhow::Result<Self> {
        let file = File::open(path)?;
        let mut both = File::options();
        let fuse = both.read(true).write(true).open("/dev/fuse");
        let fuse = fuse.context("/dev/fuse")?;
        let mode = file.metadata()?.mode();
        let owner = "user_id=0,group_id=0,allow_other";
        let options = format!("fd={},rootmode={mode:o},{owner}", fuse.as_raw_fd());
        let options = std::ffi::CString::new(options)?;
        mount("slat-test", path, "fuse", MountFlags::empty(), &*options)
            .with_context(|| format!("mounting over {}", path.display()))?;
        let reads = Vec::new();
        let shared = Arc::new(Shared {
            fuse,
            file,
            held,
            waiting: Mutex::new(Waiting { holds: true, reads }),
            ends: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        Ok(Self {
            path: path.to_owned(),
            shared,
            thread: Some(std::thread::spawn(move || serving.serve())),
        })
    }

    /// Holds reads again.
    pub fn hold(&self) {
        self.shared.waiting().holds = true;
    }

    /// Answers what waits, and all that comes.
    pub fn let_go(&self) {
        let reads = {
            let mut waiting = self.shared.waiting();
            waiting.holds = false;
            std::mem::take(&mut waiting.reads)
        };
        for ask in reads {
            self.shared.read(ask);
        }
    }

    /// How many reads wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.waiting().reads.len()
    }
}

impl Drop for StallingFile {
    fn drop(&mut self) {
        self.let_go();
        // Detached: whoever still has the file open keeps it.
        if let Err(error) = unmount(&self.path, UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {error}", self.path.display());
        }
        self.shared.ends.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|it| it.join().is_err()) {
            eprintln!("{}: its thread panicked", self.path.display());
        }
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut request = vec![0; LONGEST];
        let timeout = Timespec::try_from(LOOK_EVERY).ok();
        while !self.ends.load(Ordering::Relaxed) {
            let mut fds = [PollFd::new(&self.fuse, PollFlags::IN)];
            if !matches!(poll(&mut fds, timeout.as_ref()), Ok(1..)) {
                continue;
            }
            match (&self.fuse).read(&mut request) {
                Ok(length) => self.answer(&request[..length]),
                // Nobody has it mounted or open any more.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => return,
                Err(_) => {}
            }
        }
    }

    fn answer(&self, request: &[u8]) {
        let (Some(what), Some(unique)) = (u32_at(request, 4), u64_at(request, 8)) else {
            return;
        };
        match what {
            FORGET | INTERRUPT => {}
            INIT => self.tell(unique, 0, &init()),
            GETATTR => match self.attributes() {
                Ok(attributes) => self.tell(unique, 0, &attributes),
                Err(_) => self.tell(unique, Errno::IO.raw_os_error(), &[]),
            },
            OPEN => {
                let mut open = [0; 16];
                open[8..12].copy_from_slice(&DIRECT.to_ne_bytes());
                self.tell(unique, 0, &open);
            }
            READ => {
                let offset = u64_at(request, HEADER + 8).unwrap_or_default();
                let size = u32_at(request, HEADER + 16).unwrap_or_default() as usize;
                let ask = Ask {
                    unique,
                    offset,
                    size,
                };
                let pid = u32_at(request, 32).unwrap_or_default();
                if !self.holds(ask, pid) {
                    self.read(ask);
                }
            }
            RELEASE | FLUSH | ACCESS | DESTROY => self.tell(unique, 0, &[]),
            _ => self.tell(unique, Errno::NOSYS.raw_os_error(), &[]),
        }
    }

    /// Keeps a read for later, if it is of the held part and a pager's.
    fn holds(&self, ask: Ask, pid: u32) -> bool {
        let end = ask.offset + ask.size as u64;
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let by_pager = line.split(|byte| *byte == 0).any(|word| word == b"pager");
        let touches = ask.offset < self.held.end && self.held.start < end;
        let mut waiting = self.waiting();
        let holds = waiting.holds && by_pager && touches;
        if holds {
            waiting.reads.push(ask);
        }
        holds
    }

    fn read(&self, ask: Ask) {
        let mut bytes = vec![0; ask.size.min(LONGEST)];
        match self.file.read_at(&mut bytes, ask.offset) {
            Ok(length) => self.tell(ask.unique, 0, &bytes[..length]),
            Err(_) => self.tell(ask.unique, Errno::IO.raw_os_error(), &[]),
        }
    }

    /// Who asked may be gone: then the kernel does not take the answer.
    fn tell(&self, unique: u64, error: i32, body: &[u8]) {
        let length = (16 + body.len()) as u32;
        let mut answer = Vec::with_capacity(16 + body.len());
        answer.extend(length.to_ne_bytes());
        answer.extend((-error).to_ne_bytes());
        answer.extend(unique.to_ne_bytes());
        answer.extend(body);
        drop((&self.fuse).write(&answer));
    }

    /// `fuse_attr_out`: valid for no time, then number, size, blocks, times, mode, links, owner.
    fn attributes(&self) -> std::io::Result<Vec<u8>> {
        let of = self.file.metadata()?;
        let mut out = vec![0; 16];
        let times = [of.atime(), of.mtime(), of.ctime()].map(i64::cast_unsigned);
        for long in [1, of.size(), of.blocks()].into_iter().chain(times) {
            out.extend(long.to_ne_bytes());
        }
        let short = [0, 0, 0, of.mode(), 1, of.uid(), of.gid(), 0, 4096, 0];
        out.extend(short.into_iter().flat_map(u32::to_ne_bytes));
        Ok(out)
    }
}

/// `fuse_init_out`: the version, and defaults.
fn init() -> [u8; 64] {
    let mut out = [0; 64];
    out[..4].copy_from_slice(&7_u32.to_ne_bytes());
    out[4..8].copy_from_slice(&31_u32.to_ne_bytes());
    // The longest write, which nobody makes.
    out[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
    out
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}
