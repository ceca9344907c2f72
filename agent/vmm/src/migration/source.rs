//! The source's side: precopy, switchover, handover. One coordinator thread and one sender thread a stream.
//!
//! # Order of things
//! 1. Connect; wait until the destination's memory is populated; dirty logging on through a cursor of its own; bulk pass; then passes over what the cursor harvests. A batch is
//!    acknowledged only when the destination has the pass that carried it.
//! 2. [`Convergence`] decides after each pass. On switchover the vCPUs stop, the cursor is harvested again without having
//!    acknowledged the last batch, so the final pass has that batch and all that came since.
//! 3. vCPU state goes over; the destination journals PREPARED and says READY.
//! 4. The gate closes (no cancel any more), the machine journals RELINQUISHED: **the point of no return**; COMMIT is sent.
//! 5. RESUMED ends the downtime. What may follow (digest of the frozen memory) costs the guest nothing.
//!
//! # Undoing
//! Any failure before 4 ends in [`undo`]: vCPUs resumed, dirty logging off, the destination told, FAILED or CANCELLED
//! recorded. After 4 nothing is undone: when the answer to COMMIT is lost the side stays RELINQUISHED, with the VM stopped
//! here for ever, until the server releases it.

use std::{
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{CursorName, MigrationParams, OnTimeout, Verify, proto_duration},
    v1::{self, TransferPhase, migration_decision::Action},
};

use super::{
    convergence::{Convergence, Finished, Verdict},
    cpu_time::thread_cpu_time,
    sender::{Counters, Iteration, Pacer, Report, Sender, Shared},
    socket::{CONNECT_TIMEOUT, configure},
    wire::{FrameReader, FrameWriter, Hello, Kind, Role, TICKET, WireError, encode_abort},
};
use crate::{
    handover::{
        payload::{Resumed, VmState, encode_slots},
        side::Side,
    },
    machine::Machine,
    memory::{DirtyBatch, MemoryDigest},
};

/// Progress is published this often while a pass runs.
const PUBLISH: Duration = Duration::from_millis(100);
/// A connection that is lost before it was let in is tried again, so many times in all.
const ATTEMPTS: u32 = 5;
/// The pause before the second attempt; each later one is longer by as much.
const RETRY: Duration = Duration::from_millis(50);
/// After a stream broke, this long for the destination's own word on why.
const LAST_WORD: Duration = Duration::from_millis(500);

/// What the source's side needs.
pub(crate) struct Source {
    pub(crate) machine: Arc<Machine>,
    pub(crate) side: Arc<Side>,
    pub(crate) address: SocketAddr,
    pub(crate) ticket: [u8; TICKET],
    pub(crate) params: MigrationParams,
    pub(crate) epoch: u64,
    #[cfg(test)]
    pub(crate) omit: Option<(u32, u32, u32)>,
}

/// When things began.
#[derive(Clone, Copy)]
struct Started {
    /// This side, with the wait for the destination's memory.
    migration: Instant,
    /// The first page.
    transfer: Instant,
}

/// The connections of one attempt. Dropping ends the senders.
struct Link {
    control: TcpStream,
    writer: FrameWriter,
    reader: FrameReader,
    senders: Vec<Sender>,
    reports: mpsc::Receiver<Report>,
    shared: Arc<Shared>,
}

impl Source {
    /// The body of the coordinator thread: runs the side to a terminal phase, or to RELINQUISHED.
    pub(crate) fn run(self) {
        let mut link = None;
        let result = self.transfer(&mut link, Instant::now());
        if let Err(error) = result {
            self.undo(&error, link.as_mut());
        }
        if let Some(link) = link {
            link.close();
        }
        if self.side.phase() == TransferPhase::Relinquished {
            // No answer to COMMIT: what is known is kept all the same.
            self.side
                .keep_record(self.machine.dir(), &self.side.transfer());
        }
    }

    fn cursor(&self) -> Result<CursorName, ApiError> {
        // Cursors of API callers have a name space of their own: a caller's of the same name is another cursor.
        CursorName::from_id("slat-migration")
    }

