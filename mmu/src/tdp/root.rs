//! A root, and where its leaves are counted.
//!
//! What happens to roots is in `roots`.
//!
//! *Locking*: a root's fields are atomic. Where its leaves are counted is behind a lock of its own
//! (`locks`).

use alloc::sync::Arc;

use crate::{
    addr::{Level, MAX_LEVELS, Pfn},
    sync::{Acquire, AtomicBool, AtomicU64, Counted, Mutex, Relaxed},
    table::ticket::RootTable,
};

/// What a vCPU loads into `hgatp`, `EPTP`, `nCR3` or `VTTBR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Root {
    /// First frame of the root table.
    pub pfn: Pfn,
    /// Changes with each new root. A vCPU that loads another generation flushes its own TLB:
    /// entries may be tagged by something that stays the same (RISC-V's VMID).
    pub generation: u64,
}

/// Leaves that are not counted in cells.
#[derive(Debug)]
pub(super) struct SeparateCount {
    pages: [AtomicU64; MAX_LEVELS],
    /// Roots that they are under and that are not zapped yet.
    pub(super) roots: AtomicU64,
}

impl SeparateCount {
    pub(super) fn new(pages: [u64; MAX_LEVELS], roots: u64) -> Self {
        Self {
            pages: pages.map(AtomicU64::new),
            roots: AtomicU64::new(roots),
        }
    }

    pub(super) fn pages(&self, level: usize) -> u64 {
        self.pages[level].load(Relaxed)
    }
}

#[derive(Debug)]
pub(super) struct RootPage {
    /// Where its leaves are counted, if not in cells.
    pub(super) counted_in: Mutex<Option<Arc<SeparateCount>>>,
    pub(super) table: Counted<RootTable>,
    pub(super) as_id: u8,
    pub(super) mirror: bool,
    pub(super) generation: u64,
    pub(super) references: AtomicU64,
    pub(super) invalid: AtomicBool,
    /// Withdrawn, and nobody has begun to zap it.
    pub(super) to_zap: AtomicBool,
    /// Batches of changes that are over, of a mirror (`batch`).
    pub(super) batches_over: AtomicU64,
}

impl RootPage {
    #[inline(always)]
    pub(super) fn is_invalid(&self) -> bool {
        self.invalid.load(Acquire)
    }

    /// Batches that are over. To be read before a look at entries: then a batch that owns one of
    /// them is over when the number has changed, or a later one.
    pub(super) fn batches_over(&self) -> u64 {
        self.batches_over.load(Acquire)
    }

    /// Counts leaves of a mirror, or of a withdrawn root.
    pub(super) fn count_separately(&self, level: Level, by: i64) {
        if let Some(count) = &*self.counted_in.lock() {
            count.pages[level.index()].fetch_add(by as u64, Relaxed);
        }
    }

    pub(super) fn root(&self) -> Root {
        Root {
            pfn: self.table.pfn(),
            generation: self.generation,
        }
    }
}
