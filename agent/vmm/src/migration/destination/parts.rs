//! What the destination's side is made from, and what its coordinator hears.

use std::sync::{Arc, mpsc};

use slat_proto::{ApiError, transport::Address, v1};

use super::super::{
    listener::{Listener, Peer},
    receiver::Event,
    wire::Header,
};
use crate::{
    handover::{
        protocol::destination::{Decision, Destination},
        side::Side,
    },
    machine::Machine,
};

/// What the coordinator hears.
#[derive(Debug)]
pub(crate) enum Note {
    Connected(Peer),
    Control(Result<(Header, Vec<u8>), ApiError>),
    Data(Event),
    Decided(Decision),
    /// Look at the queue: somebody else fed the machine.
    Interrupted,
}

/// What the destination's side needs.
pub(crate) struct DestinationDriver {
    pub(crate) machine: Arc<Machine>,
    pub(crate) side: Arc<Side<Destination>>,
    pub(crate) streams: u32,
    pub(crate) verify: bool,
    pub(crate) epoch: u64,
    pub(crate) versions: v1::ChosenVersions,
    /// The source's agent, asked when in doubt.
    pub(crate) source_agent: Option<Address>,
    /// By which the VM is received: shown to whoever is asked.
    pub(crate) grant: v1::SignedGrant,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) listener: Listener,
    pub(crate) notes: mpsc::Receiver<Note>,
    pub(crate) sender: mpsc::Sender<Note>,
}
