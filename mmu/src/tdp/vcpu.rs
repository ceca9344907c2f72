//! What a vCPU brings along.
//!
//! The counterpart of the MMU's part of `struct kvm_vcpu`: a reader slot, a cache of
//! tables that is filled before the lock is taken, the roots it has loaded, and what it remembers
//! from its last fault. It is handed to each call as `&mut`, so one thread at a time uses it and
//! none of this needs a lock.
//!
//! A vCPU that is dropped leaves its tables and roots on the MMU's *free list*, which is emptied by
//! [`reclaim`](crate::SecondStage::reclaim) and when the MMU goes.

use alloc::{sync::Arc, vec::Vec};
use core::fmt;

use super::{
    kept::KeptSlot,
    root::{Root, RootPage},
    work::Work,
};
use crate::{
    rcu::participants::ReaderSlot,
    sync::{Counted, Mutex},
    table::{hint::Hint, ticket::Blank},
};

/// A vCPU's part of the MMU; made by [`SecondStage::vcpu`](crate::SecondStage::vcpu).
pub struct Vcpu {
    pub(super) reader: ReaderSlot,
    pub(super) as_id: u8,
    pub(super) cache: Vec<Blank>,
    pub(super) root: Option<Counted<RootPage>>,
    pub(super) mirror: Option<Counted<RootPage>>,
    /// The slot of the last fault.
    pub(super) slot: Option<KeptSlot>,
    pub(super) hint: Hint,
    /// A fault of this vCPU made an entry point to a table, and no fence for it was handed out yet
    /// (see `fence`).
    pub(super) linked: bool,
    /// What a fault in a mirror asks the owner for; kept for its memory.
    pub(super) work: Work,
    pub(super) free_list: Arc<FreeList>,
}

impl Vcpu {
    /// The address space that the vCPU runs in.
    pub fn as_id(&self) -> u8 {
        self.as_id
    }

    /// The root that the vCPU has loaded, withdrawn or not: the one that its last
    /// [`access`](crate::SecondStage::access) walked from, and a tag for what a TLB of its own
    /// keeps of that walk. `None` before it has loaded any.
    pub fn root(&self) -> Option<Root> {
        self.root.as_ref().map(|root| root.root())
    }

    /// Moves the vCPU to another address space: its next access loads that one's root. An address
    /// space that does not exist has no root, and each fault says so.
    pub fn set_as_id(&mut self, as_id: u8) {
        if self.as_id != as_id {
            self.as_id = as_id;
            self.slot = None;
            self.hint = Hint::default();
            self.free_list
                .leave(Vec::new(), self.root.take(), self.mirror.take());
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let cache = core::mem::take(&mut self.cache);
        self.free_list
            .leave(cache, self.root.take(), self.mirror.take());
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
pub(super) struct FreeList(Mutex<Left>);

type Left = (Vec<Blank>, Vec<Counted<RootPage>>);

impl FreeList {
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
