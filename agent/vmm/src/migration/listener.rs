//! The destination's data port: lets in whoever shows what the [`Channel`] wants, and nobody else.
//!
//! A connection has [`CONNECT_TIMEOUT`] to introduce itself, its TLS included. Until it has done
//! so, it holds one small thread and can send one handshake and one frame of bounded length. At
//! most [`MAX_UNKNOWN`] connections wait at a time: one more closes the oldest, so silent peers
//! never keep the source out, which introduces itself at once. A connection that shows something
//! else is closed without a word, but for TLS's own alerts. Nothing that a peer sends before
//! reaches the migration.

use std::{
    collections::VecDeque,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    channel::Channel,
    socket::{CONNECT_TIMEOUT, configure},
    stream::{Inlet, Outlet},
    wire::{FrameReader, Hello, Kind, StreamRole, WireError},
};
use crate::confine;

/// Connections that have not introduced themselves yet.
const MAX_UNKNOWN: usize = 64;
/// Before accepting is tried again after a failure; doubles.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// A connection that showed what it has to.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) role: StreamRole,
    pub(crate) inlet: Inlet,
    pub(crate) outlet: Outlet,
    pub(crate) reader: FrameReader,
}

/// The listening port and its accepting thread.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    refused: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Takes connections of `socket`. `admit` is called on a thread of its own for each good one.
    pub(crate) fn open(
        socket: TcpListener,
        channel: Channel,
        protocol: u32,
        epoch: u64,
        admit: impl Fn(Peer) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let address = socket.local_addr()?;
        let refused = Arc::new(AtomicU64::new(0));
        let accepting = socket.try_clone()?;
        let count = Arc::clone(&refused);
        let thread = std::thread::Builder::new()
            .name("data-port".to_owned())
            .spawn(move || {
                accept(
                    &accepting,
                    &Arc::new(channel),
                    (protocol, epoch),
                    &count,
                    &Arc::new(admit),
                )
            })?;
        Ok(Self {
            socket,
            address,
            refused,
            thread: Some(thread),
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections turned away so far.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Listener {
    /// Closes the port; the accepting thread ends.
    fn drop(&mut self) {
        // On Linux this makes a blocked accept return.
        if let Err(error) = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both) {
            tracing::warn!(%error, "closing the data port");
            return;
        }
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the data port's thread panicked");
        }
    }
}

fn accept(
    socket: &TcpListener,
    channel: &Arc<Channel>,
    (protocol, epoch): (u32, u64),
    refused: &Arc<AtomicU64>,
    admit: &Arc<impl Fn(Peer) + Send + Sync + 'static>,
) {
    let waiting = Arc::new(Waiting::default());
    let mut pause = PAUSE;
    for number in 0_u64.. {
        let (stream, peer) = match socket.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => {
                // Out of descriptors or a connection gone before it was taken: the others go on.
                if pause == PAUSE {
                    tracing::warn!(%error, "accepting on the data port; trying again");
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            }
        };
        pause = PAUSE;
        let (unknown, channel) = (Arc::clone(&waiting), Arc::clone(channel));
        let (refused, admit) = (Arc::clone(refused), Arc::clone(admit));
        let started = stream.try_clone().and_then(|ours| {
            unknown.enter(number, ours);
            std::thread::Builder::new()
                .name("introduction".to_owned())
                .spawn(move || {
                    confine::enter(confine::Role::Stream);
                    let result = introduce(stream, &channel, protocol, epoch);
                    unknown.leave(number);
                    match result {
                        Ok(peer) => admit(peer),
                        Err(error) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                            tracing::warn!(%peer, %error, "a connection to the data port was turned away");
                        }
                    }
                })
        });
        if let Err(error) = started {
            waiting.leave(number);
            tracing::warn!(%error, %peer, "no means to let a connection introduce itself");
        }
    }
}

/// Connections that have not introduced themselves yet, oldest first. The lock is held for list
/// updates and a shutdown.
#[derive(Debug, Default)]
struct Waiting(Mutex<VecDeque<(u64, TcpStream)>>);

impl Waiting {
    fn list(&self) -> MutexGuard<'_, VecDeque<(u64, TcpStream)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one in; when there are too many, the oldest is closed.
    fn enter(&self, number: u64, stream: TcpStream) {
        let mut list = self.list();
        list.push_back((number, stream));
        if list.len() > MAX_UNKNOWN
            && let Some((_, oldest)) = list.pop_front()
        {
            // Closed by itself meanwhile: as good.
            drop(oldest.shutdown(Shutdown::Both));
        }
    }

    fn leave(&self, number: u64) {
        self.list().retain(|(other, _)| *other != number);
    }
}

fn introduce(
    stream: TcpStream,
    channel: &Channel,
    protocol: u32,
    epoch: u64,
) -> Result<Peer, WireError> {
    let until = Instant::now() + CONNECT_TIMEOUT;
    let (mut inlet, outlet) = channel.accept(stream, until)?;
    let mut reader = FrameReader::new(protocol, epoch);
    let header = reader.header(&mut inlet.within(until))?;
    if header.kind != Kind::Hello {
        return Err(WireError::corrupt(
            "kind",
            format!("{:?} before Hello", header.kind),
        ));
    }
    let hello = Hello::decode(&super::wire::payload(&mut inlet.within(until), &header)?)?;
    if !channel.admits(&inlet, hello.role, &hello.shows)? {
        return Err(WireError::corrupt(
            "ticket",
            "not this migration's, or not this connection's",
        ));
    }
    configure(inlet.socket(), matches!(hello.role, StreamRole::Data(_)))?;
    // Between iterations the source is busy elsewhere for as long as that takes. Keepalive ends the
    // read when the source's host or the network is gone.
    inlet.socket().set_read_timeout(None)?;
    Ok(Peer {
        role: hello.role,
        inlet,
        outlet,
        reader,
    })
}
