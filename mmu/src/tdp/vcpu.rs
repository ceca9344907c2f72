//! What a vCPU brings along.
//!
//! The counterpart of the MMU's part of `struct kvm_vcpu`: a seat in the registry, a cache of tables that is filled before
//! the lock is taken, the roots it has loaded, and what it remembers from its last fault. It is handed to each call as `&mut`,
//! so one thread at a time uses it and none of this needs a lock.
//!
//! A vCPU that is dropped leaves its tables and roots in the MMU's *bin*, which is emptied by
//! [`reclaim`](crate::SecondStage::reclaim) and when the MMU goes.

use alloc::{sync::Arc, vec::Vec};
use core::fmt;

use super::{
    TdpMmu,
    nearby::KeptSlot,
    root::{Root, RootPage},
};
use crate::{
    addr::MAX_LEVELS,
    format::Format,
    rcu::registry::{Inside, Seat},
    sync::{Counted, Mutex},
    table::{hint::Hint, memory::TableMemory, node::Blank},
};

/// Tables fetched at a time. A model needs no more than one fault does.
const CACHE: usize = if cfg!(any(feature = "loom", feature = "shuttle", miri)) {
    MAX_LEVELS - 1
} else {
    8
};

/// A vCPU's part of the MMU; made by [`SecondStage::vcpu`](crate::SecondStage::vcpu).
pub struct Vcpu {
    pub(super) seat: Seat,
    pub(super) as_id: u8,
    pub(super) cache: Vec<Blank>,
    pub(super) root: Option<Counted<RootPage>>,
    pub(super) mirror: Option<Counted<RootPage>>,
    /// The slot of the last fault.
    pub(super) slot: Option<KeptSlot>,
    pub(super) hint: Hint,
    /// A fault of this vCPU made an entry point to a table, and no fence for it was handed out yet (see `fence`).
    pub(super) linked: bool,
    bin: Arc<Bin>,
}

impl Vcpu {
    /// The address space that the vCPU runs in.
    pub fn as_id(&self) -> u8 {
        self.as_id
    }

    /// The root that the vCPU has loaded, withdrawn or not: the one that its last [`access`](crate::SecondStage::access) walked
    /// from, and a tag for what a TLB of its own keeps of that walk. `None` before it has loaded any.
    pub fn root(&self) -> Option<Root> {
        self.root.as_ref().map(|root| root.root())
    }

    /// Moves the vCPU to another address space: its next access loads that one's root. An address space that does not exist
    /// has no root, and each fault says so.
    pub fn set_as_id(&mut self, as_id: u8) {
        if self.as_id != as_id {
            self.as_id = as_id;
            self.slot = None;
            self.hint = Hint::default();
            self.bin
                .leave(Vec::new(), self.root.take(), self.mirror.take());
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let cache = core::mem::take(&mut self.cache);
        self.bin.leave(cache, self.root.take(), self.mirror.take());
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("as_id", &self.as_id)
            .field("cached_tables", &self.cache.len())
            .finish_non_exhaustive()
    }
}

/// What vCPUs left behind.
#[derive(Debug)]
pub(super) struct Bin(Mutex<Left>);

type Left = (Vec<Blank>, Vec<Counted<RootPage>>);

impl Bin {
    pub(super) fn new() -> Self {
        Self(Mutex::new((Vec::new(), Vec::new())))
    }

    fn leave(
        &self,
        cache: Vec<Blank>,
        root: Option<Counted<RootPage>>,
        mirror: Option<Counted<RootPage>>,
    ) {
        let mut left = self.0.lock();
        left.0.extend(cache);
        left.1.extend(root.into_iter().chain(mirror));
    }

    pub(super) fn empty(&self) -> Left {
        core::mem::take(&mut *self.0.lock())
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_vcpu(&self) -> Vcpu {
        Vcpu {
            seat: self.registry.seat(),
            as_id: 0,
            cache: Vec::new(),
            root: None,
            mirror: None,
            slot: None,
            hint: Hint::default(),
            linked: false,
            bin: Arc::clone(&self.bin),
        }
    }

    /// Whether `vcpu` was made by this MMU.
    #[inline(always)]
    pub(super) fn owns(&self, vcpu: &Vcpu) -> bool {
        Arc::ptr_eq(&self.bin, &vcpu.bin)
    }

    /// Makes sure that a fault finds a table for each level; false without memory. Never with a lock held.
    #[inline(always)]
    pub(super) fn top_up(&self, cache: &mut Vec<Blank>) -> bool {
        cache.len() >= MAX_LEVELS - 1 || self.refill(cache, CACHE)
    }

    /// Fills `cache` up to `count` tables; true if a fault, or a split, has enough.
    #[cold]
    pub(super) fn refill(&self, cache: &mut Vec<Blank>, count: usize) -> bool {
        let enough = (F::INDEX_BITS.len() - 1).min(count);
        self.take_blanks(cache, count);
        if cache.len() < enough {
            // What other vCPUs left, and what waited for readers, may do.
            self.tidy();
            self.take_blanks(cache, enough);
        }
        cache.len() >= enough
    }

    fn take_blanks(&self, cache: &mut Vec<Blank>, count: usize) {
        let before = cache.len();
        while cache.len() < count
            && let Some(blank) = self.tables.blank()
        {
            cache.push(blank);
        }
        // They are taken from the end. Tables of neighbouring frames then lie as their frames do, which sweeps are the faster for.
        cache[before..].reverse();
    }

    /// The slot over `gfn`, or `None`. `kept` is what the vCPU remembers.
    #[inline(always)]
    pub(super) fn slot_of<'k>(
        &self,
        inside: &Inside<'_>,
        as_id: u8,
        gfn: crate::Gfn,
        kept: &'k mut Option<KeptSlot>,
    ) -> Option<&'k KeptSlot> {
        let space = self.spaces.get(usize::from(as_id))?;
        let generation = space.generation();
        let hit =
            matches!(kept, Some(kept) if kept.generation == generation && kept.slot.contains(gfn));
        if !hit {
            let found = space.read(inside).find(gfn)?;
            *kept = Some(self.keep_slot(found, generation));
        }
        kept.as_ref()
    }
}
