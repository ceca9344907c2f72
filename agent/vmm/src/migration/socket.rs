//! Sockets of the data path: connecting, options, and vectored I/O straight between a socket and
//! guest memory.
//!
//! A peer's death is noticed by its reset; a dead network by TCP keepalive and the user timeout; a
//! living peer that does nothing by the I/O timeout. No heartbeat frames are needed. What waits on
//! the source's side ends when the migration is broken off ([`Breaker`]).

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd as _},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use super::{
    breaker::Breaker,
    wire::{PAGE, Run},
};
use crate::memory::HostView;

/// How long a connection attempt or an introduction may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a read or write may wait for the other side.
pub(super) const IO_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection attempt, and a write of [`Patient`], look this often at whether they are still
/// wanted.
const LOOK: Duration = Duration::from_millis(50);
/// Unacknowledged data this old means the network is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 5;
/// Kernel buffers of a data stream; large enough that a sender does not wait for a receiver that is
/// being scheduled.
const DATA_BUFFER: usize = 4 << 20;
/// Linux takes this many pieces in one vectored call.
const IOV_MAX: usize = 1024;

/// Sets the options of a connection. `data` streams get large buffers.
pub(super) fn configure(stream: &TcpStream, data: bool) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    if data {
        socket.set_send_buffer_size(DATA_BUFFER)?;
        socket.set_recv_buffer_size(DATA_BUFFER)?;
    }
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))
}

/// The migration was broken off.
pub(super) fn broken_off() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "broken off")
}

/// Connects within [`CONNECT_TIMEOUT`], unless it is broken off.
pub(super) fn connect(address: SocketAddr, breaker: &Breaker) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            connected(&socket, breaker)?;
        }
        done => done?,
    }
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

fn connected(socket: &Socket, breaker: &Breaker) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        if breaker.is_broken() {
            return Err(broken_off());
        }
        if wait_for(socket, PollFlags::OUT, LOOK)? {
            return socket.take_error()?.map_or(Ok(()), Err);
        }
        if begun.elapsed() > CONNECT_TIMEOUT {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// Waits until there is something to read, the peer's end included; false when `time` has passed.
pub(super) fn readable(stream: &TcpStream, time: Duration) -> io::Result<bool> {
    wait_for(stream, PollFlags::IN, time)
}

fn wait_for(what: &impl AsFd, flags: PollFlags, time: Duration) -> io::Result<bool> {
    let time = Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(what, flags)], Some(&time)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Bytes that the peer's kernel has not acknowledged yet; `None` when the kernel does not say.
pub(super) fn unacknowledged(stream: &TcpStream) -> Option<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int to the address that it is given.
    let done = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    (done == 0).then(|| usize::try_from(bytes).unwrap_or(0))
}

