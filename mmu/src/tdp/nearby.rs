//! A fault in the slot of the last one.
//!
//! Most first touches fall into the slot of the vCPU's last fault, and, as guests touch memory in
//! order, into the 4 KiB table that it ended in. For those all decisions were made before: the vCPU
//! remembers the slot with the entry of its first page, and the table. What is left is what must be
//! asked each time under the lock: has the root gone, have slots changed, is memory being taken
//! back, has a table been retired (if so, a walk); then one compare-exchange from *empty*, without
//! a look before it: a line that another processor has just written then moves once, not twice.
//!
//! Whatever is not exactly this case is left to the whole path; nothing is decided here that is not
//! decided there.
//!
//! *Locking*: as a fault: the shared MMU lock.

use alloc::sync::Arc;

use super::{
    kept::{KeptSlot, Template},
    mmu::TdpMmu,
    vcpu::Vcpu,
};
use crate::{
    addr::{Gfn, Level},
    fault::{Access, Fault, FaultOutcome},
    format::Format,
    rcu::{cell::Counter, participants::Inside},
    slot::Memslot,
    table::{guard::Guard, hint::Hint, memory::TableMemory},
};

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn keep_slot(&self, slot: &Arc<Memslot>, generation: u64) -> KeptSlot {
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
            base: slot.spec.base_gfn.0,
            npages: slot.spec.npages,
            read: template(Access::Read),
            write: template(Access::Write),
            small: slot.dirty.is_some()
                || self.config.max_level.min(slot.spec.max_level) == Level::SIZE_4K,
        }
    }

    /// `None`: not such a case.
    #[inline(always)]
    pub(super) fn nearby_fault(&self, vcpu: &mut Vcpu, fault: &Fault) -> Option<FaultOutcome> {
        let Vcpu {
            reader,
            as_id,
            root: Some(root),
            slot: Some(kept),
            hint,
            ..
        } = vcpu
        else {
            return None;
        };
        let page = fault.gfn.0.wrapping_sub(kept.base);
        if page >= kept.npages
            || fault.prefetch
            || fault.mirror
            || !(fault.max_level == Level::SIZE_4K
                || kept.small
                || (hint.is_about::<F>(fault.gfn) && hint.is_small_in(kept.generation)))
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
        let guard = Guard::new(&self.tables, self.lock.shared(reader));
        if root.is_invalid()
            || self.spaces[usize::from(*as_id)].generation() != kept.generation
            || self.invalidations.must_retry(fault.gfn, fault.seq)
        {
            return None;
        }
        let node = match hint.node::<F, H>(&guard, fault.gfn) {
            Some(node) => node,
            None => {
                let again = hint.comes_again::<F>(fault.gfn);
                let found = again.then(|| Hint::begin(&guard));
                let node = guard.bottom(&root.table, fault.gfn)?;
                if let Some(mut found) = found {
                    let small = kept.small.then_some(kept.generation);
                    found.found(node, fault.gfn, small);
                    *hint = found;
                }
                node
            }
        };
        let raw = template
            .raw
            .wrapping_add(F::leaf_step(Level::SIZE_4K).wrapping_mul(page));
        let index = F::index(fault.gfn, Level::SIZE_4K);
        node.replace(index, F::EMPTY, raw).ok()?;
        reader.add_pages(Level::SIZE_4K.index(), 1);
        reader.count(Counter::Fixed, 1);
        if template.dirties {
            kept.slot.mark_dirty(Gfn(fault.gfn.0));
        }
        Some(FaultOutcome::Fixed {
            level: Level::SIZE_4K,
        })
    }

    /// The slot over `gfn`, or `None`. `kept` is what the vCPU remembers.
    #[inline(always)]
    pub(super) fn slot_of<'k>(
        &self,
        inside: &Inside<'_>,
        as_id: u8,
        gfn: Gfn,
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
