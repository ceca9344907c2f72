//! The source's connections, as they are let in.

use std::{
    collections::BTreeMap,
    net::{Shutdown, TcpStream},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason};

use super::{
    super::{
        channel::least,
        listener::Peer,
        receiver::{Intake, receive},
        stream::Outlet,
        wire::{FrameWriter, Kind, StreamRole, WireError},
    },
    parts::{DestinationDriver, Note},
};
use crate::{
    confine,
    memory::{Populate, SlotTable},
};

/// SlotTable, State, Commit: no more is read from the control connection, so that nothing can be
/// queued up. Besides these any number of Echo, one at a time: the next frame is read when it is
/// answered.
const CONTROL_FRAMES: u32 = 3;

/// Connections so far, and what came over them.
pub(super) struct Link {
    pub(super) control: Option<(Outlet, FrameWriter)>,
    pub(super) data: BTreeMap<u16, Arc<TcpStream>>,
    pub(super) intake: Arc<Intake>,
    /// Streams that have ended the running iteration.
    pub(super) ended: u32,
    /// The iteration that runs.
    pub(super) iteration: u32,
    pub(super) table_seen: bool,
    /// Until all memory is there and the source knows it.
    pub(super) populate: Option<Populate>,
    /// What the source was told of it, and when.
    pub(super) told: Option<u32>,
    pub(super) told_at: Instant,
    /// Bytes of it that were last published, and when.
    pub(super) published: u64,
    pub(super) published_at: Instant,
    /// CPU time of populating, once it is over.
    pub(super) populate_cpu: Duration,
    /// Lets the reader of the control connection go on after an Echo.
    answered: Option<mpsc::Sender<()>>,
    control_reader: Option<JoinHandle<()>>,
    receivers: Vec<JoinHandle<()>>,
}

impl Link {
    pub(super) fn new(table: &SlotTable, verify: bool) -> Self {
        Self {
            control: None,
            data: BTreeMap::new(),
            intake: Arc::new(Intake::new(table, verify)),
            ended: 0,
            iteration: 0,
            table_seen: false,
            populate: None,
            told: None,
            told_at: Instant::now(),
            published: 0,
            published_at: Instant::now(),
            populate_cpu: Duration::ZERO,
            answered: None,
            control_reader: None,
            receivers: Vec::new(),
        }
    }

    pub(super) fn say(&mut self, kind: Kind, count: u32, payload: &[u8]) -> Result<(), ApiError> {
        match &mut self.control {
            Some((stream, writer)) => Ok(writer.send(stream, kind, count, payload)?),
            None => Err(ApiError::new(
                Reason::ConnectionLost,
                "the source is not connected",
            )),
        }
    }

    /// Answers an Echo: an append to the journal here takes so long.
    pub(super) fn answer_echo(&mut self, synced: Duration) -> Result<(), ApiError> {
        let nanos = u64::try_from(synced.as_nanos()).unwrap_or(u64::MAX);
        self.say(Kind::EchoAck, 0, &nanos.to_le_bytes())?;
        if let Some(answered) = &self.answered {
            // A reader that has ended has nothing to wait for.
            answered.send(()).unwrap_or_default();
        }
        Ok(())
    }

    /// Closes the data streams and waits for their threads: after that nothing from the network
    /// reaches the VM's memory.
    pub(super) fn close_data(&mut self) {
        for stream in self.data.values() {
            shut_down(stream);
        }
        self.receivers.drain(..).for_each(join);
    }

    pub(super) fn close(mut self) {
        self.close_data();
        self.answered = None;
        if let Some((stream, _)) = &self.control {
            shut_down(stream.socket());
        }
        self.control_reader.into_iter().for_each(join);
    }
}

fn shut_down(stream: &TcpStream) {
    // A stream that is closed already needs no shutdown.
    drop(stream.shutdown(Shutdown::Both));
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a receiving thread panicked");
    }
}

impl DestinationDriver {
    /// A connection that showed what it has to. One that comes twice is turned away, and the first
    /// stays.
    pub(super) fn connected(&self, link: &mut Link, peer: Peer) -> Result<(), ApiError> {
        let Peer {
            role,
            mut inlet,
            mut outlet,
            mut reader,
        } = peer;
        let taken = match role {
            StreamRole::Control => link.control.is_some(),
            StreamRole::Data(number) => {
                u32::from(number) >= self.streams || link.data.contains_key(&number)
            }
        };
        if taken {
            tracing::warn!(?role, "a second connection for a stream was turned away");
            return Ok(());
        }
        let io = |error: std::io::Error| ApiError::from(WireError::from(error));
        let mut writer = FrameWriter::new(self.versions.protocol, self.epoch);
        if let Err(error) = writer.send(&mut outlet, Kind::HelloAck, 0, &[]) {
            tracing::warn!(%error, ?role, "a connection broke while it was let in");
            return Ok(());
        }
        let sender = self.sender.clone();
        let builder = std::thread::Builder::new().name(match role {
            StreamRole::Control => "control".to_owned(),
            StreamRole::Data(number) => format!("receive-{number}"),
        });
        match role {
            StreamRole::Control => {
                link.control = Some((outlet, writer));
                let (answered, answers) = mpsc::channel();
                link.answered = Some(answered);
                let thread = builder.spawn(move || {
                    confine::enter(confine::Role::Stream);
                    let mut left = CONTROL_FRAMES;
                    while left > 0 {
                        let frame = reader.frame(&mut inlet).map_err(ApiError::from);
                        let last = frame.is_err();
                        let echo = matches!(&frame, Ok((header, _)) if header.kind == Kind::Echo);
                        if sender.send(Note::Control(frame)).is_err() || last {
                            return;
                        }
                        if !echo {
                            left -= 1;
                        } else if answers.recv().is_err() {
                            return;
                        }
                    }
                });
                link.control_reader = Some(thread.map_err(io)?);
            }
            StreamRole::Data(number) => {
                link.data.insert(number, Arc::clone(inlet.socket()));
                if link.data.len() == self.streams as usize {
                    // Of what is received: whether the other end's kernel encrypts is not seen.
                    let path = least(
                        &[outlet.path()],
                        "what is received is decrypted in this process",
                    );
                    self.side.update(|progress| progress.path = path);
                }
                let intake = Arc::clone(&link.intake);
                let thread = builder.spawn(move || {
                    confine::enter(confine::Role::Stream);
                    receive(number, inlet, reader, &intake, |event| {
                        sender.send(Note::Data(event)).is_ok()
                    });
                });
                link.receivers.push(thread.map_err(io)?);
            }
        }
        Ok(())
    }
}
