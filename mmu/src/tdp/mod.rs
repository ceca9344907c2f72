//! The TDP MMU: one guest's second-stage page tables.
//!
//! | file | what |
//! |---|---|
//! | `config` | choices for an MMU's life |
//! | `stage` | [`SecondStage`]: the operations as users call them |
//! | `vcpu` | what a vCPU brings along: its seat, its caches, its roots |
//! | `root` | roots: made, withdrawn, given back |
//! | `session`, `sweep` | holding the lock over a range, with yields and owed flushes |
//! | `fault`, `nearby`, `fast`, `level` | resolving a fault: under the shared lock, beside the last one, without the lock; at which level |
//! | `fence` | what a vCPU fences after a fault, where hardware remembers invalid entries |
//! | `prefault` | mapping a range in advance |
//! | `walk`, `leaves`, `list` | lockless walks; listing what is mapped |
//! | `slots` | memory slots come, change and go |
//! | `dirty`, `protect` | the dirty log; taking W and D away |
//! | `split`, `recover` | huge leaf → table, and back |
//! | `zap` | removing leaves, tables, roots |
//! | `age` | Accessed bits, without the lock |
//! | `nx` | the NX-huge-page mitigation |
//! | `mirror` | tables that an external owner keeps |
//!
//! # Locking
//!
//! | operation | MMU lock | yields | flush | roots |
//! |---|---|---|---|---|
//! | fault, pre-fault | shared | no | range if a table becomes a leaf | the vCPU's |
//! | fast fault, walk, listing leaves | none (inside) | – | none | the vCPU's |
//! | unmap, invalidate | exclusive | unless atomic | before yield and at the end | valid, invalid |
//! | write-protect, clear dirty of a slot | shared + slots lock | yes | by the caller of the sweep | valid |
//! | harvest, clear dirty log | exclusive + slots lock | yes | after the lock, iff a bit was taken | valid |
//! | write-protect a frame | exclusive | no | before the lock goes | valid |
//! | split | shared + slots lock, or exclusive | yes | none | valid |
//! | recover huge pages | shared + slots lock | yes | before yield and at the end | valid |
//! | withdraw roots | exclusive | no | all, before the lock goes | valid, not mirrors |
//! | zap withdrawn roots | shared | yes | none | withdrawn |
//! | age | none (inside) | – | none | valid |
//! | NX recovery | shared | yes | before yield and at the end | valid |
//!
//! The order of locks is in [`crate::rcu`]. Slots are looked up inside, without a lock; changing them takes the slots lock and
//! waits for those who may still see the old ones.
//!
//! # Observers
//!
//! - A vCPU that walks sees each entry before or after a change, and never a table that was given back.
//! - Once an operation has returned, no walk that begins later uses what it removed, and no TLB does.
//! - A page's dirty bit is set after its writable entry is installed and before the guest can use it; a harvest takes
//!   bits, then protects, then flushes: no write goes unseen.
//!
//! # Invariants
//!
//! - A leaf maps what the slot over it says; a frame without a slot has no leaf.
//! - While a slot logs writes by protection, each page under a writable leaf has its dirty bit set, or its fault has not
//!   returned yet.
//! - Under the shared lock, a 4 KiB leaf with W and D set is changed by nobody but the holder of the slots lock, teardown of
//!   the table it is in, and ageing (which may be lost). So the holder of the slots lock may store plainly.
//! - `MmuStats::pages` counts the leaves reachable from roots, valid or not.

mod age;
mod config;
mod dirty;
mod fast;
mod fault;
mod fence;
mod leaves;
mod level;
mod list;
mod mirror;
mod nearby;
mod nx;
mod prefault;
mod protect;
mod recover;
mod root;
mod session;
mod slots;
mod split;
mod stage;
mod sweep;
mod vcpu;
mod walk;
mod zap;

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests;

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::fmt;

pub use self::{
    config::{DirtyLogStart, MmuConfig},
    dirty::DirtyLogError,
    leaves::{LeafBatch, MappedLeaf},
    list::Leaves,
    prefault::PrefaultError,
    root::Root,
    stage::SecondStage,
    vcpu::Vcpu,
    walk::{Translation, Walk, WalkFault, WalkStep, Walker, WalkerSeat},
};
use self::{
    nx::NxTables,
    root::{Apart, RootPage},
    vcpu::Bin,
};
use crate::{
    flush::{Flush, FlushCause, FlushRequest},
    format::Format,
    host::Host,
    invalidate::Invalidations,
    rcu::{buffer::Buffers, lock::MmuLock, registry::Registry},
    slot::{Limits, SlotSet},
    stats::{self, FlushCounters, MmuStats},
    sync::{AtomicU64, Counted, Mutex},
    table::{memory::TableMemory, tables::Tables},
};

/// A guest's second-stage page tables of format `F`, in memory `H`.
///
/// Its operations are the methods of [`SecondStage`].
pub struct TdpMmu<F: Format, H: TableMemory> {
    config: MmuConfig,
    host: Box<dyn Host>,
    registry: Arc<Registry>,
    lock: MmuLock,
    tables: Tables<F, H>,
    /// One set of slots an address space. The lock of who changes them is the *slots lock*: it serialises all that changes slots
    /// or takes dirty bits, each with its flush.
    spaces: Buffers<SlotSet>,
    invalidations: Invalidations,
    roots: Mutex<Vec<Counted<RootPage>>>,
    root_generation: AtomicU64,
    /// Leaves that are not counted in cells.
    apart: Mutex<Vec<Arc<Apart>>>,
    flushes: FlushCounters,
    nx_tables: NxTables,
    bin: Arc<Bin>,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// An MMU without slots and without a root. `host` carries out its flushes; [`NoTlb`](crate::NoTlb) where there is
    /// nothing to flush.
    pub fn new(memory: H, host: impl Host + 'static, config: MmuConfig) -> Self {
        let registry = Registry::new();
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
            lock: MmuLock::new(Arc::clone(&registry)),
            tables: Tables::new(memory, Arc::clone(&registry)),
            spaces: Buffers::new(Arc::clone(&registry), spaces, space),
            registry,
            invalidations: Invalidations::new(),
            roots: Mutex::new(Vec::new()),
            root_generation: AtomicU64::new(0),
            apart: Mutex::new(Vec::new()),
            flushes: FlushCounters::new(),
            nx_tables: NxTables::new(),
            bin: Arc::new(Bin::new()),
        }
    }

    /// Where the tables live.
    pub fn memory(&self) -> &H {
        self.tables.memory()
    }

    /// Asks the host for a flush, unless it is none.
    fn flush(&self, flush: Flush, cause: FlushCause, as_id: u8) {
        if !flush.is_none() {
            self.flushes.count(flush, cause);
            self.host.flush(&FlushRequest::new(flush, cause, as_id));
        }
    }

    fn snapshot(&self) -> MmuStats {
        let roots = self.roots.lock().len() as u64;
        let mut stats = stats::snapshot(
            &self.registry,
            &self.flushes,
            self.tables.live(),
            self.tables.retired(),
            roots,
        );
        for apart in self.apart.lock().iter() {
            for (slot, pages) in stats.pages.iter_mut().enumerate() {
                *pages = pages.wrapping_add(apart.pages(slot) as i64);
            }
        }
        stats
    }

    /// Takes back what vCPUs left behind, and frees tables whose grace period is over.
    fn tidy(&self) {
        let (blanks, roots) = self.bin.empty();
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
