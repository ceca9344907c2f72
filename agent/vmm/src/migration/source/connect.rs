//! Opens the source's connections, introduces them, and measures what lies between: a limit on
//! downtime that cannot be met is refused here.
//!
//! The [`Breaker`] watches each before its first read, so a cancel ends whatever blocks on it. Of
//! the control connection only the reading ends: it can still say Abort.

use std::{
    net::Shutdown,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, model::PAGE_SIZE, v1::migration_decision::Action};

use super::{
    super::{
        breaker::Breaker,
        channel::{Kernel, Opened, least},
        convergence::Convergence,
        estimate::{Estimator, Prediction},
        kernel,
        sender::{BandwidthPacer, Counters, Sender, Shared},
        socket::{self, CONNECT_TIMEOUT, IO_TIMEOUT, broken_off, configure},
        wire::{FrameReader, FrameWriter, Hello, Kind, StreamRole, WireError},
    },
    link::{LetIn, Link},
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
        let mut kernel = self.asks_kernel();
        let control = self.open(StreamRole::Control, &breaker, &mut kernel)?;
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
        let mut paths = Vec::new();
        for number in 0..self.params.streams {
            let role = StreamRole::Data(number as u16);
            let stream = self.open(role, &breaker, &mut kernel)?;
            paths.push(stream.outlet.path());
            let sender = Sender::spawn(
                number as usize,
                stream.outlet,
                stream.writer,
                Arc::clone(&link.shared),
                report.clone(),
            )
            .map_err(|error| self.unreachable(&error))?;
            link.senders.push(sender);
        }
        let why_not = match &kernel {
            Kernel::Ask => "",
            Kernel::Not(why) => why.as_str(),
        };
        let path = least(&paths, why_not);
        self.side.update(|progress| progress.path = path);
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
        kernel: &mut Kernel,
    ) -> Result<LetIn, ApiError> {
        let mut attempt = 1;
        loop {
            let asked = kernel.clone();
            match self.introduce(role, breaker, kernel) {
                Err(WireError::Io(_)) if breaker.is_broken() => {
                    return Err(self.unreachable(&broken_off()));
                }
                // The kernel began and did not go on: once more, without it.
                Err(WireError::Io(error)) if asked != *kernel => {
                    tracing::debug!(%error, ?role, "page streams go without the kernel's TLS");
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

    /// Connects and shows what is wanted.
    fn introduce(
        &self,
        role: StreamRole,
        breaker: &Breaker,
        kernel: &mut Kernel,
    ) -> Result<LetIn, WireError> {
        let socket = socket::connect(self.address, breaker)?;
        let how = match role {
            StreamRole::Control => Shutdown::Read,
            StreamRole::Data(_) => Shutdown::Both,
        };
        breaker.watch(&socket, how)?;
        let greeted = configure(&socket, matches!(role, StreamRole::Data(_)))
            .map_err(WireError::from)
            .and_then(|()| {
                let until = Instant::now() + CONNECT_TIMEOUT;
                self.channel.open(socket, role, kernel, until)
            })
            .and_then(|opened| self.greet(opened, role));
        if greeted.is_err() {
            breaker.forget_last();
        }
        greeted
    }

    fn greet(&self, opened: Opened, role: StreamRole) -> Result<LetIn, WireError> {
        let Opened {
            mut inlet,
            mut outlet,
            shows,
        } = opened;
        // The handshake had a deadline of its own.
        inlet.socket().set_read_timeout(Some(IO_TIMEOUT))?;
        inlet.socket().set_write_timeout(Some(IO_TIMEOUT))?;
        let protocol = self.versions.protocol;
        let mut writer = FrameWriter::new(protocol, self.epoch);
        let mut reader = FrameReader::new(protocol, self.epoch);
        let hello = Hello { shows, role };
        writer.send(&mut outlet, Kind::Hello, 0, &hello.encode())?;
        let (header, _) = reader.frame(&mut inlet)?;
        if header.kind != Kind::HelloAck {
            return Err(WireError::corrupt(
                "kind",
                format!("{:?} to Hello", header.kind),
            ));
        }
        Ok(LetIn {
            inlet,
            outlet,
            writer,
            reader,
        })
    }

    /// Whether the kernel is asked to encrypt pages.
    fn asks_kernel(&self) -> Kernel {
        let bytes = self.machine.memory().table().pages() * PAGE_SIZE;
        if bytes / u64::from(self.params.streams.max(1)) > kernel::MOST_BYTES {
            return Kernel::Not(format!(
                "the VM has more than {} GiB for each stream, and the kernel does not change keys",
                kernel::MOST_BYTES >> 30
            ));
        }
        Kernel::Ask
    }
}

/// Nobody listens: trying again soon does not help.
fn is_refusal(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionRefused
}
