//! The source's connections: opened, introduced, and closed again.

use std::{
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason};

use super::{
    super::{
        sender::{BandwidthPacer, Counters, Report, Sender, Shared},
        socket::{CONNECT_TIMEOUT, configure},
        wire::{FrameReader, FrameWriter, Hello, Kind, StreamRole, WireError},
    },
    parts::SourceDriver,
};
use crate::handover::payload;

/// A connection that is lost before it was let in is tried again, so many times in all.
const ATTEMPTS: u32 = 5;
/// The pause before the second attempt; each later one is longer by as much.
const RETRY: Duration = Duration::from_millis(50);
/// After a stream broke, this long for the destination's own word on why.
const LAST_WORD: Duration = Duration::from_millis(500);

/// The connections of one attempt. Dropping ends the senders.
pub(super) struct Link {
    control: TcpStream,
    writer: FrameWriter,
    reader: FrameReader,
    pub(super) senders: Vec<Sender>,
    pub(super) reports: mpsc::Receiver<Report>,
    pub(super) shared: Arc<Shared>,
}

impl SourceDriver {
    /// Opens the control connection and every data stream, introduces each, and waits until the
    /// destination has its memory.
    pub(super) fn connect(&self, begun: Instant) -> Result<Link, ApiError> {
        let unreachable = |error: std::io::Error| {
            ApiError::new(
                Reason::PeerUnreachable,
                format!("destination's data port {}: {error}", self.address),
            )
            .with("address", self.address)
        };
        let (control, writer, reader) = self.open(StreamRole::Control)?;
        let shared = Arc::new(Shared {
            counters: Counters::default(),
            stop: AtomicBool::new(false),
            pacer: self.params.max_bandwidth.map(BandwidthPacer::new),
            filter: Arc::clone(&self.filter),
        });
        let (report, reports) = mpsc::channel();
        let mut senders = Vec::new();
        let ears = control.try_clone().map_err(unreachable)?;
        let mut streams = Vec::new();
        for number in 0..self.params.streams {
            let (stream, writer, _) = self.open(StreamRole::Data(number as u16))?;
            streams.push(stream.try_clone().map_err(unreachable)?);
            let sender = Sender::spawn(
                number as usize,
                stream,
                writer,
                Arc::clone(&shared),
                report.clone(),
            )
            .map_err(unreachable)?;
            senders.push(sender);
        }
        let stop = Arc::clone(&shared);
        self.side.on_interrupt(move || {
            stop.stop.store(true, Ordering::Relaxed);
            // A stream that is closed already needs no shutdown. The control connection can still
            // say Abort.
            drop(ears.shutdown(Shutdown::Read));
            for stream in &streams {
                drop(stream.shutdown(Shutdown::Both));
            }
        });
        let mut link = Link {
            control,
            writer,
            reader,
            senders,
            reports,
            shared,
        };
        link.send(
            Kind::SlotTable,
            0,
            &payload::encode_slots(&self.machine.memory().table()),
        )?;
        // The guest runs undisturbed meanwhile: dirty logging is not on yet.
        while link.receive(Kind::Populated)?.0 < 100 {
            if begun.elapsed() > self.params.max_total_time {
                return Err(ApiError::new(
                    Reason::CompletionTimeout,
                    "max_total_time passed while the destination populated its memory",
                )
                .with("advice", "raise --max-total-time"));
            }
        }
        Ok(link)
    }

    /// One connection. A crowd of peers on the port may push a newcomer out before it was heard;
    /// nothing was sent yet, so trying again is free.
    fn open(&self, role: StreamRole) -> Result<(TcpStream, FrameWriter, FrameReader), ApiError> {
        let mut attempt = 1;
        loop {
            match self.introduce(role) {
                Err(WireError::Io(error)) if attempt < ATTEMPTS && !is_refusal(&error) => {
                    tracing::debug!(%error, ?role, attempt, "introduction to the destination failed");
                    std::thread::sleep(RETRY * attempt);
                    attempt += 1;
                }
                Err(WireError::Io(error)) => {
                    return Err(ApiError::new(
                        Reason::PeerUnreachable,
                        format!("destination's data port {}: {error}", self.address),
                    )
                    .with("address", self.address));
                }
                Err(error) => return Err(error.into()),
                Ok(connection) => return Ok(connection),
            }
        }
    }

    /// Connects and shows the ticket.
    fn introduce(
        &self,
        role: StreamRole,
    ) -> Result<(TcpStream, FrameWriter, FrameReader), WireError> {
        let mut stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)?;
        configure(&stream, matches!(role, StreamRole::Data(_)))?;
        let protocol = self.versions.protocol;
        let mut writer = FrameWriter::new(protocol, self.epoch);
        let mut reader = FrameReader::new(protocol, self.epoch);
        let hello = Hello {
            ticket: self.ticket,
            role,
        };
        writer.send(&mut stream, Kind::Hello, 0, &hello.encode())?;
        let (header, _) = reader.frame(&mut stream)?;
        if header.kind != Kind::HelloAck {
            return Err(WireError::corrupt(
                "kind",
                format!("{:?} to Hello", header.kind),
            ));
        }
        Ok((stream, writer, reader))
    }
}

/// Nobody listens: trying again soon does not help.
fn is_refusal(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionRefused
}

impl Link {
    pub(super) fn send(&mut self, kind: Kind, count: u32, payload: &[u8]) -> Result<(), ApiError> {
        Ok(self.writer.send(&mut self.control, kind, count, payload)?)
    }

    /// The next control frame, which must be `kind`: its count and payload.
    pub(super) fn receive(&mut self, kind: Kind) -> Result<(u32, Vec<u8>), ApiError> {
        let (header, payload) = self.reader.frame(&mut self.control)?;
        if header.kind != kind {
            return Err(WireError::corrupt(
                "kind",
                format!("{:?}, expected {kind:?}", header.kind),
            )
            .into());
        }
        Ok((header.count, payload))
    }

    /// When a data stream breaks, the destination may have said why on the control connection.
    pub(super) fn last_word(&mut self, error: WireError) -> ApiError {
        // If the timeout cannot be set the read ends with the connection, which is breaking.
        drop(self.control.set_read_timeout(Some(LAST_WORD)));
        match self.reader.frame(&mut self.control) {
            Err(WireError::Aborted(theirs)) => theirs,
            _ => error.into(),
        }
    }

    pub(super) fn close(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(self.control.shutdown(Shutdown::Write));
        for sender in self.senders {
            sender.join();
        }
    }
}
