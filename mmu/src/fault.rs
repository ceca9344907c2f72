//! A guest's fault and what came of it.

use crate::{
    addr::{Gfn, GfnRange, Level},
    refused::Refused,
};

/// What the guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store or an atomic operation.
    Write,
    /// An instruction fetch.
    Execute,
}

/// A second-stage fault to be resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The frame accessed.
    pub gfn: Gfn,
    /// What was attempted.
    pub access: Access,
    /// The guest did not ask: map it as if read, but not as used (`KVM_PRE_FAULT_MEMORY`).
    pub prefetch: bool,
    /// The coarsest mapping wanted.
    pub max_level: Level,
    /// [`SecondStage::invalidate_seq`](crate::SecondStage::invalidate_seq), read before the caller
    /// made the memory behind `gfn` available. `None` if it did nothing outside the MMU.
    pub seq: Option<u64>,
    /// The walk found a mapping and the access was not allowed (a *protection* fault): worth trying
    /// without the lock.
    pub present: bool,
    /// For the tables that mirror an external owner's, not for the guest's own.
    pub mirror: bool,
    /// Whether a page of a mirror that is only read or fetched may become writable all the same,
    /// which spares a fault when it is written. A write makes it writable in any case. Of no
    /// meaning for the guest's own tables.
    pub map_writable: bool,
    /// The owner of the mirrored tables is known to have no mapping of the frame (it dropped one by
    /// itself, as a kernel does that reclaims memory): if the mirror has a leaf there that allows
    /// the access, the owner is asked to map it again, with the leave to write that the leaf has,
    /// or gets by this access. Without it such a fault ends as
    /// [`Spurious`](FaultOutcome::Spurious). Of no meaning for the guest's own tables.
    pub again: bool,
}

impl Fault {
    /// A fault of the guest.
    pub const fn new(gfn: Gfn, access: Access) -> Self {
        Self {
            gfn,
            access,
            prefetch: false,
            max_level: Level::SIZE_256T,
            seq: None,
            present: false,
            mirror: false,
            map_writable: true,
            again: false,
        }
    }

    /// A mapping made in advance.
    pub const fn prefetch(gfn: Gfn) -> Self {
        Self {
            prefetch: true,
            ..Self::new(gfn, Access::Read)
        }
    }

    /// The same with a limit on the mapping level.
    #[must_use]
    pub const fn with_max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }

    /// The same, of which the walk said [`WalkFault::Permission`](crate::WalkFault::Permission) or
    /// [`WalkFault::AccessedDirty`](crate::WalkFault::AccessedDirty).
    #[must_use]
    pub const fn with_present(mut self) -> Self {
        self.present = true;
        self
    }

    /// The same for the mirrored tables.
    #[must_use]
    pub const fn with_mirror(mut self) -> Self {
        self.mirror = true;
        self
    }

    /// The same, but what is not written does not become writable.
    #[must_use]
    pub const fn read_only(mut self) -> Self {
        self.map_writable = false;
        self
    }

    /// The same, for a frame that the owner of the mirrored tables has no mapping of.
    #[must_use]
    pub const fn again(mut self) -> Self {
        self.again = true;
        self
    }

    /// The same, to be retried if an invalidation ended after `seq` was read.
    #[must_use]
    pub const fn with_seq(mut self, seq: u64) -> Self {
        self.seq = Some(seq);
        self
    }
}

/// How a fault ended (`RET_PF_*`).
///
/// After [`Fixed`](Self::Fixed) and [`Spurious`](Self::Spurious) the faulting vCPU drops what its
/// own TLB holds for the frame and repeats the access: a translation that allowed less (x86 drops
/// it by itself as it faults), and, on a format with
/// [`install_needs_fence`](crate::FormatInfo::install_needs_fence), the memory that entries were
/// invalid, for which [`install_fence`](crate::SecondStage::install_fence) says what to fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault's outcome decides how the vCPU goes on"]
#[non_exhaustive]
pub enum FaultOutcome {
    /// A mapping was installed or upgraded.
    Fixed {
        /// Its level.
        level: Level,
    },
    /// The access was allowed already; another vCPU was faster.
    Spurious {
        /// The level of the mapping.
        level: Level,
    },
    /// The memory is being taken back, its slot or root is going, or another thread owns an entry
    /// on the path. Enter the guest again. In a mirror that thread may be waiting for the owner of
    /// the tables, for milliseconds: who has nothing else to do should give its turn away.
    Retry,
    /// The owner of the mirrored tables refused the change. Nothing is mapped that was not before.
    Refused(Refused),
    /// No slot covers the frame: the access is the device model's.
    NoSlot,
    /// A write to a read-only slot: the device model's.
    ReadOnly,
    /// The frame is beyond what the format can translate.
    OutOfRange,
    /// No memory for a table.
    OutOfMemory,
    /// The table holds something that the MMU did not write, at this level. The guest cannot be
    /// continued safely.
    BadEntry {
        /// Level of the entry.
        level: Level,
    },
    /// There is no such address space, or nobody who keeps the tables that a mirror would stand
    /// for.
    NoRoot,
}

/// Neighbours that are mapped together with a fault
/// ([`SecondStage::fault_range`](crate::SecondStage::fault_range)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Around {
    /// The frames whose contents are there. Whether the fault's own is among them does not matter.
    pub range: GfnRange,
    /// Whether they become writable where their slot is.
    pub map_writable: bool,
}

impl Around {
    /// Neighbours in `range`, writable.
    pub const fn new(range: GfnRange) -> Self {
        Self {
            range,
            map_writable: true,
        }
    }

    /// No neighbours.
    pub const fn none() -> Self {
        Self::new(GfnRange::new(Gfn(0), 0))
    }

    /// The same, but not writable.
    #[must_use]
    pub const fn read_only(mut self) -> Self {
        self.map_writable = false;
        self
    }
}

/// How a fault ended that maps its neighbours, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault's outcome decides how the vCPU goes on"]
#[non_exhaustive]
pub struct RangeOutcome {
    /// What came of the fault itself.
    pub outcome: FaultOutcome,
    /// Pages that are mapped now and were not before: the fault's own, if it is one, and
    /// neighbours.
    pub mapped: u64,
    /// Why a page, the fault's own or a neighbour, was not mapped by the owner: the first reason.
    pub refused: Option<Refused>,
}

impl RangeOutcome {
    pub(crate) const fn alone(outcome: FaultOutcome) -> Self {
        Self {
            outcome,
            mapped: 0,
            refused: None,
        }
    }
}
