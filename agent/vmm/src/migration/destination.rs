//! The destination's side: receive, verify, journal, own. One coordinator thread, a control reader, a thread a data stream.
//!
//! # Order of things
//! The coordinator alone decides; the other threads send it [`Note`]s. When every stream has ended pass n it says IterAck n.
//! On State it checks that every page has arrived and that digests agree, loads the vCPUs, journals PREPARED and says READY.
//! From then on the source may have relinquished, so nothing but knowledge ends the side:
//!
//! * COMMIT on the control connection, or a [`Decision`] of the control plane, or the source agent's answer that its journal
//!   says RELINQUISHED: journal OWNED(e+1), run;
//! * the source agent's or the control plane's word that the source keeps (or lost) the VM: journal ABORTED, end.
//!
//! While neither is to be had the VM stays here, stopped: in doubt, for as long as it takes.
//!
//! Before READY any failure ends the side: ABORTED, the process with its memory goes away.

use std::{
    collections::BTreeMap,
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::proto_duration,
    transport::{Address, connect},
    v1::{self, TransferPhase, transfer_service_client::TransferServiceClient},
};

use super::{
    cpu_time::thread_cpu_time,
    listener::{Listener, Peer},
    populate::Populate,
    receiver::{Event, Intake, receive},
    wire::{FrameWriter, Header, Kind, Role, WireError, encode_abort},
};
use crate::{
    handover::{
        payload::{Resumed, VmState, check_slots},
        side::Side,
    },
    machine::{Machine, Switchover},
};

/// Figures are published this often.
const PUBLISH: Duration = Duration::from_millis(100);
/// While memory is being populated, the coordinator looks at it this often.
const POPULATING: Duration = Duration::from_millis(5);
/// And tells the source at least this often, so that it does not take long populating for silence.
const STILL_HERE: Duration = Duration::from_secs(5);
/// A source that has not opened every connection is given up after this long.
const SOURCE_CONNECTS: Duration = Duration::from_secs(60);
/// In doubt, the source's agent is asked this often.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// SlotTable, State, Commit: no more is read from the control connection, so that nothing can be queued up.
const CONTROL_FRAMES: u32 = 3;
/// After a data stream broke, this long for the source's own word on why.
const LAST_WORD: Duration = Duration::from_millis(500);
/// How long one such question may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// What the control plane or the source's journal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The source relinquished: own the VM.
    Commit,
    /// The source keeps it or lost it: go away.
    Abort,
}

/// What the coordinator hears.
#[derive(Debug)]
pub(crate) enum Note {
    Connected(Peer),
    Control(Result<(Header, Vec<u8>), ApiError>),
    Data(Event),
    Decided(Decision),
    Cancelled,
}

/// What the destination's side needs.
pub(crate) struct Destination {
    pub(crate) machine: Arc<Machine>,
    pub(crate) side: Arc<Side>,
    pub(crate) streams: u32,
    pub(crate) verify: bool,
    pub(crate) epoch: u64,
    /// The source's agent, asked when in doubt.
    pub(crate) source_agent: Option<Address>,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) listener: Listener,
    pub(crate) notes: mpsc::Receiver<Note>,
    pub(crate) sender: mpsc::Sender<Note>,
}

