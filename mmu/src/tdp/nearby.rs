//! A fault beside the last one.
//!
//! Guests touch memory in order, so most first touches fall into the 4 KiB table that the vCPU's last fault ended in, of the
//! same slot. For those all decisions were made before: the vCPU remembers the slot with the entry of its first page, and
//! the table. What is left is what must be asked each time under the lock: has the root gone, have slots changed, has a
//! table been retired, is memory being taken back, is the entry still empty; then one compare-exchange.
//!
//! Whatever is not exactly this case is left to the whole path; nothing is decided here that is not decided there.
//!
//! *Locking*: as a fault: the shared MMU lock.

use alloc::sync::Arc;

use super::{TdpMmu, vcpu::Vcpu};
use crate::{
    addr::{Gfn, Level},
    fault::{Access, Fault, FaultOutcome},
    format::Format,
    rcu::cell::Counter,
    slot::Slot,
    table::{memory::TableMemory, node::Guard},
};

/// A slot as a vCPU remembers it.
#[derive(Debug)]
pub(super) struct KeptSlot {
    pub(super) slot: Arc<Slot>,
    /// The generation of slots in which it was found.
    pub(super) generation: u64,
    /// The 4 KiB entries for the slot's first page: of a read or fetch, and of a write. 0: not to be used.
    read: Template,
    write: Template,
}

#[derive(Clone, Copy, Debug)]
struct Template {
    raw: u64,
    /// The page counts as written.
    dirties: bool,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn keep_slot(&self, slot: &Arc<Slot>, generation: u64) -> KeptSlot {
        let template = |access| {
            let level = Level::SIZE_4K;
            let first = slot.spec.base_gfn;
            let leaf = self.new_leaf(slot, first, level, &Fault::new(first, access));
            let refused = slot.invalid || (access == Access::Write && slot.is_readonly());
            Template {
                raw: if refused {
                    0
                } else {
                    F::make_leaf(&leaf, level)
                },
                dirties: slot.dirty.is_some() && leaf.writable && leaf.dirty,
            }
        };
        KeptSlot {
            slot: Arc::clone(slot),
            generation,
            read: template(Access::Read),
            write: template(Access::Write),
        }
    }

    /// `None`: not such a case.
    #[inline(always)]
    pub(super) fn nearby_fault(&self, vcpu: &mut Vcpu, fault: &Fault) -> Option<FaultOutcome> {
        let Vcpu {
            seat,
            as_id,
            root: Some(root),
            slot: Some(kept),
            hint,
            ..
        } = vcpu
        else {
            return None;
        };
        let page = fault.gfn.0.wrapping_sub(kept.slot.spec.base_gfn.0);
        if page >= kept.slot.spec.npages
            || fault.prefetch
            || fault.mirror
            || !hint.is_about::<F>(fault.gfn)
            || !(fault.max_level == Level::SIZE_4K || hint.is_small_in(kept.generation))
        {
            return None;
        }
        let template = match fault.access {
            Access::Write => kept.write,
            _ => kept.read,
        };
        if template.raw == 0 {
            return None;
        }
        let guard = Guard::new(&self.tables, self.lock.shared(seat));
        let node = hint.node::<F, H>(&guard, fault.gfn)?;
        if root.is_invalid()
            || self.spaces[usize::from(*as_id)].generation() != kept.generation
            || self.invalidations.must_retry(fault.gfn, fault.seq)
        {
            return None;
        }
        let raw = template
            .raw
            .wrapping_add(F::leaf_step(Level::SIZE_4K).wrapping_mul(page));
        let index = F::index(fault.gfn, Level::SIZE_4K);
        if node.load(index) != F::EMPTY {
            return None;
        }
        node.replace(index, F::EMPTY, raw).ok()?;
        seat.add_pages(Level::SIZE_4K.slot(), 1);
        seat.count(Counter::Fixed, 1);
        if template.dirties {
            kept.slot.mark_dirty(Gfn(fault.gfn.0));
        }
        Some(FaultOutcome::Fixed {
            level: Level::SIZE_4K,
        })
    }
}