    fn transfer(&self, slot: &mut Option<Link>, started: Instant) -> Result<(), ApiError> {
        let link = slot.insert(self.connect(started)?);
        let started = Started {
            migration: started,
            transfer: Instant::now(),
        };
        let cursor = self.cursor()?;
        self.machine.dirty().attach(&cursor)?;
        self.side.enter(TransferPhase::Precopy);
        let mut convergence = Convergence::new(self.params);
        let mut pass = Iteration::bulk(self.machine.memory().table().slots());
        let mut acknowledge = None;
        loop {
            let iteration = pass.number;
            let (bytes, duration) = self.send_pass(link, pass, false, &convergence, started)?;
            if let Some(batch) = acknowledge.take() {
                self.machine.dirty().acknowledge(&cursor, batch)?;
            }
            let batch = self.machine.dirty().harvest(&cursor)?;
            let dirty_bytes = batch.pages * slat_proto::model::PAGE_SIZE;
            let verdict = convergence.judge(&Finished {
                iteration,
                bytes,
                duration,
                dirty_bytes,
                elapsed: started.migration.elapsed(),
            });
            self.note_dirty(iteration, &batch, duration, &convergence);
            match verdict {
                Verdict::Continue(cause) => self.side.decide(iteration, Action::Continue, cause),
                Verdict::Switchover(cause) => {
                    self.side.decide(iteration, Action::Switchover, cause);
                    return self.switchover(link, &cursor, iteration + 1, &convergence, started);
                }
                Verdict::ForceSwitchover(cause) => {
                    self.side.decide(iteration, Action::ForceSwitchover, cause);
                    return self.switchover(link, &cursor, iteration + 1, &convergence, started);
                }
                Verdict::TimedOut(cause) => {
                    self.side.decide(iteration, Action::GiveUp, cause.clone());
                    return Err(ApiError::new(Reason::CompletionTimeout, cause)
                        .with("advice", "raise --max-total-time or --max-downtime, or use --on-timeout force-switchover"));
                }
                Verdict::NotConverging(cause) => {
                    self.side.decide(iteration, Action::GiveUp, cause.clone());
                    return Err(ApiError::new(Reason::NotConverging, cause)
                        .with("dirty_bytes", dirty_bytes)
                        .with("bandwidth_bytes_per_second", convergence.bandwidth().unwrap_or(0.0) as u64)
                        .with("advice", "raise --max-downtime or --streams, or use --on-timeout force-switchover"));
                }
            }
            acknowledge = Some(batch.batch);
            pass = self.pass_of(iteration + 1, batch);
        }
    }

