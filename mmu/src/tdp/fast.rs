//! The fast path: giving back a permission that bookkeeping took away, without the lock.
//!
//! A write to a page that lost its W bit to the dirty log, or a use of a page that was aged, needs
//! one bit and no decision. The vCPU goes inside, finds the leaf, and sets the bit by
//! compare-exchange. That is safe although anyone may be changing the tables: an entry of a table
//! always stands for the same frame, so if it still holds the value that was judged, the judgement
//! stands (`fast_page_fault`; ABA does no harm).
//!
//! The dirty bit is set *after* the exchange and before the guest can write. A harvest that took
//! the page's bits before the exchange, or protects it after, loses nothing: either it sees the bit
//! next time, or takes W away again.
//!
//! Anything that is not such a case is left to the slow path. *Locking*: none; inside.

use super::{mmu::TdpMmu, vcpu::Vcpu};
use crate::{
    addr::Level,
    fault::{Access, Fault, FaultOutcome},
    format::{AdPolicy, Entry, Format},
    rcu::cell::Counter,
    table::{guard::Guard, memory::TableMemory},
};

/// Lost exchanges before the slow path is taken.
const TRIES: usize = 4;

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// `None`: not a case for the fast path.
    pub(super) fn fast_fault(&self, vcpu: &mut Vcpu, fault: &Fault) -> Option<FaultOutcome> {
        let write = fault.access == Access::Write;
        let used = F::AD_POLICY != AdPolicy::Hardware;
        if fault.prefetch || !(write || used) {
            return None;
        }
        let Vcpu {
            reader,
            as_id,
            root: Some(root),
            slot,
            ..
        } = vcpu
        else {
            return None;
        };
        let guard = Guard::new(&self.tables, self.participants.pin(reader));
        let slot = &*self.slot_of(guard.inside(), *as_id, fault.gfn, slot)?.slot;
        if slot.invalid {
            return None;
        }
        for _ in 0..TRIES {
            let (node, raw) = guard.descend(&root.table, fault.gfn);
            let (level, index) = (node.level(), F::index(fault.gfn, node.level()));
            let Entry::Leaf(leaf) = F::decode(raw, level) else {
                return None;
            };
            let mut new = raw;
            if used && !leaf.accessed {
                new = F::with_accessed(new, true);
            }
            let gives_write = write && !leaf.writable;
            if gives_write {
                if !leaf.mmu_writable || (level > Level::SIZE_4K && slot.dirty.is_some()) {
                    return None;
                }
                new = F::with_writable(new, true);
            }
            if write && used && !leaf.dirty {
                new = F::with_dirty(new, true);
            }
            let allowed = match fault.access {
                Access::Read => leaf.readable,
                Access::Write => leaf.writable || gives_write,
                Access::Execute => leaf.executable,
            };
            if !allowed {
                return None;
            }
            if new == raw {
                reader.count(Counter::Fast, 1);
                return Some(FaultOutcome::Spurious { level });
            }
            if node.replace(index, raw, new).is_ok() {
                if write && (gives_write || !leaf.dirty) {
                    slot.mark_dirty(fault.gfn);
                }
                reader.count(Counter::Fast, 1);
                return Some(FaultOutcome::Fixed { level });
            }
        }
        None
    }
}
