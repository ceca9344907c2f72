//! A guest's fault and what came of it.

use crate::{
    addr::{Gfn, Level},
    flush::Flush,
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
    /// [`SecondStage::invalidate_seq`](crate::SecondStage::invalidate_seq), read before the caller made the memory
    /// behind `gfn` available. `None` if it did nothing outside the MMU.
    pub seq: Option<u64>,
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

    /// The same, to be retried if an invalidation ended after `seq` was read.
    #[must_use]
    pub const fn with_seq(mut self, seq: u64) -> Self {
        self.seq = Some(seq);
        self
    }
}

/// How a fault ended (`RET_PF_*`).
///
/// After [`Fixed`](Self::Fixed) and [`Spurious`](Self::Spurious) the faulting vCPU drops what its own TLB holds for the
/// frame and repeats the access. On a format with
/// [`install_needs_fence`](crate::FormatInfo::install_needs_fence), dropping it takes a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault's outcome decides how the vCPU goes on, and may carry a flush"]
#[non_exhaustive]
pub enum FaultOutcome {
    /// A mapping was installed or upgraded.
    Fixed {
        /// Its level.
        level: Level,
        /// Owed before the vCPU goes on: a table was replaced by a huge mapping.
        flush: Flush,
    },
    /// The access was allowed already; another vCPU was faster.
    Spurious {
        /// The level of the mapping.
        level: Level,
    },
    /// The memory is being taken back, or another thread owns an entry on the path. Enter the guest again.
    Retry,
    /// No slot holds the frame: emulate the access as MMIO.
    NoSlot,
    /// A write to a read-only slot: emulate it.
    ReadOnly,
    /// The frame is beyond what the format translates.
    OutOfRange,
    /// The host had no memory for a table. Nothing was lost; the fault may be repeated.
    OutOfMemory,
    /// The table holds an entry that this MMU does not write. Its memory was overwritten by something else.
    BadEntry {
        /// Where on the path.
        level: Level,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefetch_reads_and_never_writes() {
        let fault = Fault::prefetch(Gfn(1))
            .with_max_level(Level::SIZE_4K)
            .with_seq(7);
        assert_eq!(
            (fault.access, fault.prefetch, fault.seq),
            (Access::Read, true, Some(7))
        );
    }
}
