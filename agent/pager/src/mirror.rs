//! The mirror: an MMU of the guest's own format whose roots stand for what the kernel has mapped.
//!
//! *Locking*: the MMU's own. Its owner ([`Owner`]) is called without any of it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use slat_arch::GuestStage;
use slat_mmu::{AddressSpace, Gfn, Level, MmuConfig, Pfn, SecondStage, SlotFlags, SlotSpec};
use slat_paging::{uffd::Uffd, wire};

use crate::{
    drops::Drops,
    error::PagerError,
    memory::Memory,
    owner::Owner,
    tables::{BEHIND, Tables},
};

/// Frames for memories: what every format can hold in an entry.
const FRAMES: u64 = 1 << 36;

/// See the module.
#[derive(Debug)]
pub(crate) struct Mirror {
    pub(crate) uffd: Arc<Uffd>,
    pub(crate) owner: Arc<Owner>,
    pub(crate) mmu: Box<dyn SecondStage>,
    tables: Arc<Tables>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

impl Mirror {
    pub(crate) fn new(
        setup: &wire::Setup,
        uffd: Uffd,
        drops: Arc<Drops>,
    ) -> Result<Self, PagerError> {
        let stage: GuestStage = setup
            .format
            .parse()
            .map_err(|error| PagerError::Protocol(format!("the mirror's format: {error}")))?;
        let uffd = Arc::new(uffd);
        let owner = Arc::new(Owner::new(Arc::clone(&uffd), setup.can_protect, drops));
        let tables = Arc::new(Tables::new());
        let config = MmuConfig::default().with_max_level(Level::SIZE_4K);
        let mmu = stage.build(Arc::clone(&tables), Arc::clone(&owner), config);
        Ok(Self {
            uffd,
            owner,
            mmu,
            tables,
        })
    }

    pub(crate) fn space(&self) -> AddressSpace<'_> {
        self.mmu.space(0)
    }

    /// A slot for a memory.
    pub(crate) fn add(&self, memory: &Arc<Memory>, gfn: u64, view: u64) -> Result<(), PagerError> {
        self.owner.add(Arc::clone(memory), view);
        let slot = slot_id(memory)?;
        let spec = SlotSpec::new(slot, Gfn(gfn), memory.pages, Pfn(memory.pfn));
        let flags = match memory.read_only {
            true => SlotFlags::READONLY,
            false => SlotFlags::empty(),
        };
        let made = self.mmu.create_slot(spec.with_flags(flags));
        made.map_err(|error| {
            self.owner.remove(memory);
            PagerError::Protocol(format!("memory {}: {error}", memory.id))
        })
    }

    /// The memory's slot is gone, and all mappings of it.
    pub(crate) fn remove(&self, memory: &Memory) {
        self.owner.gone(memory);
        if let Ok(slot) = slot_id(memory) {
            // It was made when the memory was added.
            let deleted = self.space().delete_slot(slot);
            debug_assert!(deleted.is_ok(), "{deleted:?}");
        }
        self.owner.remove(memory);
    }

    /// Nothing is served any more: gives the tables back without asking for anything.
    pub(crate) fn end(&self) {
        self.owner.end();
        self.space().withdraw_mirrors();
        self.mmu.zap_invalidated_roots();
        self.mmu.reclaim();
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.tables.bytes()
    }
}

pub(crate) fn slot_id(memory: &Memory) -> Result<u16, PagerError> {
    let slot = u16::try_from(memory.slot);
    slot.map_err(|_| PagerError::Protocol(format!("memory {}: slot {}", memory.id, memory.slot)))
}

/// Gives each memory frames of its own.
#[derive(Debug)]
pub(crate) struct Frames(AtomicU64);

impl Frames {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(BEHIND))
    }

    /// Frames for so many pages. Some are left between two memories: no change is of both.
    pub(crate) fn take(&self, pages: u64) -> Result<u64, PagerError> {
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                let end = next.checked_add(pages)?.checked_add(512)?;
                (end <= FRAMES).then(|| end.next_multiple_of(512))
            });
        taken.map_err(|_| PagerError::Protocol("more memory than frames".to_owned()))
    }
}
