//! The state of one MMU, and how it begins and ends.
//!
//! The operations are methods on it, each in a file of its own. Fields that are changed by several
//! of them are behind the locks that `locks` lists.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::fmt;

use super::{
    config::MmuConfig,
    nx_list::NxTables,
    root::{RootPage, SeparateCount},
    vcpu::FreeList,
};
use crate::{
    flush::{Flush, FlushCause, FlushRequest},
    format::Format,
    host::Host,
    invalidate::Invalidations,
    rcu::{buffer::Buffers, lock::MmuLock, participants::Participants},
    slot::{Limits, SlotSet},
    stats::{self, FlushCounters, MmuStats, OwnerCounters},
    sync::{AtomicU64, Counted, Mutex},
    table::{memory::TableMemory, tables::Tables, ticket::Blank},
};

/// A guest's second-stage page tables of format `F`, in memory `H`.
///
/// Its operations are the methods of [`SecondStage`](super::SecondStage), and of the
/// [`AddressSpace`](super::AddressSpace) handles that it gives out.
pub struct TdpMmu<F: Format, H: TableMemory> {
    pub(super) config: MmuConfig,
    pub(super) host: Box<dyn Host>,
    pub(super) participants: Arc<Participants>,
    pub(super) lock: MmuLock,
    pub(super) tables: Tables<F, H>,
    /// One set of slots an address space. The lock of who changes them is the *slots lock*: it
    /// serialises all that changes slots or takes dirty bits, each with its flush.
    pub(super) spaces: Buffers<SlotSet>,
    pub(super) invalidations: Invalidations,
    pub(super) roots: Mutex<Vec<Counted<RootPage>>>,
    pub(super) root_generation: AtomicU64,
    /// Leaves that are not counted in cells.
    pub(super) separate_counts: Mutex<Vec<Arc<SeparateCount>>>,
    pub(super) flushes: FlushCounters,
    pub(super) owner: OwnerCounters,
    pub(super) nx_tables: NxTables,
    pub(super) free_list: Arc<FreeList>,
    /// Tables that work ahead of faults leaves for them (`stock`).
    pub(super) reserve: Mutex<Vec<Blank>>,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// An MMU without slots and without a root. `host` carries out its flushes;
    /// [`NoTlb`](crate::NoTlb) where there is nothing to flush.
    pub fn new(memory: H, host: impl Host + 'static, config: MmuConfig) -> Self {
        let participants = Participants::new();
        let spaces = usize::from(config.address_spaces.max(1));
        let space = |as_id| {
            let limits = Limits {
                as_id: as_id as u8,
                slots: config.max_slots,
                gfn: F::MAX_GFN,
                pfn: F::MAX_PFN,
                memory_types: config.memory_types || !F::OPTIONAL_MEMORY_TYPES,
            };
            SlotSet::new(limits)
        };
        Self {
            config,
            host: Box::new(host),
            lock: MmuLock::new(Arc::clone(&participants)),
            tables: Tables::new(memory, Arc::clone(&participants)),
            spaces: Buffers::new(Arc::clone(&participants), spaces, space),
            participants,
            invalidations: Invalidations::new(),
            roots: Mutex::new(Vec::new()),
            root_generation: AtomicU64::new(0),
            separate_counts: Mutex::new(Vec::new()),
            flushes: FlushCounters::new(),
            owner: OwnerCounters::new(),
            nx_tables: NxTables::new(),
            free_list: Arc::new(FreeList::new()),
            reserve: Mutex::new(Vec::new()),
        }
    }

    /// Where the tables live.
    pub fn memory(&self) -> &H {
        self.tables.memory()
    }

    /// Asks the host for a flush, unless it is none.
    pub(super) fn flush(&self, flush: Flush, cause: FlushCause, as_id: u8) {
        if !flush.is_none() {
            self.flushes.count(flush, cause);
            self.host.flush(&FlushRequest::new(flush, cause, as_id));
        }
    }

    pub(super) fn snapshot(&self) -> MmuStats {
        let roots = self.roots.lock().len() as u64;
        let mut stats = stats::snapshot(
            &self.participants,
            &self.flushes,
            &self.owner,
            self.tables.live(),
            self.tables.retired(),
            roots,
        );
        for count in self.separate_counts.lock().iter() {
            for (level, pages) in stats.pages.iter_mut().enumerate() {
                *pages = pages.wrapping_add(count.pages(level) as i64);
            }
        }
        stats
    }

    /// Takes back what vCPUs left behind, and frees tables whose grace period is over.
    pub(super) fn tidy(&self) {
        let (blanks, roots) = self.free_list.empty();
        for blank in blanks {
            self.tables.free_blank(blank);
        }
        for root in roots {
            self.put_root(root);
        }
        self.tables.reclaim();
    }
}

impl<F: Format, H: TableMemory> Drop for TdpMmu<F, H> {
    fn drop(&mut self) {
        // A dead guest's TLBs are the owner's business.
        self.tear_down();
        self.tidy();
    }
}

impl<F: Format, H: TableMemory> fmt::Debug for TdpMmu<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdpMmu")
            .field("format", &F::NAME)
            .field("config", &self.config)
            .field("tables", &self.tables)
            .field("stats", &self.snapshot())
            .finish_non_exhaustive()
    }
}