/// Connections so far.
struct Link {
    control: Option<(TcpStream, FrameWriter)>,
    data: BTreeMap<u16, TcpStream>,
    intake: Arc<Intake>,
    /// Streams that have ended the running pass.
    ended: u32,
    /// The pass that runs.
    iteration: u32,
    table_seen: bool,
    /// Until all memory is there and the source knows it.
    populate: Option<Populate>,
    /// What the source was told of it, and when.
    told: Option<u32>,
    told_at: Instant,
    /// CPU time of populating, once it is over.
    populate_cpu: Duration,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Destination {
    /// The body of the coordinator thread: runs the side to a terminal phase.
    pub(crate) fn run(self) {
        let table = self.machine.memory().table();
        let mut link = Link {
            control: None,
            data: BTreeMap::new(),
            intake: Arc::new(Intake::new(&table, self.verify)),
            ended: 0,
            iteration: 0,
            table_seen: false,
            populate: None,
            told: None,
            told_at: Instant::now(),
            populate_cpu: Duration::ZERO,
            threads: Vec::new(),
        };
        let cancelled = Mutex::new(self.sender.clone());
        self.side.on_interrupt(move || {
            // The coordinator may have ended already.
            drop(
                cancelled
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .send(Note::Cancelled),
            );
        });
        let result = self.receive(&mut link);
        self.publish(&link);
        if let Err(error) = result {
            self.abort(&error, &mut link);
        }
        link.close();
    }

    /// Until the VM is owned here, or an error before READY, or a decision to abort after it.
    fn receive(&self, link: &mut Link) -> Result<(), ApiError> {
        let started = Instant::now();
        link.populate = Some(Populate::start(&self.machine.memory().table()).map_err(no_memory)?);
        loop {
            let patience = match self.populated(link)? {
                true => PUBLISH,
                false => POPULATING,
            };
            let note = match self.notes.recv_timeout(patience) {
                Ok(note) => note,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.publish(link);
                    let missing = link.control.is_none()
                        || !link.table_seen
                        || link.data.len() < self.streams as usize;
                    if missing && started.elapsed() > SOURCE_CONNECTS {
                        return Err(ApiError::new(
                            Reason::ConnectionLost,
                            format!(
                                "the source did not open every connection within {} s",
                                SOURCE_CONNECTS.as_secs()
                            ),
                        ));
                    }
                    continue;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(ApiError::new(
                        Reason::Internal,
                        "nobody can talk to the coordinator",
                    ));
                }
            };
            match note {
                Note::Connected(peer) => self.connected(link, peer)?,
                Note::Data(event) => self.data(link, event)?,
                Note::Cancelled => {
                    return Err(ApiError::new(
                        Reason::CancelledByUser,
                        "cancelled on request",
                    ));
                }
                Note::Decided(Decision::Abort) => {
                    return Err(ApiError::new(
                        Reason::CancelledByUser,
                        "given up by the control plane",
                    ));
                }
                Note::Decided(Decision::Commit) => {
                    // Not READY: whoever says so mistakes the migration. Nothing was promised.
                    tracing::error!(migration = %self.side.migration(), "COMMIT decided before READY: ignored");
                }
                Note::Control(frame) => {
                    let (header, payload) = frame?;
                    match header.kind {
                        Kind::SlotTable if !link.table_seen => {
                            check_slots(&payload, &self.machine.memory().table())?;
                            link.table_seen = true;
                        }
                        Kind::State if link.table_seen && link.populate.is_none() => {
                            let left = self.prepare(link, &payload)?;
                            return self.handover(link, left);
                        }
                        other => {
                            return Err(WireError::corrupt(
                                "kind",
                                format!("{other:?} on the control connection"),
                            )
                            .into());
                        }
                    }
                }
            }
        }
    }

    /// Whether all memory is there. Tells the source how far it is.
    fn populated(&self, link: &mut Link) -> Result<bool, ApiError> {
        let Some(populate) = &link.populate else {
            return Ok(true);
        };
        let percent = populate.percent().map_err(no_memory)?;
        if !link.table_seen {
            return Ok(false);
        }
        if link.told != Some(percent) || link.told_at.elapsed() >= STILL_HERE {
            link.say(Kind::Populated, percent, &[])?;
            link.told = Some(percent);
            link.told_at = Instant::now();
        }
        if percent < 100 {
            return Ok(false);
        }
        if let Some(populate) = link.populate.take() {
            link.populate_cpu = populate.finish();
        }
        self.side.enter(TransferPhase::Precopy);
        Ok(true)
    }

