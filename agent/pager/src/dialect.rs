//! What is peculiar to our own VM process: its messages, and in which order they come.
//!
//! Everything else here knows memories, views, snapshots and a source, and not where they came
//! from. A monitor that hands a descriptor over in another way needs another module like this one.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use slat_paging::{
    uffd::Uffd,
    wire::{self, FromPager, Role, Setup, Socket, ToPager, VERSION},
};

use crate::{
    asks::Asks,
    bell::Bell,
    drops::Drops,
    error::PagerError,
    hear::{add_memory, hear, unexpected},
    mirror::Mirror,
    options::Options,
    shared::{Parts, Shared},
    source::ChainBuilder,
};

/// How long the VM process has between two messages until it has said all that there is: it has it
/// at hand.
const BOUND: Duration = Duration::from_secs(30);

/// Says hello and hears what there is, up to the word that that was all. `None`: the VM process
/// had nothing for it to do, and closed the connection before it was told anything.
pub(crate) fn attach(socket: Socket, options: &Options) -> Result<Option<Shared>, PagerError> {
    let slow = PagerError::kernel("setting up the connection");
    socket.set_patience(Some(BOUND)).map_err(slow)?;
    let socket = Arc::new(socket);
    let hello = FromPager::Hello {
        role: Role::Pager,
        version: VERSION,
        pid: std::process::id(),
    };
    socket.send(&hello, &[])?;
    let first = match socket.receive::<ToPager>() {
        Err(wire::WireError::Closed) => return Ok(None),
        first => first?,
    };
    let ToPager::Setup(setup) = first.message else {
        return unexpected(&first.message, "before the setup");
    };
    let shared = set_up(socket, options, setup, first.fds)?;
    let mut chain = ChainBuilder::default();
    let mut memories = Vec::new();
    loop {
        let packet = shared.socket.receive::<ToPager>()?;
        match packet.message {
            // A source comes after the memories that it is for.
            ToPager::Memory(memory) => memories.push((memory, packet.fds)),
            ToPager::Layer(layer) => chain.layer(layer, packet.fds)?,
            ToPager::LayerMemory(memory) => chain.memory(&memory, packet.fds)?,
            ToPager::SnapshotMemory { .. } | ToPager::Snapshot { .. } => {
                add_memories(&shared, &mut memories)?;
                hear(&shared, packet.message, packet.fds)?;
            }
            ToPager::Ready => break,
            other => return unexpected(&other, "before all was said"),
        }
    }
    match &options.source {
        Some(source) => shared.set_source(Arc::clone(source)),
        None => {
            if let Some(chain) = chain.build()? {
                shared.set_source(Arc::new(chain));
            }
        }
    }
    add_memories(&shared, &mut memories)?;
    shared.check_sources()?;
    shared.read_working_set();
    // From now on it may be silent for as long as it likes.
    let slow = PagerError::kernel("setting up the connection");
    shared.socket.set_patience(None).map_err(slow)?;
    if shared.setup.load_all {
        shared.queue.load_all();
    }
    Ok(Some(shared))
}

fn set_up(
    socket: Arc<Socket>,
    options: &Options,
    setup: Setup,
    fds: Vec<OwnedFd>,
) -> Result<Shared, PagerError> {
    if setup.version != VERSION {
        let version = setup.version;
        return Err(PagerError::Protocol(format!(
            "version {version} of its messages"
        )));
    }
    let drops = Arc::new(Drops::new(Arc::clone(&socket)));
    let mirror = match (setup.watched, fds.into_iter().next()) {
        (false, _) => None,
        (true, Some(fd)) => Some(Mirror::new(&setup, Uffd::from_fd(fd), Arc::clone(&drops))?),
        (true, None) => {
            return Err(PagerError::Protocol(
                "watched without a descriptor".to_owned(),
            ));
        }
    };
    let bell = || Bell::new().map_err(PagerError::kernel("making an eventfd"));
    Ok(Shared::new(Parts {
        tuning: options.tuning,
        setup,
        socket,
        drops,
        mirror,
        bells: [bell()?, bell()?],
    }))
}

fn add_memories(
    shared: &Shared,
    memories: &mut Vec<(wire::Memory, Vec<OwnedFd>)>,
) -> Result<(), PagerError> {
    let mut memories = memories.drain(..);
    memories.try_for_each(|(memory, fds)| add_memory(shared, &memory, fds))
}

/// Hears the VM process until the connection ends or the pager is told to.
pub(crate) fn serve(shared: &Shared, asks: &Asks) -> Result<(), PagerError> {
    loop {
        let packet = match shared.socket.receive::<ToPager>() {
            Ok(packet) => packet,
            Err(wire::WireError::Closed) => return shared.take_failure(),
            Err(error) => return Err(error.into()),
        };
        match packet.message {
            ToPager::Ask {
                request,
                ask: wire::Ask::Stop,
            } => {
                shared.end();
                let result = Ok(wire::Answer::Done);
                shared
                    .socket
                    .send(&FromPager::Reply { request, result }, &[])?;
                return Ok(());
            }
            ToPager::Ask { request, ask } => asks.push(shared, request, ask),
            ToPager::Dropped { request, errno } => shared.drops.dropped(request, errno),
            other => asks.hear(other, packet.fds)?,
        }
    }
}
