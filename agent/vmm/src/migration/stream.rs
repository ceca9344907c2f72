//! One connection of a migration, in its two halves: what is received comes from an [`Inlet`], what
//! is sent goes into an [`Outlet`], in the clear or by TLS, and whoever encrypts.
//!
//! In the clear, and where the kernel encrypts, pages go straight between the socket and guest
//! memory ([`Pieces`]); else through [`super::tls`].
//!
//! A write that failed may have left half a record on the wire: nothing follows it.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::CipherSuite;
use slat_proto::v1::{self, page_path::Protection};

use super::{
    breaker::Breaker,
    kernel::Records,
    socket::{self, Deadline, Patient, Pieces, unacknowledged},
    tls::{Opening, Sealing, Session},
    wire::{Run, WireError},
};
use crate::memory::HostView;

/// The receiving half.
pub(crate) struct Inlet {
    socket: Arc<TcpStream>,
    opening: Option<Opening>,
    pieces: Pieces,
}

impl fmt::Debug for Inlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inlet")
            .field("socket", &self.socket)
            .field("tls", &self.opening.is_some())
            .finish_non_exhaustive()
    }
}

/// The sending half.
pub(crate) struct Outlet {
    socket: Arc<TcpStream>,
    way: Way,
    pieces: Pieces,
    broken: bool,
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet")
            .field("socket", &self.socket)
            .field("path", &self.path())
            .finish_non_exhaustive()
    }
}

/// Who encrypts what is sent.
enum Way {
    Plain,
    Process(Sealing),
    Kernel(Records, Option<CipherSuite>),
}

/// Both halves of a connection in the clear.
pub(super) fn plain(socket: TcpStream) -> (Inlet, Outlet) {
    halves(socket, None, Way::Plain)
}

/// Both halves of a connection that this process protects. `data`: it carries pages.
pub(super) fn protected(socket: TcpStream, session: Session, data: bool) -> (Inlet, Outlet) {
    let session = Arc::new(session);
    let opening = Opening::new(Arc::clone(&session), data);
    halves(socket, Some(opening), Way::Process(Sealing::new(session)))
}

/// Both halves of a connection that the kernel protects, with this cipher.
pub(super) fn by_kernel(socket: TcpStream, suite: Option<CipherSuite>) -> (Inlet, Outlet) {
    halves(socket, None, Way::Kernel(Records::default(), suite))
}

fn halves(socket: TcpStream, opening: Option<Opening>, way: Way) -> (Inlet, Outlet) {
    let socket = Arc::new(socket);
    let inlet = Inlet {
        socket: Arc::clone(&socket),
        opening,
        pieces: Pieces::default(),
    };
    let outlet = Outlet {
        socket,
        way,
        pieces: Pieces::default(),
        broken: false,
    };
    (inlet, outlet)
}

impl Inlet {
    /// For options and shutdowns; what is read from it is lost.
    pub(crate) fn socket(&self) -> &Arc<TcpStream> {
        &self.socket
    }

    /// Secrets of this connection's handshake alone; `None` in the clear.
    pub(super) fn export(
        &self,
        label: &[u8],
        context: &[u8],
    ) -> Option<Result<[u8; 32], WireError>> {
        let opening = self.opening.as_ref()?;
        Some(opening.session().export(label, context))
    }

    fn read_by(&mut self, raw: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.opening {
            None => raw.read(bytes),
            Some(opening) => opening.read(raw, bytes),
        }
    }

    /// Reads that end at one moment.
    pub(crate) fn within(&mut self, until: Instant) -> impl Read {
        struct Within<'a>(&'a mut Inlet, Instant);
        impl Read for Within<'_> {
            fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
                let socket = Arc::clone(&self.0.socket);
                self.0.read_by(&mut Deadline::new(&socket, self.1), bytes)
            }
        }
        Within(self, until)
    }

    /// Waits until there is something to read, the peer's end included; false when `time` has
    /// passed.
    pub(crate) fn readable(&mut self, time: Duration) -> io::Result<bool> {
        let Some(opening) = &mut self.opening else {
            return socket::readable(&self.socket, time);
        };
        let until = Instant::now() + time;
        // What was opened already is not on the socket any more; and what is there may be less than
        // a record.
        let mut there = Empty;
        if opening.has_plaintext(&mut there)? {
            return Ok(true);
        }
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !socket::readable(&self.socket, left)? {
                return Ok(false);
            }
            if opening.has_plaintext(&mut &*self.socket)? {
                return Ok(true);
            }
        }
    }

    /// Receives the pages of `runs`, into guest memory.
    ///
    /// # Panics
    /// When a run reaches beyond the end of `memory`: runs are checked against the slot when they
    /// are decoded.
    pub(crate) fn receive(&mut self, memory: &HostView, runs: &[Run]) -> io::Result<()> {
        match &mut self.opening {
            None => self.pieces.receive(&self.socket, memory, runs),
            Some(opening) => opening.receive(&mut &*self.socket, memory, runs),
        }
    }
}