/// Reads, and the writes of a handshake, that end at one moment, however often a byte comes or goes
/// before it.
pub(super) struct Deadline<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl<'a> Deadline<'a> {
    pub(super) fn new(stream: &'a TcpStream, until: Instant) -> Self {
        Self { stream, until }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(bytes)
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_write_timeout(Some(left))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes that end when the migration is broken off, or when the peer takes nothing for
/// [`IO_TIMEOUT`], however much is to be written.
pub(super) struct Patient<'a> {
    stream: &'a TcpStream,
    breaker: &'a Breaker,
}

impl<'a> Patient<'a> {
    /// On a stream of its own write timeout.
    pub(super) fn new(stream: &'a TcpStream, breaker: &'a Breaker) -> io::Result<Self> {
        stream.set_write_timeout(Some(LOOK))?;
        Ok(Self { stream, breaker })
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let begun = Instant::now();
        loop {
            if self.breaker.is_broken() {
                return Err(broken_off());
            }
            match self.stream.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            if begun.elapsed() > IO_TIMEOUT {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reused storage for the pieces of one vectored call.
#[derive(Default)]
pub(super) struct Pieces(Vec<libc::iovec>);

// SAFETY: the pointers are only used inside the calls below, which rebuild the list first; between
// calls they are just numbers.
unsafe impl Send for Pieces {}

impl Pieces {
    fn fill(&mut self, memory: &HostView, runs: &[Run]) {
        self.0.clear();
        self.0.extend(runs.iter().map(|run| {
            let len = run.pages as usize * PAGE;
            libc::iovec {
                iov_base: memory.range_ptr(run.page as usize * PAGE, len).cast(),
                iov_len: len,
            }
        }));
    }

    /// Sends `head` and then the pages of `runs`, straight from guest memory.
    ///
    /// # Panics
    /// When a run reaches beyond the end of `memory`: runs are made from the slot's own bitmap.
    pub(super) fn send(
        &mut self,
        stream: &TcpStream,
        head: &[u8],
        memory: &HostView,
        runs: &[Run],
    ) -> io::Result<()> {
        self.fill(memory, runs);
        self.0.insert(
            0,
            libc::iovec {
                iov_base: head.as_ptr().cast_mut().cast(),
                iov_len: head.len(),
            },
        );
        self.all(|pieces| {
            // SAFETY: every piece is `head` or a bounds-checked range of a mapping that outlives
            // the call; the kernel only reads them. The guest may write the pages meanwhile: the
            // dirty log sends such a page again.
            unsafe { libc::writev(stream.as_raw_fd(), pieces.as_ptr(), count(pieces)) }
        })
    }

    /// Receives the pages of `runs`, straight into guest memory.
    ///
    /// # Panics
    /// When a run reaches beyond the end of `memory`: runs are checked against the slot when they
    /// are decoded.
    pub(super) fn receive(
        &mut self,
        stream: &TcpStream,
        memory: &HostView,
        runs: &[Run],
    ) -> io::Result<()> {
        self.fill(memory, runs);
        self.all(|pieces| {
            // SAFETY: every piece is a bounds-checked range of a mapping that outlives the call; no
            // Rust reference to guest memory exists.
            unsafe { libc::readv(stream.as_raw_fd(), pieces.as_ptr(), count(pieces)) }
        })
    }

    /// Repeats `call` until every piece is done.
    fn all(&mut self, mut call: impl FnMut(&[libc::iovec]) -> isize) -> io::Result<()> {
        let mut first = 0;
        while first < self.0.len() {
            let Ok(mut done) = usize::try_from(call(&self.0[first..])) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            while let Some(piece) = self.0.get_mut(first) {
                if done < piece.iov_len {
                    piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(done).cast();
                    piece.iov_len -= done;
                    break;
                }
                done -= piece.iov_len;
                first += 1;
            }
        }
        Ok(())
    }
}

fn count(pieces: &[libc::iovec]) -> i32 {
    pieces.len().min(IOV_MAX) as i32
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, sync::Arc, thread};

    use super::*;

    /// Far below any timeout of this file.
    const AT_ONCE: Duration = Duration::from_secs(1);

    /// Runs `blocked`, breaks it off, and says how long it took to end after that.
    fn break_off<T: Send + 'static>(
        blocked: impl FnOnce(&Breaker) -> io::Result<T> + Send + 'static,
    ) -> Duration {
        let breaker = Arc::new(Breaker::default());
        let theirs = Arc::clone(&breaker);
        let thread = thread::spawn(move || blocked(&theirs).err().map(|error| error.kind()));
        thread::sleep(Duration::from_millis(100));
        assert!(!thread.is_finished(), "it did not block");
        let begun = Instant::now();
        breaker.break_off();
        assert_eq!(
            thread.join().unwrap(),
            Some(io::ErrorKind::ConnectionAborted)
        );
        begun.elapsed()
    }

    #[test]
    fn a_connection_attempt_is_broken_off() {
        // A full queue of connections: the kernel answers no more of them.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let _queued = TcpStream::connect(address).unwrap();
        let took = break_off(move |breaker| connect(address, breaker));
        assert!(took < AT_ONCE, "{took:?}");
    }

    #[test]
    fn a_connection_attempt_that_is_refused_or_taken_says_so() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let breaker = Breaker::default();
        let stream = connect(address, &breaker).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), address);
        drop((listener, stream));
        let refused = connect(address, &breaker).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_peer_that_sends_byte_by_byte_does_not_move_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let dripping = thread::spawn(move || {
            // Until the other end is closed.
            while peer.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let begun = Instant::now();
        let mut deadline = Deadline::new(&stream, begun + Duration::from_millis(200));
        let late = deadline.read_exact(&mut [0; 1 << 16]).unwrap_err();
        assert!(
            matches!(
                late.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
            ),
            "{late}"
        );
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        drop(stream);
        dripping.join().unwrap();
    }

    #[test]
    fn a_long_write_to_a_peer_that_does_not_read_is_broken_off() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _silent = listener.accept().unwrap();
        let took =
            break_off(move |breaker| Patient::new(&stream, breaker)?.write_all(&vec![0; 64 << 20]));
        assert!(took < AT_ONCE, "{took:?}");
    }
}
