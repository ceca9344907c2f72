//! Sockets of the data path: options, and vectored I/O straight between a socket and guest memory.
//!
//! A peer's death is noticed by its reset; a dead network by TCP keepalive and the user timeout; a
//! living peer that does nothing by the I/O timeout. No heartbeat frames are needed.

use std::{
    io::{self, Write as _},
    net::TcpStream,
    os::fd::AsRawFd as _,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};

use super::wire::{PAGE, Run};
use crate::memory::HostView;

/// How long a connection attempt or an introduction may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a read or write may wait for the other side.
pub(super) const IO_TIMEOUT: Duration = Duration::from_secs(30);
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

/// Sends small bytes whole.
pub(super) fn send_all(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)
}