impl Read for Inlet {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.opening {
            None => (&*self.socket).read(bytes),
            Some(opening) => opening.read(&mut &*self.socket, bytes),
        }
    }
}

/// Nothing for now.
struct Empty;

impl Read for Empty {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Outlet {
    /// For options and shutdowns; what is written to it breaks the stream.
    pub(crate) fn socket(&self) -> &Arc<TcpStream> {
        &self.socket
    }

    /// Bytes that the peer's kernel has not acknowledged yet; `None` when the kernel does not say.
    pub(super) fn unacknowledged(&self) -> Option<usize> {
        unacknowledged(&self.socket)
    }

    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.socket.shutdown(how)
    }

    fn write_by(&mut self, raw: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
        self.whole(|this| match &mut this.way {
            Way::Plain => raw.write(bytes),
            Way::Process(sealing) => sealing.write(raw, bytes),
            Way::Kernel(records, _) => {
                records.count(bytes.len())?;
                raw.write(bytes)
            }
        })
    }

    /// Nothing follows a write that failed, unless it failed in the clear.
    fn whole<T>(&mut self, write: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let written = write(self);
        self.broken = written.is_err() && matches!(self.way, Way::Process(_));
        written
    }

    /// Writes that end when the migration is broken off, or when the peer takes nothing for long.
    pub(super) fn patient<'a>(&'a mut self, breaker: &'a Breaker) -> impl Write + 'a {
        struct Writes<'a>(&'a mut Outlet, Arc<TcpStream>, &'a Breaker);
        impl Write for Writes<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.write_by(&mut Patient::new(&self.1, self.2)?, bytes)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let socket = Arc::clone(&self.socket);
        Writes(self, socket, breaker)
    }

    /// Sends `head` and then the pages of `runs`, from guest memory.
    ///
    /// # Panics
    /// When a run reaches beyond the end of `memory`: runs are made from the slot's own bitmap.
    pub(super) fn send(&mut self, head: &[u8], memory: &HostView, runs: &[Run]) -> io::Result<()> {
        self.whole(|this| match &mut this.way {
            Way::Plain => this.pieces.send(&this.socket, head, memory, runs),
            Way::Process(sealing) => sealing.send(&this.socket, head, memory, runs),
            Way::Kernel(records, _) => {
                let pages: usize = runs.iter().map(|run| run.pages as usize).sum();
                records.count(head.len() + pages * super::wire::PAGE)?;
                this.pieces.send(&this.socket, head, memory, runs)
            }
        })
    }

    /// How what is sent is protected, without the reason why the kernel does not do it.
    pub(super) fn path(&self) -> v1::PagePath {
        let (protection, suite) = match &self.way {
            Way::Plain => (Protection::None, None),
            Way::Process(sealing) => (Protection::Tls, sealing.session().suite()),
            Way::Kernel(_, suite) => (Protection::KernelTls, *suite),
        };
        v1::PagePath {
            protection: protection.into(),
            cipher: suite.map_or_else(String::new, cipher),
            ..Default::default()
        }
    }
}

/// `TLS13_AES_128_GCM_SHA256` is `AES_128_GCM`.
fn cipher(suite: CipherSuite) -> String {
    let name = suite.as_str().unwrap_or("unknown");
    let name = name.strip_prefix("TLS13_").unwrap_or(name);
    let (cipher, _hash) = name.rsplit_once("_SHA").unwrap_or((name, ""));
    cipher.to_owned()
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let socket = Arc::clone(&self.socket);
        self.write_by(&mut &*socket, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