    /// A connection with a good ticket. One that comes twice is turned away; the first stays.
    fn connected(&self, link: &mut Link, peer: Peer) -> Result<(), ApiError> {
        let Peer {
            role,
            mut stream,
            mut reader,
        } = peer;
        let taken = match role {
            Role::Control => link.control.is_some(),
            Role::Data(number) => {
                u32::from(number) >= self.streams || link.data.contains_key(&number)
            }
        };
        if taken {
            tracing::warn!(?role, "a second connection for a stream was turned away");
            return Ok(());
        }
        let io = |error: std::io::Error| ApiError::from(WireError::from(error));
        let mut writer = FrameWriter::new(self.epoch);
        if let Err(error) = writer.send(&mut stream, Kind::HelloAck, 0, &[]) {
            tracing::warn!(%error, ?role, "a connection broke while it was let in");
            return Ok(());
        }
        let sender = self.sender.clone();
        let ours = stream.try_clone().map_err(io)?;
        let builder = std::thread::Builder::new().name(match role {
            Role::Control => "control".to_owned(),
            Role::Data(number) => format!("receive-{number}"),
        });
        let thread = match role {
            Role::Control => {
                link.control = Some((ours, writer));
                builder.spawn(move || {
                    for _ in 0..CONTROL_FRAMES {
                        let frame = reader.frame(&mut stream).map_err(ApiError::from);
                        let last = frame.is_err();
                        if sender.send(Note::Control(frame)).is_err() || last {
                            return;
                        }
                    }
                })
            }
            Role::Data(number) => {
                link.data.insert(number, ours);
                let intake = Arc::clone(&link.intake);
                builder.spawn(move || {
                    receive(number, &stream, reader, &intake, |event| {
                        sender.send(Note::Data(event)).is_ok()
                    });
                })
            }
        };
        link.threads.push(thread.map_err(io)?);
        Ok(())
    }

    fn data(&self, link: &mut Link, event: Event) -> Result<(), ApiError> {
        match event {
            Event::IterationEnd { stream, iteration } => {
                if iteration != link.iteration {
                    return Err(WireError::corrupt(
                        "iteration",
                        format!(
                            "stream {stream} ended pass {iteration} during pass {}",
                            link.iteration
                        ),
                    )
                    .into());
                }
                link.ended += 1;
                if link.ended == self.streams {
                    link.ended = 0;
                    link.iteration += 1;
                    self.publish(link);
                    link.say(Kind::IterAck, iteration, &[])?;
                }
                Ok(())
            }
            Event::Ended {
                error: Some(error), ..
            } => Err(self.last_word(error)),
            Event::Ended {
                stream,
                error: None,
            } => Err(self.last_word(ApiError::new(
                Reason::ConnectionLost,
                format!("data stream {stream} closed during the migration"),
            ))),
        }
    }

