//! One connection's TLS where this process encrypts: rustls's records, fed from guest memory and
//! laid down in it.
//!
//! Guest memory is copied by at most a record at a time, by pointers: no Rust reference to it
//! exists. Many records leave by one system call, and what arrives is read in large pieces.
//!
//! # Locking
//! One mutex around rustls's connection, held while records are made or opened. A control
//! connection is read and written by two threads: its writer lets go of the mutex before it writes
//! to the socket, so that neither waits for the other's peer. A data stream has one thread, and its
//! records go from rustls to the socket under it.

use std::{
    io::{self, BufRead as _, Read, Write},
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use rustls::{CipherSuite, Connection};

use super::{
    socket::Deadline,
    wire::{PAGE, Run, WireError},
};
use crate::memory::HostView;

/// Bytes of one record.
pub(super) const RECORD: usize = 16 << 10;
/// So many records leave by one call.
const BATCH: usize = 32;
/// What is read from a data stream at once, and from a control connection.
const DATA_PIECE: usize = 256 << 10;
const CONTROL_PIECE: usize = 32 << 10;
/// A long frame is encrypted in pieces of this size.
const FRAME_PIECE: usize = 64 << 10;

/// A connection whose handshake is done, shared by its two halves.
pub(super) struct Session(Mutex<Connection>);

impl Session {
    /// Does the handshake, before `until`.
    ///
    /// # Errors
    /// `Tls` when one end refuses the other, `Io`.
    pub(super) fn establish(
        mut connection: Connection,
        socket: &TcpStream,
        until: Instant,
    ) -> Result<Self, WireError> {
        let mut raw = Deadline::new(socket, until);
        while connection.is_handshaking() {
            let (read, written) = connection.complete_io(&mut raw)?;
            if read == 0 && written == 0 {
                return Err(WireError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        // What is to be sent is bounded by who gives it: a batch, or a piece of a frame.
        connection.set_buffer_limit(None);
        Ok(Self(Mutex::new(connection)))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Secrets of this handshake alone, for `context`.
    pub(super) fn export(&self, label: &[u8], context: &[u8]) -> Result<[u8; 32], WireError> {
        let exported = self
            .lock()
            .export_keying_material([0; 32], label, Some(context))?;
        Ok(exported)
    }

    /// What encrypts.
    pub(super) fn suite(&self) -> Option<CipherSuite> {
        Some(self.lock().negotiated_cipher_suite()?.suite())
    }

    /// The connection itself.
    pub(super) fn into_inner(self) -> Connection {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The receiving half.
pub(super) struct Opening {
    session: Arc<Session>,
    /// Records as they came from the socket; what is not opened yet is in `begin..end`.
    wire: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Opening {
    pub(super) fn new(session: Arc<Session>, data: bool) -> Self {
        Self {
            session,
            wire: vec![0; if data { DATA_PIECE } else { CONTROL_PIECE }],
            begin: 0,
            end: 0,
        }
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Gives the next plaintext to `take`, which says how much of it it took; nothing at the peer's
    /// end.
    fn next<T>(
        &mut self,
        raw: &mut impl Read,
        take: impl FnOnce(&[u8]) -> (usize, T),
    ) -> io::Result<T> {
        loop {
            {
                let mut connection = self.session.lock();
                loop {
                    let mut reader = connection.reader();
                    match reader.fill_buf() {
                        Ok(plain) => {
                            let (taken, result) = take(plain);
                            reader.consume(taken);
                            return Ok(result);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                    if self.begin == self.end {
                        break;
                    }
                    let mut rest = &self.wire[self.begin..self.end];
                    connection.read_tls(&mut rest)?;
                    self.begin = self.end - rest.len();
                    connection.process_new_packets().map_err(broken)?;
                }
            }
            (self.begin, self.end) = (0, raw.read(&mut self.wire)?);
            if self.end == 0 {
                return Ok(take(&[]).1);
            }
        }
    }

    pub(super) fn read(&mut self, raw: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
        self.next(raw, |plain| {
            let taken = plain.len().min(bytes.len());
            bytes[..taken].copy_from_slice(&plain[..taken]);
            (taken, taken)
        })
    }

    /// Whether there is plaintext, the peer's end included, by at most one read of `raw`.
    pub(super) fn has_plaintext(&mut self, raw: &mut impl Read) -> io::Result<bool> {
        let mut once = Once(Some(raw));
        match self.next(&mut once, |_| (0, ())) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Receives the pages of `runs`, into guest memory.
    ///
    /// # Panics
    /// When a run reaches beyond the end of `memory`: runs are checked against the slot when they
    /// are decoded.
    pub(super) fn receive(
        &mut self,
        raw: &mut impl Read,
        memory: &HostView,
        runs: &[Run],
    ) -> io::Result<()> {
        for run in runs {
            let mut at = run.page as usize * PAGE;
            let end = at + run.pages as usize * PAGE;
            while at < end {
                let taken = self.next(raw, |plain| {
                    let taken = plain.len().min(end - at);
                    memory.write(at, &plain[..taken]);
                    (taken, taken)
                })?;
                if taken == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                at += taken;
            }
        }
        Ok(())
    }
}

/// One read, and then nothing more for now.
struct Once<'a, R>(Option<&'a mut R>);

impl<R: Read> Read for Once<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self.0.take() {
            Some(raw) => raw.read(bytes),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// The sending half.
pub(super) struct Sealing {
    session: Arc<Session>,
    /// Plaintext of the record that is being filled.
    record: Box<[u8; RECORD]>,
    /// Records on their way to the socket of a control connection.
    out: Vec<u8>,
}

impl Sealing {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            record: Box::new([0; RECORD]),
            out: Vec::new(),
        }
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Sends some of `bytes`.
    pub(super) fn write(&mut self, raw: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(FRAME_PIECE)];
        self.out.clear();
        {
            let mut connection = self.session.lock();
            connection.writer().write_all(bytes)?;
            while connection.wants_write() {
                connection.write_tls(&mut self.out)?;
            }
        }
        raw.write_all(&self.out)?;
        Ok(bytes.len())
    }

    /// Sends `head` and then the pages of `runs`, from guest memory.
    ///
    /// # Panics
    /// When a run reaches beyond the end of `memory`: runs are made from the slot's own bitmap.
    pub(super) fn send(
        &mut self,
        mut socket: &TcpStream,
        head: &[u8],
        memory: &HostView,
        runs: &[Run],
    ) -> io::Result<()> {
        let mut connection = self.session.lock();
        let (whole, rest) = head.split_at(head.len() / RECORD * RECORD);
        connection.writer().write_all(whole)?;
        self.record[..rest.len()].copy_from_slice(rest);
        let (mut filled, mut records) = (rest.len(), whole.len() / RECORD);
        for run in runs {
            let mut at = run.page as usize * PAGE;
            let end = at + run.pages as usize * PAGE;
            while at < end {
                let take = (RECORD - filled).min(end - at);
                // The guest may write the page meanwhile: the dirty log sends such a page again.
                memory.read(at, &mut self.record[filled..filled + take]);
                at += take;
                filled += take;
                if filled == RECORD {
                    connection.writer().write_all(&self.record[..])?;
                    (filled, records) = (0, records + 1);
                    if records >= BATCH {
                        flush(&mut connection, &mut socket)?;
                        records = 0;
                    }
                }
            }
        }
        connection.writer().write_all(&self.record[..filled])?;
        flush(&mut connection, &mut socket)
    }
}

/// Writes all that is encrypted, many records a call.
fn flush(connection: &mut Connection, socket: &mut impl Write) -> io::Result<()> {
    while connection.wants_write() {
        match connection.write_tls(socket) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
