//! The state that is explored: two hosts, one server, what is between them, and what may still go
//! wrong.
//!
//! What decides is production code: `protocol::source::Source`,
//! `protocol::destination::Destination`, [`MigrationProtocol`], [`slat_record::standing`] and
//! [`slat_record::journal::JournalState`]. What is written here is what drivers, kernels and
//! networks do to it.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use slat_proto::v1::TransferPhase;
use slat_record::{
    journal::{Entry, JournalState},
    standing::Recorded,
};
use slat_server::migration::protocol::{
    Action as Call, Answer, Durable, MigrationProtocol, Report,
};
use slat_vmm::handover::protocol::{destination, source};

/// The migration, as journals name it.
pub const MIGRATION: &str = "m";
/// The VM's identity.
pub const UID: &str = "u";
/// The VM's epoch at the source.
pub const EPOCH: u64 = 1;

/// A journal on a disk with a cache before it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct JournalOnDisk {
    /// On the disk.
    pub durable: Arc<Vec<Entry>>,
    /// Written, and lost when the host loses its power.
    pub cached: Option<Entry>,
}

impl JournalOnDisk {
    /// A journal whose only entry is durable.
    #[must_use]
    pub fn new(entry: Entry) -> Self {
        Self {
            durable: Arc::new(vec![entry]),
            cached: None,
        }
    }

    /// What a reader sees while the host is up.
    #[must_use]
    pub fn seen(&self) -> Vec<Entry> {
        let mut entries = self.durable.to_vec();
        entries.extend(self.cached.clone());
        entries
    }

    /// What the entries that a reader sees add up to.
    ///
    /// # Panics
    /// When they are not in the order of a handover: the exploration then found an order that a
    /// journal would refuse.
    #[must_use]
    pub fn state(&self) -> Option<JournalState> {
        JournalState::of(&self.seen()).expect("a journal takes only what can follow")
    }

    /// The cache reaches the disk.
    pub fn sync(&mut self) {
        if let Some(entry) = self.cached.take() {
            Arc::make_mut(&mut self.durable).push(entry);
        }
    }
}

/// What the source's coordinator is blocked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceWork {
    /// Opening connections.
    Connect,
    /// Waiting until the destination has its memory.
    AwaitPopulated,
    /// Iterations.
    Precopy,
    /// Reading READY.
    AwaitReady,
    /// Reading RESUMED.
    AwaitResumed,
    /// Nothing: the next action, or the end.
    Idle,
}

/// The source's side in its process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceSide {
    /// The production machine.
    pub machine: source::Source,
    /// Its actions that are not carried out yet.
    pub queue: VecDeque<source::Action>,
    /// What its coordinator waits for.
    pub work: SourceWork,
    /// Cancelled, and the coordinator's work is about to fail.
    pub interrupted: bool,
    /// The switchover stopped the vCPUs.
    pub stopped: bool,
    /// The destination's instance it was sent to.
    pub ticket: u8,
    /// What it tells of itself.
    pub shown: TransferPhase,
}

/// The host that has the VM at the beginning.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceHost {
    /// Power, kernel and agent.
    pub up: bool,
    /// Deleted by order: it never comes back.
    pub forgotten: bool,
    /// The VM's process lives.
    pub alive: bool,
    /// Its vCPUs run.
    pub runs: bool,
    /// Its side of the migration.
    pub side: Option<SourceSide>,
    /// The VM's journal; `None` once its directory was removed.
    pub journal: Option<JournalOnDisk>,
    /// The record of its side.
    pub record: Option<Recorded>,
    /// How the record says it ended.
    pub ended_as: Option<TransferPhase>,
    /// Tickets of released sides, a bit each: neither the process nor its agent takes the grants
    /// that came with them again.
    pub spent: u64,
}

/// What the destination's coordinator is blocked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationWork {
    /// Notes of other threads, before all memory is there.
    Prepare,
    /// Notes of other threads.
    Listen,
    /// Nothing: the process is gone or going.
    Idle,
}

/// The destination's side in its process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationSide {
    /// The production machine.
    pub machine: destination::Destination,
    /// Its actions that are not carried out yet.
    pub queue: VecDeque<destination::Action>,
    /// What its coordinator waits for.
    pub work: DestinationWork,
    /// Cancelled, and the coordinator has not noticed.
    pub interrupted: bool,
    /// The source's agent is being asked.
    pub asking: bool,
    /// What it answered.
    pub answer: Option<destination::Standing>,
    /// What it tells of itself.
    pub shown: TransferPhase,
}

/// The host that is to have it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationHost {
    /// Power, kernel and agent.
    pub up: bool,
    /// Deleted by order: it never comes back.
    pub forgotten: bool,
    /// Its vCPUs run.
    pub runs: bool,
    /// The process's side; `None` when no process lives, or its side was released.
    pub side: Option<DestinationSide>,
    /// A process lives.
    pub alive: bool,
    /// How many processes there have been: what a ticket opens.
    pub instance: u8,
    /// The journal of the last process; `None` before the first and once it was released.
    pub journal: Option<JournalOnDisk>,
    /// The record of its side.
    pub record: Option<Recorded>,
    /// How the record says it ended.
    pub ended_as: Option<TransferPhase>,
    /// The side was released: the agent does not know it any more, and keeps on its disk that no
    /// grant of before begins it again.
    pub released: bool,
}

