//! Which level a fault is mapped at.
//!
//! The coarsest that everyone allows: the format, the configuration, the slot's backing and
//! alignment, the places where huge mappings are forbidden, the host's own mapping, the fault.
//! While a slot logs writes it is 4 KiB, because a page is the unit of the log. While memory is
//! being taken back, no mapping reaches into it, however far from it the fault is.
//!
//! *Locking*: inside, with the MMU lock in either mode: the host's mapping may not shrink between
//! the question and the mapping, which the invalidation sequence sees to.

use super::mmu::TdpMmu;
use crate::{
    addr::{Gfn, GfnRange, Level},
    fault::{Access, Fault},
    format::Format,
    slot::Memslot,
    table::memory::TableMemory,
};

/// Where a fault is mapped, and whether it would be coarser but for the NX mitigation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    pub(super) level: Level,
    /// What slot and host would allow (`req_level`).
    pub(super) allowed: Level,
}

impl Goal {
    pub(super) fn nx_disallowed(self) -> bool {
        self.level < self.allowed
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    #[inline(always)]
    pub(super) fn goal(&self, slot: &Memslot, fault: &Fault) -> Goal {
        let limit = self.config.max_level.min(slot.spec.max_level);
        let limit = limit.min(fault.max_level);
        if limit == Level::SIZE_4K || slot.dirty.is_some() {
            return Goal {
                level: Level::SIZE_4K,
                allowed: Level::SIZE_4K,
            };
        }
        self.goal_below(slot, fault, limit)
    }

    /// Whether nothing coarser than 4 KiB can be mapped over `gfn` for as long as slots stay as
    /// they are: for reasons that do not come and go, as invalidations, the host's mapping and
    /// forbidden places do.
    #[inline(always)]
    pub(super) fn is_always_small(&self, slot: &Memslot, gfn: Gfn) -> bool {
        slot.dirty.is_some()
            || self.config.max_level.min(slot.spec.max_level) == Level::SIZE_4K
            || !slot.allows_span(gfn, F::span(Level::SIZE_2M))
    }

    #[cold]
    #[inline(never)]
    fn goal_below(&self, slot: &Memslot, fault: &Fault, limit: Level) -> Goal {
        let mut allowed = self.allowed_level(slot, fault.gfn, limit);
        // The fault's own frame is not being taken back, but its neighbours may be.
        while let Some(finer) = allowed.child() {
            let span = GfnRange::new(F::align_down(fault.gfn, allowed), F::span(allowed));
            if !self.invalidations.overlaps(span) {
                break;
            }
            allowed = finer;
        }
        let nx = self.avoids_executable_huge_pages() && fault.access == Access::Execute;
        Goal {
            level: if nx { Level::SIZE_4K } else { allowed },
            allowed,
        }
    }

    /// The coarsest level, up to `limit`, at which slot and host allow a mapping over `gfn`.
    pub(super) fn allowed_level(&self, slot: &Memslot, gfn: Gfn, limit: Level) -> Level {
        let mut level = F::MAX_LEAF_LEVEL
            .min(self.config.max_level)
            .min(slot.spec.max_level)
            .min(limit);
        level = self.lower(slot, gfn, level);
        if level > Level::SIZE_4K {
            level = self.lower(
                slot,
                gfn,
                level.min(self.host.mapping_level(&slot.spec, gfn)),
            );
        }
        level
    }

    fn lower(&self, slot: &Memslot, gfn: Gfn, mut level: Level) -> Level {
        while let Some(finer) = level.child() {
            if slot.allows_span(gfn, F::span(level))
                && slot.huge.allows(level, F::align_down(gfn, level))
            {
                break;
            }
            level = finer;
        }
        level
    }
}
