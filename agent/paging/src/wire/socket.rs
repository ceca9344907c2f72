//! A socket whose packets carry one message and its descriptors.
//!
//! Calls block; a bound on waiting is a receive timeout of the socket. What comes is bounded before
//! it is used, and descriptors that nobody expects are closed.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, accept_with, bind, connect, listen, recvmsg, sendmsg, shutdown, socket_with,
    socketpair, sockopt,
};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes of a message.
pub const MOST_BYTES: usize = 64 << 10;
/// Descriptors of a message.
pub const MOST_FDS: usize = 32;

/// Why a message did not come or go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The other side has closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// A message that is too long, cut, or not one of those that are expected here.
    #[error("a bad message: {0}")]
    Bad(String),
    /// The kernel.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for WireError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A message and its descriptors.
#[derive(Debug)]
pub struct Packet<T> {
    /// What was said.
    pub message: T,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Connects to a [`Listener`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = unix()?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    /// Two ends of a connection.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// How long [`Socket::receive`] waits; `None`: until something comes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(
            &self.0,
            sockopt::Timeout::Recv,
            patience,
        )?)
    }

    /// How long [`Socket::send`] waits for room; `None`: until there is some.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_send_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        let which = sockopt::Timeout::Send;
        Ok(sockopt::set_socket_timeout(&self.0, which, patience)?)
    }

    /// Whether the other side has closed the connection. Does not wait.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let gone = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
        let mut polled = [PollFd::new(&self.0, PollFlags::RDHUP)];
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut polled, Some(&none)).is_ok() && polled[0].revents().intersects(gone)
    }

    /// Sends a message with descriptors, which stay the caller's. Several threads may send.
    ///
    /// # Errors
    /// `Closed` when nobody is there to hear it; `Bad` when it is too long.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
        let bytes =
            serde_json::to_vec(message).map_err(|error| WireError::Bad(error.to_string()))?;
        if bytes.len() > MOST_BYTES || fds.len() > MOST_FDS {
            let (bytes, fds) = (bytes.len(), fds.len());
            return Err(WireError::Bad(format!("{bytes} bytes, {fds} descriptors")));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            let iov = [IoSlice::new(&bytes)];
            match sendmsg(&self.0, &iov, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(WireError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next message. One thread at a time.
    ///
    /// # Errors
    /// `Closed` at the end; `Io` with `WouldBlock` when the patience is over; `Bad`.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Packet<T>, WireError> {
        let mut bytes = vec![0; MOST_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => break got,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Err(WireError::Closed),
                Err(error) => return Err(error.into()),
            }
        };
        let mut fds = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = part {
                fds.extend(more);
            }
        }
        if got.bytes == 0 {
            return Err(WireError::Closed);
        }
        if got
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(WireError::Bad("longer than any message".to_owned()));
        }
        let message = serde_json::from_slice(&bytes[..got.bytes])
            .map_err(|error| WireError::Bad(error.to_string()))?;
        Ok(Packet { message, fds })
    }

    /// Ends the connection, for whoever waits on either end of it.
    pub fn close(&self) {
        // It may be closed already.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl From<OwnedFd> for Socket {
    /// An end that another process made and handed over.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where pagers and agents connect to a VM process.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on `path`, which must not exist.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = unix()?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 8)?;
        Ok(Self(socket))
    }

    /// The next connection.
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` after [`Listener::close`].
    pub fn accept(&self) -> io::Result<Socket> {
        loop {
            match accept_with(&self.0, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(Socket(socket)),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends waiting for connections.
    pub fn close(&self) {
        // It may be closed already.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

fn unix() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, os::fd::AsFd};

    use super::{
        super::{Ask, ToPager},
        *,
    };

    #[test]
    fn a_message_comes_with_its_descriptors() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        let near = Socket::connect(&path).unwrap();
        let far = listener.accept().unwrap();
        let ask = Ask::Unmap { gfn: 7, pages: 1 };
        let sent = ToPager::Ask { request: 1, ask };
        let (read, write) = rustix::pipe::pipe().unwrap();
        near.send(&sent, &[write.as_fd()]).unwrap();
        drop(write);
        let mut got = far.receive::<ToPager>().unwrap();
        assert_eq!(got.message, sent);
        let mut pipe = File::from(got.fds.pop().unwrap());
        pipe.write_all(b"x").unwrap();
        drop(pipe);
        assert_eq!(std::io::read_to_string(File::from(read)).unwrap(), "x");
        drop(near);
        assert!(matches!(far.receive::<ToPager>(), Err(WireError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (near, far) = Socket::pair().unwrap();
        near.send(&"nonsense", &[]).unwrap();
        assert!(matches!(far.receive::<ToPager>(), Err(WireError::Bad(_))));
        let long = "x".repeat(MOST_BYTES);
        assert!(matches!(near.send(&long, &[]), Err(WireError::Bad(_))));
    }

    #[test]
    fn a_wait_ends_when_patience_does_and_when_the_other_side_closes() {
        let (near, far) = Socket::pair().unwrap();
        far.set_patience(Some(Duration::from_millis(10))).unwrap();
        let Err(WireError::Io(error)) = far.receive::<ToPager>() else {
            panic!("nothing was sent");
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        far.set_patience(None).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| far.receive::<ToPager>().map(drop));
            near.close();
            assert!(matches!(waits.join().unwrap(), Err(WireError::Closed)));
        });
        assert!(matches!(near.send(&0, &[]), Err(WireError::Closed)));
    }
}
