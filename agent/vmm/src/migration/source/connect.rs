//! Opens the source's connections, introduces them, and measures what lies between: a limit on
//! downtime that cannot be met is refused here.
//!
//! The [`Breaker`] watches each before its first read, so a cancel ends whatever blocks on it. Of
//! the control connection only the reading ends: it can still say Abort.

use std::{
    net::{Shutdown, TcpStream},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, v1::migration_decision::Action};

use super::{
    super::{
        breaker::Breaker,
        convergence::Convergence,
        estimate::{Estimator, Prediction},
        sender::{BandwidthPacer, Counters, Sender, Shared},
        socket::{self, broken_off, configure},
        wire::{FrameReader, FrameWriter, Hello, Kind, StreamRole, WireError},
    },
    link::Link,
    measure::{Meter, unreachable_limit},
    parts::SourceDriver,
    work::{Course, Next, Work},
};
use crate::handover::payload;

/// A connection that is lost before it was let in is tried again, so many times in all.
const ATTEMPTS: u32 = 5;
/// The pause before the second attempt; each later one is longer by as much.
const RETRY: Duration = Duration::from_millis(50);

impl SourceDriver {
    /// Opens the control connection and every data stream, introduces each, and waits until the
    /// destination has its memory. What is open is in `work` even when the rest failed.
    pub(super) fn connect(&self, work: &mut Work) -> Result<(), ApiError> {
        let breaker = Arc::clone(&work.breaker);
        let begun = Instant::now();
        let control = self.open(StreamRole::Control, &breaker)?;
        let introduced = begun.elapsed();
        let shared = Arc::new(Shared {
            counters: Counters::default(),
            breaker: Arc::clone(&breaker),
            pacer: self.params.max_bandwidth.map(BandwidthPacer::new),
            filter: Arc::clone(&self.filter),
        });
        let (report, reports) = mpsc::channel();
        let link = work.link.insert(Link::new(control, shared, reports));
        link.introduced = Some(introduced);
        for number in 0..self.params.streams {
            let (stream, writer, _) = self.open(StreamRole::Data(number as u16), &breaker)?;
            let sender = Sender::spawn(
                number as usize,
                stream,
                writer,
                Arc::clone(&link.shared),
                report.clone(),
            )
            .map_err(|error| self.unreachable(&error))?;
            link.senders.push(sender);
        }
        let estimator = Estimator::new(self.remembered.as_ref(), self.machine.last_pause());
        let mut course = Course {
            convergence: Convergence::new(self.params, estimator),
            meter: Meter::default(),
            iteration: 0,
            next: Next::Bulk,
            predicted: Prediction::default(),
            forced: false,
            went_back: 0,
        };
        self.measure_first(link, &mut course.meter, &mut course.convergence)?;
        // Before the destination takes its memory, and before a page is sent.
        if let Some((cause, least)) = course.convergence.out_of_reach() {
            self.side.decide(0, Action::GiveUp, cause.clone());
            return Err(unreachable_limit(&cause, &least, &self.params));
        }
        work.course = Some(course);
        link.send(
            Kind::SlotTable,
            0,
            &payload::encode_slots(&self.machine.memory().table()),
        )?;
        // The guest runs undisturbed meanwhile: dirty logging is not on yet.
        while link.receive(Kind::Populated)?.0 < 100 {
            if work.begun.elapsed() > self.params.max_total_time {
                return Err(ApiError::new(
                    Reason::CompletionTimeout,
                    "max_total_time passed while the destination populated its memory",
                )
                .with("advice", "raise --max-total-time"));
            }
        }
        Ok(())
    }

    fn unreachable(&self, error: &std::io::Error) -> ApiError {
        ApiError::new(
            Reason::PeerUnreachable,
            format!("destination's data port {}: {error}", self.address),
        )
        .with("address", self.address)
    }

    /// One connection. A crowd of peers on the port may push a newcomer out before it was heard;
    /// nothing was sent yet, so trying again is free.
    fn open(
        &self,
        role: StreamRole,
        breaker: &Breaker,
    ) -> Result<(TcpStream, FrameWriter, FrameReader), ApiError> {
        let mut attempt = 1;
        loop {
            match self.introduce(role, breaker) {
                Err(WireError::Io(_)) if breaker.is_broken() => {
                    return Err(self.unreachable(&broken_off()));
                }
                Err(WireError::Io(error)) if attempt < ATTEMPTS && !is_refusal(&error) => {
                    tracing::debug!(%error, ?role, attempt, "introduction to the destination failed");
                    breaker.sleep(RETRY * attempt);
                    attempt += 1;
                }
                Err(WireError::Io(error)) => return Err(self.unreachable(&error)),
                Err(error) => return Err(error.into()),
                Ok(connection) => return Ok(connection),
            }
        }
    }

    /// Connects and shows the ticket.
    fn introduce(
        &self,
        role: StreamRole,
        breaker: &Breaker,
    ) -> Result<(TcpStream, FrameWriter, FrameReader), WireError> {
        let mut stream = socket::connect(self.address, breaker)?;
        let how = match role {
            StreamRole::Control => Shutdown::Read,
            StreamRole::Data(_) => Shutdown::Both,
        };
        breaker.watch(&stream, how)?;
        match self.greet(&mut stream, role) {
            Ok((writer, reader)) => Ok((stream, writer, reader)),
            Err(error) => {
                breaker.forget_last();
                Err(error)
            }
        }
    }

    fn greet(
        &self,
        stream: &mut TcpStream,
        role: StreamRole,
    ) -> Result<(FrameWriter, FrameReader), WireError> {
        configure(stream, matches!(role, StreamRole::Data(_)))?;
        let protocol = self.versions.protocol;
        let mut writer = FrameWriter::new(protocol, self.epoch);
        let mut reader = FrameReader::new(protocol, self.epoch);
        let hello = Hello {
            ticket: self.ticket,
            role,
        };
        writer.send(stream, Kind::Hello, 0, &hello.encode())?;
        let (header, _) = reader.frame(stream)?;
        if header.kind != Kind::HelloAck {
            return Err(WireError::corrupt(
                "kind",
                format!("{:?} to Hello", header.kind),
            ));
        }
        Ok((writer, reader))
    }
}

/// Nobody listens: trying again soon does not help.
fn is_refusal(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionRefused
}