    /// Opens the control connection and every data stream, and introduces each.
    fn connect(&self, begun: Instant) -> Result<Link, ApiError> {
        let unreachable = |error: std::io::Error| {
            ApiError::new(
                Reason::PeerUnreachable,
                format!("destination's data port {}: {error}", self.address),
            )
            .with("address", self.address)
        };
        let open = |role: Role| {
            // A crowd of strangers on the port may push a newcomer out before it was heard; nothing was sent yet, so trying
            // again is free.
            let mut attempt = 1;
            loop {
                match self.introduce(role) {
                    Err(WireError::Io(error)) if attempt < ATTEMPTS && !is_refusal(&error) => {
                        tracing::debug!(%error, ?role, attempt, "introduction to the destination failed");
                        std::thread::sleep(RETRY * attempt);
                        attempt += 1;
                    }
                    Err(WireError::Io(error)) => return Err(unreachable(error)),
                    Err(error) => return Err(error.into()),
                    Ok(connection) => return Ok(connection),
                }
            }
        };
        let (control, writer, reader) = open(Role::Control)?;
        let shared = Arc::new(Shared {
            counters: Counters::default(),
            stop: AtomicBool::new(false),
            pacer: self.params.max_bandwidth.map(Pacer::new),
            #[cfg(test)]
            filter: super::omit::page(self.omit),
            #[cfg(not(test))]
            filter: Box::new(super::sender::EveryPage),
        });
        let (report, reports) = mpsc::channel();
        let mut senders = Vec::new();
        let ears = control.try_clone().map_err(unreachable)?;
        let mut streams = Vec::new();
        for number in 0..self.params.streams {
            let (stream, writer, _) = open(Role::Data(number as u16))?;
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
            // A stream that is closed already needs no shutdown. The control connection can still say Abort.
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
            &encode_slots(&self.machine.memory().table()),
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

    /// Connects and shows the ticket.
    fn introduce(&self, role: Role) -> Result<(TcpStream, FrameWriter, FrameReader), WireError> {
        let mut stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)?;
        configure(&stream, matches!(role, Role::Data(_)))?;
        let mut writer = FrameWriter::new(self.epoch);
        let mut reader = FrameReader::new(self.epoch);
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

    fn pass_of(&self, iteration: u32, batch: DirtyBatch) -> Iteration {
        Iteration::of(iteration, batch, &self.machine.memory().table())
    }

    /// Sends a pass on all streams and waits until the destination has it. Returns its bytes of pages and its duration.
    fn send_pass(
        &self,
        link: &mut Link,
        pass: Iteration,
        last: bool,
        convergence: &Convergence,
        started: Started,
    ) -> Result<(u64, Duration), ApiError> {
        let iteration = pass.number;
        let total = pass.bytes();
        let shared = Arc::clone(&link.shared);
        let counters = &shared.counters;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let before = (
            load(&counters.bytes),
            load(&counters.pages_normal),
            load(&counters.pages_zero),
        );
        let begin = Instant::now();
        self.side.update(|progress| {
            progress.iteration = iteration;
            progress.remaining_bytes = total;
            progress.expected_downtime = Some(proto_duration(convergence.expected_downtime(total)));
        });
        let pass = Arc::new(pass);
        for sender in &link.senders {
            sender.start(&pass);
        }
        let mut working = link.senders.len();
        while working > 0 {
            match link.reports.recv_timeout(PUBLISH) {
                Ok((_, Ok(()))) => working -= 1,
                Ok((_, Err(error))) => return Err(link.last_word(error)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(ApiError::new(Reason::Internal, "the sender threads ended"));
                }
            }
            let sent_pages =
                load(&counters.pages_normal) - before.1 + load(&counters.pages_zero) - before.2;
            let sent = sent_pages * slat_proto::model::PAGE_SIZE;
            let bytes = load(&counters.bytes) - before.0;
            let seconds = begin.elapsed().as_secs_f64().max(1e-6);
            self.side.update(|progress| {
                progress.remaining_bytes = total.saturating_sub(sent);
                progress.bytes_transferred = load(&counters.bytes);
                progress.pages_normal = load(&counters.pages_normal);
                progress.pages_zero = load(&counters.pages_zero);
                progress.throughput_bytes_per_second = (bytes as f64 / seconds) as u64;
                progress.transfer_time = Some(proto_duration(started.transfer.elapsed()));
                if !last && convergence.bandwidth().is_some() {
                    progress.expected_downtime = Some(proto_duration(
                        convergence.expected_downtime(total.saturating_sub(sent)),
                    ));
                }
            });
            if !last
                && self.params.on_timeout == OnTimeout::Cancel
                && started.migration.elapsed() > self.params.max_total_time
            {
                // Convergence is judged at a pass's end, but time that is up is up: on a slow wire a pass may be hours.
                let cause = format!(
                    "max_total_time {:.1} s passed during pass {iteration}",
                    self.params.max_total_time.as_secs_f64()
                );
                self.side.decide(iteration, Action::GiveUp, cause.clone());
                return Err(ApiError::new(Reason::CompletionTimeout, cause).with(
                    "advice",
                    "raise --max-total-time or the bandwidth, or use --on-timeout force-switchover",
                ));
            }
        }
        let header = link.receive(Kind::IterAck)?;
        if header.0 != iteration {
            return Err(WireError::corrupt(
                "iteration",
                format!("{} acknowledged, {iteration} sent", header.0),
            )
            .into());
        }
        let duration = begin.elapsed();
        let bytes = load(&counters.bytes) - before.0;
        let normal = load(&counters.pages_normal) - before.1;
        self.side.update(|progress| {
            progress.iterations.push(v1::MigrationIteration {
                iteration,
                bytes_transferred: bytes,
                pages_normal: normal,
                pages_zero: load(&counters.pages_zero) - before.2,
                duration: Some(proto_duration(duration)),
                r#final: last,
                remaining_bytes_start: total,
                ..Default::default()
            });
        });
        Ok((bytes, duration))
    }

    fn note_dirty(
        &self,
        iteration: u32,
        batch: &DirtyBatch,
        duration: Duration,
        convergence: &Convergence,
    ) {
        let dirty_bytes = batch.pages * slat_proto::model::PAGE_SIZE;
        let expected = convergence.expected_downtime(dirty_bytes);
        self.side.update(|progress| {
            progress.remaining_bytes = dirty_bytes;
            progress.dirty_rate_bytes_per_second =
                (dirty_bytes as f64 / duration.as_secs_f64().max(1e-6)) as u64;
            progress.expected_downtime = Some(proto_duration(expected));
            if let Some(last) = progress
                .iterations
                .last_mut()
                .filter(|last| last.iteration == iteration)
            {
                last.dirty_pages = batch.pages;
                last.expected_downtime = Some(proto_duration(expected));
            }
        });
    }

    /// From the stop of the vCPUs to RESUMED.
    fn switchover(
        &self,
        link: &mut Link,
        cursor: &CursorName,
        iteration: u32,
        convergence: &Convergence,
        started: Started,
    ) -> Result<(), ApiError> {
        let blackout = Instant::now();
        let left = self.machine.enter_switchover(self.side.migration())?;
        let paused = blackout.elapsed();
        self.side.enter(TransferPhase::Switchover);
        let batch = self.machine.dirty().harvest(cursor)?;
        self.send_pass(
            link,
            self.pass_of(iteration, batch),
            true,
            convergence,
            started,
        )?;
        let copied = blackout.elapsed();

        let digest = (self.params.verify == Verify::BeforeCommit).then(|| self.digest());
        let vcpus = self.machine.backend()?.save_state().map_err(|error| {
            ApiError::new(
                Reason::StateSave,
                format!("vCPU state could not be read: {error}"),
            )
        })?;
        link.send(
            Kind::State,
            0,
            &VmState {
                left,
                digest: digest.clone(),
                vcpus,
            }
            .encode(),
        )?;
        link.receive(Kind::Ready)?;
        let ready = blackout.elapsed();

        if !self.side.close_gate() {
            return Err(ApiError::new(
                Reason::CancelledByUser,
                "cancelled before the commit",
            ));
        }
        match self.machine.relinquish(self.side.migration()) {
            Ok(()) => {}
            // Not known to be durable, but this process will never run the VM again, and its memory dies with it: going on is
            // the only way for the VM to run anywhere.
            Err(error) if error.reason == Reason::InDoubt => {
                tracing::error!(%error, migration = %self.side.migration(), "RELINQUISHED may not be durable");
            }
            // Nothing was journalled: the VM is still owned here.
            Err(error) => return Err(error),
        }
        self.side.enter(TransferPhase::Relinquished);
        let committed = blackout.elapsed();
        let resumed = link
            .send(Kind::Commit, 0, &[])
            .and_then(|()| link.receive(Kind::Resumed))
            .and_then(|(_, payload)| Resumed::decode(&payload).map_err(ApiError::from));
        let downtime = blackout.elapsed();
        let resumed = match resumed {
            Ok(resumed) => resumed,
            Err(error) => {
                tracing::warn!(%error, migration = %self.side.migration(),
                    "no answer to COMMIT: the VM stays stopped here; the destination asks the journal");
                return Ok(());
            }
        };
        self.side.update(|progress| {
            progress.remaining_bytes = 0;
            // A VM that could not be started there is still down.
            progress.downtime = resumed.as_it_was.then(|| proto_duration(downtime));
            progress.downtime_breakdown = Some(v1::DowntimeBreakdown {
                pause: Some(proto_duration(paused)),
                final_copy: Some(proto_duration(copied - paused)),
                state: Some(proto_duration(ready - copied)),
                commit: Some(proto_duration(committed - ready)),
                resume: Some(proto_duration(downtime - committed)),
            });
            progress.transfer_time = Some(proto_duration(started.transfer.elapsed()));
            let cpu = link.shared.counters.cpu_nanos.load(Ordering::Relaxed);
            progress.cpu_time = Some(proto_duration(
                Duration::from_nanos(cpu) + thread_cpu_time(),
            ));
        });
        self.verify(digest, &resumed);
        // The memory is another's now: nobody here reads its dirty log again.
        if let Err(error) = self.machine.dirty().detach(cursor) {
            tracing::debug!(%error, "dirty logging of a relinquished VM");
        }
        self.side
            .end(self.machine.dir(), TransferPhase::Completed, None);
        Ok(())
    }

    fn digest(&self) -> MemoryDigest {
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(8);
        MemoryDigest::of(&self.machine.memory().table(), threads)
    }

    /// Compares the frozen memory's digest with what the destination had when it resumed.
    fn verify(&self, before: Option<MemoryDigest>, resumed: &Resumed) {
        let ours = match self.params.verify {
            Verify::None => return,
            Verify::BeforeCommit => before,
            Verify::AfterCommit => {
                self.side
                    .update(|progress| progress.set_verification(v1::Verification::Pending));
                Some(self.digest())
            }
        };
        let ours: Vec<(u32, u128)> = ours
            .iter()
            .flat_map(|digest| &digest.slots)
            .map(|slot| (slot.slot, slot.digest))
            .collect();
        let verdict = if ours == resumed.digests {
            v1::Verification::Match
        } else {
            tracing::error!(migration = %self.side.migration(), "memory digests differ after the commit");
            v1::Verification::Mismatch
        };
        self.side
            .update(|progress| progress.set_verification(verdict));
    }

    /// Before the point of no return: the VM goes on here, and everything is as before.
    fn undo(&self, error: &ApiError, link: Option<&mut Link>) {
        let phase = match self.side.phase() {
            TransferPhase::Preparing => v1::MigrationPhase::Preparing,
            TransferPhase::Precopy => v1::MigrationPhase::PrecopyActive,
            _ => v1::MigrationPhase::Switchover,
        };
        // First the guest: it may be stopped.
        if let Err(error) = self.machine.end_outgoing(self.side.migration()) {
            tracing::error!(%error, migration = %self.side.migration(), "the VM could not be resumed");
        }
        match self
            .cursor()
            .and_then(|cursor| self.machine.dirty().detach(&cursor))
        {
            Ok(()) => {}
            Err(error) if error.reason == Reason::NoSuchCursor => {}
            Err(error) => {
                tracing::error!(%error, migration = %self.side.migration(), "dirty logging could not be turned off");
            }
        }
        let (ends_in, recorded) = match self.side.cancel_cause() {
            Some(Err(cancelled)) => {
                self.side
                    .decide(self.iteration(), Action::Cancel, "the user cancelled");
                (
                    TransferPhase::Cancelled,
                    cancelled.to_migration_error(phase, "source"),
                )
            }
            Some(Ok(elsewhere)) => (TransferPhase::Failed, elsewhere),
            None => (
                TransferPhase::Failed,
                error.to_migration_error(phase, "source"),
            ),
        };
        tracing::warn!(migration = %self.side.migration(), reason = recorded.reason, message = recorded.message,
            "migration ended before the commit; the VM stays here");
        if let Some(link) = link {
            let told = ApiError::new(
                Reason::parse(&recorded.reason).unwrap_or(Reason::Internal),
                recorded.message.clone(),
            );
            // The connection may be what failed; the destination also learns it from the server.
            drop(
                link.writer
                    .send(&mut link.control, Kind::Abort, 0, &encode_abort(&told)),
            );
        }
        self.side.update(|progress| progress.remaining_bytes = 0);
        self.side.end(self.machine.dir(), ends_in, Some(recorded));
    }

    fn iteration(&self) -> u32 {
        self.side
            .transfer()
            .progress
            .map_or(0, |progress| progress.iteration)
    }
}

/// Nobody listens: trying again soon does not help.
fn is_refusal(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionRefused
}

impl Link {
    fn send(&mut self, kind: Kind, count: u32, payload: &[u8]) -> Result<(), ApiError> {
        Ok(self.writer.send(&mut self.control, kind, count, payload)?)
    }

    /// The next control frame, which must be `kind`: its count and payload.
    fn receive(&mut self, kind: Kind) -> Result<(u32, Vec<u8>), ApiError> {
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
    fn last_word(&mut self, error: WireError) -> ApiError {
        // If the timeout cannot be set the read ends with the connection, which is breaking.
        drop(self.control.set_read_timeout(Some(LAST_WORD)));
        match self.reader.frame(&mut self.control) {
            Err(WireError::Aborted(theirs)) => theirs,
            _ => error.into(),
        }
    }

    fn close(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(self.control.shutdown(Shutdown::Write));
        for sender in self.senders {
            sender.join();
        }
    }
}
