//! Who says what to whom. The order is part of the protocol:
//!
//! * A pager says [`FromPager::Hello`] and hears [`ToPager::Setup`], then every
//!   [`ToPager::Memory`],
//!   the source's layers, every snapshot with its memories, and [`ToPager::Ready`]. It answers
//!   [`FromPager::Attached`] once it serves faults. From then on either side asks, and answers in
//!   any order; a memory or a snapshot may be added at any time. A pager whose connection ends
//!   ends.
//! * An agent says [`FromAgent::Hello`], one order, and waits for its end.

use serde::{Deserialize, Serialize};

use super::{
    layer::{Layer, LayerMemory},
    problem::Problem,
    state::PagerState,
};

/// The version of these messages. Pager and VM process come from the same program but for an
/// upgrade of the agent under living VMs; a VM process serves the versions that it knows.
pub const VERSION: u32 = 1;

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Resolves the guest's faults.
    Pager,
    /// Hands over sources, takes snapshots' descriptors.
    Agent,
}

/// What kind of VM is paged. Descriptor, when `watched`: userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// [`VERSION`].
    pub version: u32,
    /// The name of the mirror's format (`slat_arch::GuestStage`).
    pub format: String,
    /// Thread ids of the vCPUs, by index; a fault says by which thread it is.
    pub vcpus: Vec<i32>,
    /// Whether the guest's views are registered with a descriptor. Not watched: nothing faults, the
    /// pager brings the source's pages and ends.
    pub watched: bool,
    /// Whether the host can protect pages of a view.
    pub can_protect: bool,
    /// Bring all pages of the source, whether or not the guest asks.
    pub load_all: bool,
    /// The views may have mappings that this pager does not know: the kernel's, from before they
    /// were watched, or a dead pager's. It sweeps them while it serves.
    pub mapped: bool,
}

/// Memory of the guest. Descriptors: the memory file, and, when `has_loaded`, the bitmap of pages
/// that were brought from the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The name of this memory between VM process and pager; never used again.
    pub memory: u32,
    /// The slot's number.
    pub slot: u32,
    /// Where the guest sees it.
    pub base_gfn: u64,
    /// Its length.
    pub pages: u64,
    /// Where the view is in the VM process; 0 when it is not watched.
    pub view: u64,
    /// Its first byte in the memory file.
    pub file_start: u64,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Its number in the source's first layer; `None`: it has no source.
    pub origin: Option<u32>,
    /// Whether there is a bitmap of loaded pages.
    pub has_loaded: bool,
}