/// Frames on the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Frame {
    /// All memory is there.
    Populated,
    /// The last pages and the state.
    State,
    /// PREPARED is durable.
    Ready,
    /// RELINQUISHED is durable.
    Commit,
    /// OWNED is durable.
    Resumed,
    /// Nothing will come of it.
    Abort,
}

/// The connection between both processes: TCP, so in order, and broken at any moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    /// The destination's instance it leads to; `None` before it was opened.
    pub instance: Option<u8>,
    /// No more can be written. What is under way may still be read, or be lost.
    pub broken: bool,
    /// Towards the destination.
    pub forth: VecDeque<Frame>,
    /// Towards the source.
    pub back: VecDeque<Frame>,
}

/// A call of the server to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum InFlight {
    /// Under way to the agent, with the ticket of a StartOutgoing.
    Request(u8),
    /// Under way back: the answer, what a follower heard, and the ticket of a PrepareIncoming.
    Reply(Answer, Option<Report>, u8),
}

/// The server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Server {
    /// It runs.
    pub up: bool,
    /// The production machine.
    pub protocol: MigrationProtocol,
    /// What its store holds.
    pub disk: Durable,
    /// What is being written there.
    pub writing: Option<Durable>,
    /// Calls under way, each with where it is.
    pub calls: Vec<(Call, InFlight)>,
    /// The ticket of the last PrepareIncoming that was answered.
    pub grant: u8,
    /// Hosts that were fenced, source and destination, as its store keeps them.
    pub fences: [bool; 2],
}

/// A request that nobody waits for any more and that may still arrive: repeated by the network,
/// delayed beyond its caller's patience, or of an earlier life of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stray {
    /// Which call, as its place among the calls.
    pub call: u8,
    /// Its ticket.
    pub ticket: u8,
}

/// How often what may still go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// kill -9 of a VM process.
    pub kills: u8,
    /// A host loses its power.
    pub outages: u8,
    /// The server dies.
    pub server_crashes: u8,
    /// A request or an answer is lost.
    pub losses: u8,
    /// A request arrives twice, or after its caller gave up.
    pub strays: u8,
    /// An answer is under way while other things happen.
    pub delays: u8,
    /// The connection between the processes breaks.
    pub breaks: u8,
    /// A write of a journal fails.
    pub disk_faults: u8,
    /// Work of a side fails: no memory, a bad page, a vCPU that does not stop.
    pub work_faults: u8,
    /// The user cancels.
    pub cancels: u8,
    /// A switchover takes too long and goes back.
    pub overruns: u8,
    /// An operator deletes a host that has no power.
    pub deletions: u8,
    /// An operator fences a host.
    pub fences: u8,
    /// A request that needs a grant arrives once more, after it was answered.
    pub replays: u8,
    /// A grant's time ends, while its side goes on or while its request is under way.
    pub expiries: u8,
}

impl Budget {
    /// Nothing goes wrong any more.
    pub const NONE: Self = Self {
        kills: 0,
        outages: 0,
        server_crashes: 0,
        losses: 0,
        strays: 0,
        delays: 0,
        breaks: 0,
        disk_faults: 0,
        work_faults: 0,
        cancels: 0,
        overruns: 0,
        deletions: 0,
        fences: 0,
        replays: 0,
        expiries: 0,
    };
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// The host that has the VM.
    pub source: SourceHost,
    /// The host that is to have it.
    pub destination: DestinationHost,
    /// Between their processes.
    pub link: Link,
    /// The server.
    pub server: Server,
    /// Requests that may still arrive.
    pub strays: BTreeSet<Stray>,
    /// What may still go wrong.
    pub budget: Budget,
}

impl World {
    /// A VM that runs at the source, and a migration that was just stored.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        let durable = Durable::pending(false);
        Self {
            source: SourceHost {
                up: true,
                forgotten: false,
                alive: true,
                runs: true,
                side: None,
                journal: Some(JournalOnDisk::new(Entry::Created {
                    vm: "v".to_owned(),
                    uid: UID.to_owned(),
                    epoch: EPOCH,
                })),
                record: None,
                ended_as: None,
                spent: 0,
            },
            destination: DestinationHost {
                up: true,
                forgotten: false,
                runs: false,
                side: None,
                alive: false,
                instance: 0,
                journal: None,
                record: None,
                ended_as: None,
                released: false,
            },
            link: Link {
                instance: None,
                broken: false,
                forth: VecDeque::new(),
                back: VecDeque::new(),
            },
            server: Server {
                up: true,
                protocol: MigrationProtocol::new(&durable),
                disk: durable,
                writing: None,
                calls: Vec::new(),
                grant: 0,
                fences: [false; 2],
            },
            strays: BTreeSet::new(),
            budget,
        }
    }
}