    /// When a data stream breaks, the source may be about to say why on the control connection.
    fn last_word(&self, error: ApiError) -> ApiError {
        if was_told(&error) {
            return error;
        }
        let until = Instant::now() + LAST_WORD;
        while let Ok(note) = self
            .notes
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            match note {
                Note::Control(Err(theirs)) if was_told(&theirs) => return theirs,
                Note::Control(Err(_)) => break,
                _ => {}
            }
        }
        error
    }

    /// Everything has arrived: check it, load it, journal PREPARED. How the VM left the source comes back.
    fn prepare(&self, link: &mut Link, payload: &[u8]) -> Result<Switchover, ApiError> {
        self.side.enter(TransferPhase::Switchover);
        if let Some((slot, page)) = link.intake.first_missing() {
            return Err(ApiError::new(
                Reason::StreamCorrupt,
                format!("slot {slot}, page {page:#x} was never sent"),
            )
            .with("slot", slot)
            .with("page", page));
        }
        let state = VmState::decode(payload)?;
        if let Some(theirs) = &state.digests {
            let ours = link.intake.digests();
            if let Some(wrong) = ours
                .iter()
                .zip(theirs)
                .find(|(ours, theirs)| ours != theirs)
            {
                return Err(ApiError::new(
                    Reason::DigestMismatch,
                    format!("memory of slot {} differs from the source's", wrong.0.0),
                )
                .with("slot", wrong.0.0)
                .with(
                    "advice",
                    "the VM runs on at the source; report this with the logs of both hosts",
                ));
            }
            if ours.len() != theirs.len() {
                return Err(WireError::corrupt(
                    "digests",
                    format!("{} for {} slots", theirs.len(), ours.len()),
                )
                .into());
            }
        }
        if !self.side.close_gate() {
            return Err(ApiError::new(
                Reason::CancelledByUser,
                "cancelled on request",
            ));
        }
        self.machine.prepare(self.side.migration(), &state.vcpus)?;
        Ok(state.left)
    }

    /// PREPARED is durable: from READY on only knowledge ends the side.
    fn handover(&self, link: &mut Link, left: Switchover) -> Result<(), ApiError> {
        self.side.enter(TransferPhase::Ready);
        let said = link.say(Kind::Ready, 0, &[]);
        let mut connected = said.is_ok();
        loop {
            let note = if connected {
                self.notes.recv().ok()
            } else {
                match self.notes.recv_timeout(ASK_EVERY) {
                    Ok(note) => Some(note),
                    Err(_) => self.ask().map(Note::Decided),
                }
            };
            match note {
                Some(Note::Control(Ok((header, _)))) if header.kind == Kind::Commit => break,
                Some(Note::Decided(Decision::Commit)) => break,
                Some(Note::Control(Err(error))) if was_told(&error) => return Err(error),
                Some(Note::Control(other)) => {
                    // Never the payload: it may be long, and it is the guest's.
                    let what = match &other {
                        Ok((header, _)) => format!("{:?} instead of Commit", header.kind),
                        Err(error) => error.to_string(),
                    };
                    tracing::warn!(what, migration = %self.side.migration(),
                        "in doubt: nothing more to hear from the source after READY; asking its agent");
                    connected = false;
                }
                Some(Note::Decided(Decision::Abort)) => {
                    return Err(ApiError::new(
                        Reason::ConnectionLost,
                        "the source kept the VM: it never relinquished it",
                    ));
                }
                // Streams close after the last pass; strangers and cancels come too late to matter.
                Some(Note::Connected(_) | Note::Data(_) | Note::Cancelled) | None => {}
            }
        }
        let trouble = self.own(left);
        let resumed = Resumed {
            as_it_was: trouble.is_none(),
            digests: link.intake.digests(),
        };
        if let Err(error) = link.say(Kind::Resumed, 0, &resumed.encode()) {
            tracing::info!(%error, migration = %self.side.migration(), "the source did not hear RESUMED; the server will tell it");
        }
        self.publish(link);
        self.side.end(
            self.machine.dir(),
            TransferPhase::Completed,
            trouble.map(|error| {
                error.to_migration_error(v1::MigrationPhase::Committed, "destination")
            }),
        );
        Ok(())
    }

    /// The VM is ours. A journal that cannot be written is tried again: the source will never run the VM. What comes back is
    /// why the VM, though owned here, does not run.
    fn own(&self, Switchover { run, never_ran }: Switchover) -> Option<ApiError> {
        loop {
            match self.machine.own(self.side.migration(), run, never_ran) {
                Ok(_) => return None,
                Err(error) if error.reason == Reason::Journal => {
                    tracing::error!(%error, migration = %self.side.migration(), "OWNED could not be journalled; trying again");
                    std::thread::sleep(ASK_EVERY);
                }
                Err(error) => {
                    tracing::error!(%error, migration = %self.side.migration(), "the VM is owned here but could not be run");
                    return Some(error);
                }
            }
        }
    }

    /// What the source's agent knows. `None`: nothing that decides.
    fn ask(&self) -> Option<Decision> {
        let address = self.source_agent.as_ref()?;
        let request = v1::GetTransferRequest {
            migration: self.side.migration().to_string(),
            role: v1::TransferRole::Source.into(),
        };
        let answer = self.runtime.block_on(async {
            let channel = connect(address).ok()?;
            let mut client = TransferServiceClient::new(channel);
            let call = tokio::time::timeout(ASK_TIMEOUT, client.get_transfer(request));
            call.await.ok()?.ok()
        })?;
        let source = answer.into_inner();
        match source.phase() {
            TransferPhase::Relinquished | TransferPhase::Completed => Some(Decision::Commit),
            TransferPhase::Failed | TransferPhase::Cancelled => Some(Decision::Abort),
            _ => None,
        }
    }

    /// Before READY, or told so after it: this side goes away, its process with it.
    fn abort(&self, error: &ApiError, link: &mut Link) {
        let phase = match self.side.phase() {
            TransferPhase::Preparing => v1::MigrationPhase::Preparing,
            TransferPhase::Precopy => v1::MigrationPhase::PrecopyActive,
            _ => v1::MigrationPhase::Switchover,
        };
        let (ends_in, recorded) = match self.side.cancel_cause() {
            Some(Ok(elsewhere)) => (TransferPhase::Failed, elsewhere),
            Some(Err(cancelled)) => (
                TransferPhase::Cancelled,
                cancelled.to_migration_error(phase, "destination"),
            ),
            None if error.reason == Reason::CancelledByUser => (
                TransferPhase::Cancelled,
                error.to_migration_error(phase, "destination"),
            ),
            None => (
                TransferPhase::Failed,
                error.to_migration_error(phase, "destination"),
            ),
        };
        tracing::warn!(migration = %self.side.migration(), reason = recorded.reason, message = recorded.message,
            "incoming migration ended");
        // The source learns why, if it still listens.
        drop(link.say(Kind::Abort, 0, &encode_abort(error)));
        // Record, journal, then word: whoever hears of the end finds it durable. Giving up ends the process.
        self.side.keep_record(
            self.machine.dir(),
            &self.side.as_ended(ends_in, Some(&recorded)),
        );
        if let Err(error) = self.machine.abort_incoming(self.side.migration()) {
            tracing::error!(%error, migration = %self.side.migration(), "ABORTED could not be journalled");
        }
        self.side.publish_end(ends_in, Some(recorded));
    }

    fn publish(&self, link: &Link) {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let intake = &link.intake;
        let cpu =
            Duration::from_nanos(load(&intake.cpu_nanos)) + link.populate_cpu + thread_cpu_time();
        self.side.update(|progress| {
            progress.iteration = link.iteration;
            progress.bytes_transferred = load(&intake.bytes);
            progress.pages_normal = load(&intake.pages_normal);
            progress.pages_zero = load(&intake.pages_zero);
            progress.cpu_time = Some(proto_duration(cpu));
        });
        let refused = self.listener.refused();
        if refused > 0 {
            tracing::debug!(refused, "connections turned away on the data port");
        }
    }
}

/// Memory could not be populated.
fn no_memory(error: std::io::Error) -> ApiError {
    ApiError::new(
        Reason::DstNoMemory,
        format!("the VM's memory could not be populated here: {error}"),
    )
    .with(
        "advice",
        "the VM runs on at the source; free memory on this host or choose another",
    )
}

/// Whether the error is the source's own word (Abort), not a broken connection.
fn was_told(error: &ApiError) -> bool {
    !matches!(
        error.reason,
        Reason::ConnectionLost | Reason::ProgressStalled | Reason::StreamCorrupt
    )
}

impl Link {
    fn say(&mut self, kind: Kind, count: u32, payload: &[u8]) -> Result<(), ApiError> {
        match &mut self.control {
            Some((stream, writer)) => Ok(writer.send(stream, kind, count, payload)?),
            None => Err(ApiError::new(
                Reason::ConnectionLost,
                "the source is not connected",
            )),
        }
    }

    fn close(self) {
        for stream in self
            .data
            .values()
            .chain(self.control.as_ref().map(|(stream, _)| stream))
        {
            // A stream that is closed already needs no shutdown.
            drop(stream.shutdown(Shutdown::Both));
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a receiving thread panicked");
            }
        }
    }
}