/// What a VM process asks of its pager. Frames are the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// The memory's slot is gone: nothing of it is mapped any more, and it is not asked for again.
    Remove {
        /// Which.
        memory: u32,
    },
    /// The slot moved. Nothing of it is mapped when this is answered.
    Move {
        /// Which.
        memory: u32,
        /// Its new place.
        base_gfn: u64,
    },
    /// Make a snapshot's beginning cheap, while the guest runs: take leave to write away from what
    /// is mapped, in rounds, until few pages are left ([`Answer::Armed`]). Views that may have
    /// mappings the pager does not know have been swept before this is answered.
    Arm {
        /// Which is to begin.
        snapshot: u64,
    },
    /// The vCPUs are stopped, and nobody else writes: the snapshot begins when this is answered.
    Begin {
        /// Which.
        snapshot: u64,
    },
    /// Take mappings away; contents stay.
    Unmap {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// Take contents away: they read as zeroes afterwards.
    Discard {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// Bring contents, for the VM process to read, or to write when `write`: then also keep them
    /// for snapshots.
    Load {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
        /// The VM process is going to write.
        write: bool,
    },
    /// Bring all contents, and answer when they are there.
    LoadAll,
    /// Forbid writes until the next write of the guest faults.
    Protect {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// Take mappings away, and say which there were ([`Answer::Frames`]).
    Age {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// The mirror's mappings ([`Answer::Mapped`]), from `gfn` on, as many as fit.
    Mapped {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// Map pages before the guest touches them, with their contents ([`Answer::Prefaulted`]): from
    /// `gfn` on, of one memory.
    Prefault {
        /// First frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// The snapshot is not needed any more.
    EndSnapshot {
        /// Which.
        snapshot: u64,
    },
    /// The source has been mended, or may have been: try again what failed.
    Retry,
    /// Its state now.
    State,
    /// The VM goes on without: stop serving, and end.
    Stop,
}

/// A run of mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapped {
    /// First frame.
    pub gfn: u64,
    /// How many.
    pub pages: u64,
    /// Whether the guest may write.
    pub writable: bool,
}

/// What came of an [`Ask`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// A snapshot can begin.
    Armed {
        /// Pages that may be written now, and are protected when it begins.
        left: u64,
        /// Rounds that were made.
        rounds: u32,
    },
    /// Runs of frames, `(first, how many)`.
    Frames(Vec<(u64, u64)>),
    /// Runs of mappings, and where the listing stopped.
    Mapped {
        /// By frame.
        runs: Vec<Mapped>,
        /// The first frame that was not looked at.
        next: u64,
    },
    /// So many pages are mapped now, from the first on. 0: there is no memory at the first frame,
    /// or it is just being moved. Progress is told before what is wrong.
    Prefaulted {
        /// How many.
        pages: u64,
    },
    /// Its state.
    State(Box<PagerState>),
}

/// From a VM process to its pager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToPager {
    /// The first message.
    Setup(Setup),
    /// A memory.
    Memory(Memory),
    /// The next layer of the source, with its descriptors.
    Layer(Layer),
    /// A memory of the layer before, with its descriptors.
    LayerMemory(LayerMemory),
    /// A snapshot. It begins with [`Ask::Begin`], or has begun when `active`. Descriptor: the read
    /// end of its lease; when that ends, the snapshot does.
    Snapshot {
        /// Its number.
        snapshot: u64,
        /// Whether it has begun.
        active: bool,
    },
    /// A memory of a snapshot. Descriptors: the kept file and the marks.
    SnapshotMemory {
        /// Of which.
        snapshot: u64,
        /// Which memory.
        memory: u32,
    },
    /// That was all there is.
    Ready,
    /// A question.
    Ask {
        /// Its number.
        request: u64,
        /// What is asked.
        ask: Ask,
    },
    /// An answer to [`FromPager::DropMappings`]; an error number when it failed.
    Dropped {
        /// To which.
        request: u64,
        /// 0: done.
        errno: i32,
    },
}

/// The first message of whoever connects: [`FromPager::Hello`] or [`FromAgent::Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Greeting {
    /// Either.
    Hello {
        /// Who it is.
        role: Role,
        /// [`VERSION`].
        version: u32,
        /// A pager's process id.
        #[serde(default)]
        pid: u32,
    },
}

/// From a pager to its VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromPager {
    /// The first message.
    Hello {
        /// [`Role::Pager`].
        role: Role,
        /// [`VERSION`].
        version: u32,
        /// Its process id.
        pid: u32,
    },
    /// It serves.
    Attached,
    /// An answer.
    Reply {
        /// To which question.
        request: u64,
        /// What came of it.
        result: Result<Answer, Problem>,
    },
    /// Drop the view's translations of these pages (`MADV_DONTNEED`), and say when it is done.
    DropMappings {
        /// The number of this question.
        request: u64,
        /// Which memory.
        memory: u32,
        /// First page in it.
        page: u64,
        /// How many.
        pages: u64,
    },
    /// How it stands.
    State(Box<PagerState>),
    /// The lease of a snapshot ended, and with it the snapshot.
    SnapshotEnded {
        /// Which.
        snapshot: u64,
    },
    /// All pages of the source are there: it is not needed any more.
    Loaded,
}

/// From an agent to a VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromAgent {
    /// The first message.
    Hello {
        /// [`Role::Agent`].
        role: Role,
        /// [`VERSION`].
        version: u32,
    },
    /// The next layer of the VM's page source, with its descriptors.
    Layer(Layer),
    /// A memory of the layer before, with its descriptors.
    LayerMemory(LayerMemory),
    /// That was the source. Answered with [`ToAgent::Done`].
    SourceEnd,
    /// The layers of a snapshot, with all that lies under it. Answered with layers, then
    /// [`ToAgent::Done`]. A snapshot's lease can be taken once.
    TakeSnapshot {
        /// Which.
        snapshot: u64,
    },
}

/// From a VM process to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    /// The next layer, with its descriptors.
    Layer(Layer),
    /// A memory of the layer before, with its descriptors.
    LayerMemory(LayerMemory),
    /// That was all.
    Done,
    /// It cannot be.
    Failed(Problem),
}
