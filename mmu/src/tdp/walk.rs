//! Lock-free walks.
//!
//! What a vCPU does on a TLB miss. A walk sees each entry as it is at one moment; the table may
//! change while the walk goes down, and the result is then either the old or the new translation. A
//! TLB that keeps the result must make sure that a flush ordered *after* the walk began also hits
//! the entry: check for flush requests after filling the TLB and before using the entry.
//!
//! *Locking*: none; inside.

use core::fmt;

use thiserror::Error;

use super::{mmu::TdpMmu, vcpu::Vcpu};
use crate::{
    addr::{Gfn, Level, MAX_LEVELS, Pfn},
    fault::Access,
    format::{AdPolicy, DirtyLogPolicy, Entry, Format, Leaf},
    rcu::participants::{Participants, ReaderSlot},
    sync::Counted,
    table::{guard::Guard, hint::Hint, memory::TableMemory, ticket::RootTable},
};

/// Where a guest frame leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Translation {
    /// The host frame of exactly the guest frame asked for.
    pub pfn: Pfn,
    /// The level of the leaf; its neighbours in the same leaf are contiguous.
    pub level: Level,
    /// The guest may read.
    pub readable: bool,
    /// The guest may write.
    pub writable: bool,
    /// The guest may fetch instructions.
    pub executable: bool,
    /// Hardware would not note another use of it: Accessed is set.
    pub accessed: bool,
    /// Hardware would not note another write to it: Dirty is set. A TLB that holds the translation
    /// without it walks again at the first write.
    pub dirty: bool,
}

/// Why hardware would have faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WalkFault {
    /// Nothing is mapped.
    #[error("nothing is mapped")]
    NotPresent,
    /// The mapping does not allow the access.
    #[error("the mapping does not allow the access")]
    Permission,
    /// The mapping allows it, but Accessed or Dirty is clear and hardware does not set it.
    #[error("Accessed or Dirty is clear and hardware does not set it")]
    AccessedDirty,
    /// The frame is known to have no slot: the access is the device model's, without a look at
    /// slots. Only while the entry's generation is the current one; an older entry is reported as
    /// [`NotPresent`](Self::NotPresent).
    #[error("there is no memory slot: a device's")]
    Mmio,
    /// Bits that hardware does not accept.
    #[error("an entry holds bits that hardware does not accept")]
    Malformed,
}

/// One entry on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// Level of the entry.
    pub level: Level,
    /// Host physical address of the entry, in bytes.
    pub address: u64,
    /// The entry in the hardware's layout.
    pub raw: u64,
    /// The entry decoded.
    pub entry: Entry,
}

/// The entries from the root down to the one that ended the walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    steps: [Option<WalkStep>; MAX_LEVELS],
}

impl Walk {
    /// The entries, the root's first. None at all without a root or beyond the format.
    pub fn steps(&self) -> impl Iterator<Item = &WalkStep> {
        self.steps.iter().flatten()
    }

    /// The entry that ended the walk.
    pub fn last(&self) -> Option<&WalkStep> {
        self.steps().last()
    }
}

#[inline(always)]
fn translation<F: Format>(leaf: &Leaf, level: Level, gfn: Gfn) -> Translation {
    Translation {
        pfn: Pfn(leaf.pfn.0 + (gfn.0 & (F::span(level) - 1))),
        level,
        readable: leaf.readable,
        writable: leaf.writable,
        executable: leaf.executable,
        accessed: leaf.accessed,
        dirty: leaf.dirty,
    }
}

/// Where the entry `raw`, at which a walk ended, leads `gfn`.
#[inline(always)]
fn found<F: Format>(raw: u64, level: Level, gfn: Gfn) -> Option<Translation> {
    F::is_leaf(raw, level).then(|| translation::<F>(&F::leaf(raw, level), level, gfn))
}

/// Many walks in one read section: no cost per walk beyond the walk.
///
/// While it lives no table is given back, and nothing that waits for a grace period (changing
/// slots) gets on: keep it for as long as a vCPU stays in the guest, not longer. It stays on the
/// thread that entered.
pub struct Walker<'a, F: Format, H: TableMemory> {
    guard: Guard<'a, F, H>,
    root: Option<Counted<RootTable>>,
    hint: Hint,
}

impl<F: Format, H: TableMemory> Walker<'_, F, H> {
    /// Where `gfn` leads now. Changes nothing.
    #[inline(always)]
    pub fn translate(&mut self, gfn: Gfn) -> Option<Translation> {
        if gfn >= F::MAX_GFN {
            return None;
        }
        let root = self.root.as_ref()?;
        let found = |raw, level| found::<F>(raw, level, gfn);
        if !self.hint.comes_again::<F>(gfn) {
            return self
                .guard
                .descend_to(root, gfn, |_, raw, level| found(raw, level));
        }
        if let Some(node) = self.hint.node(&self.guard, gfn) {
            return found(node.load(F::index(gfn, Level::SIZE_4K)), Level::SIZE_4K);
        }
        // Where the walk ends each level is a constant: one read further on costs a tenth less.
        let hint = &mut self.hint;
        *hint = Hint::begin(&self.guard);
        self.guard.descend_to(root, gfn, |node, raw, level| {
            hint.found(node, gfn, None);
            found(raw, level)
        })
    }
}

impl<F: Format, H: TableMemory> fmt::Debug for Walker<'_, F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walker").finish_non_exhaustive()
    }
}

/// A place to walk from: see [`TdpMmu::walker`].
pub struct WalkerSlot<'a, F: Format, H: TableMemory> {
    mmu: &'a TdpMmu<F, H>,
    reader: ReaderSlot,
    participants: &'a Participants,
}

impl<F: Format, H: TableMemory> fmt::Debug for WalkerSlot<'_, F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WalkerSlot").finish_non_exhaustive()
    }
}

impl<F: Format, H: TableMemory> WalkerSlot<'_, F, H> {
    /// Begins a read section on the valid root of address space 0. One at a time: hence `&mut`.
    pub fn enter(&mut self) -> Walker<'_, F, H> {
        let guard = Guard::new(&self.mmu.tables, self.participants.pin(&self.reader));
        Walker {
            guard,
            root: self
                .mmu
                .valid_root(0, false)
                .map(|root| Counted::clone(&root.table)),
            hint: Hint::default(),
        }
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// For walking often.
    pub fn walker(&self) -> WalkerSlot<'_, F, H> {
        WalkerSlot {
            mmu: self,
            reader: self.participants.reader_slot(),
            participants: &self.participants,
        }
    }

    pub(super) fn do_walk(&self, as_id: u8, gfn: Gfn) -> Walk {
        let mut walk = Walk::default();
        if gfn >= F::MAX_GFN {
            return walk;
        }
        let reader = self.participants.brief_reader_slot();
        let guard = Guard::new(&self.tables, self.participants.pin(&reader));
        let Some(root) = self.valid_root(as_id, false) else {
            return walk;
        };
        let mut node = guard.root(&root.table);
        for step in &mut walk.steps {
            let (level, index) = (node.level(), F::index(gfn, node.level()));
            let raw = node.load(index);
            *step = Some(WalkStep {
                level,
                address: node.address_of(index),
                raw,
                entry: F::decode(raw, level),
            });
            // Reads the entry again: if it is a table no longer, what was seen stands.
            match guard.child(node, index) {
                Some(child) if F::as_table(raw, level).is_some() => node = child,
                _ => break,
            }
        }
        walk
    }

    pub(super) fn do_translate(&self, as_id: u8, gfn: Gfn) -> Option<Translation> {
        if gfn >= F::MAX_GFN {
            return None;
        }
        let reader = self.participants.brief_reader_slot();
        let guard = Guard::new(&self.tables, self.participants.pin(&reader));
        let root = self.valid_root(as_id, false)?;
        guard.descend_to(&root.table, gfn, |_, raw, level| {
            found::<F>(raw, level, gfn)
        })
    }

    pub(super) fn do_access(
        &self,
        vcpu: &mut Vcpu,
        gfn: Gfn,
        access: Access,
    ) -> Result<Translation, WalkFault> {
        // Without a root nothing is mapped; the fault makes one, outside the guest.
        if gfn >= F::MAX_GFN || !self.owns(vcpu) || !self.load_root_if_any(vcpu) {
            return Err(WalkFault::NotPresent);
        }
        let Vcpu {
            reader,
            as_id,
            root: Some(root),
            slot,
            ..
        } = vcpu
        else {
            return Err(WalkFault::NotPresent);
        };
        let guard = Guard::new(&self.tables, self.participants.pin(reader));
        loop {
            let (node, raw) = guard.descend(&root.table, gfn);
            let level = node.level();
            let leaf = match F::decode(raw, level) {
                Entry::Leaf(leaf) => leaf,
                Entry::Malformed => return Err(WalkFault::Malformed),
                Entry::Mmio { generation } if generation == self.mmio_generation(*as_id) => {
                    return Err(WalkFault::Mmio);
                }
                _ => return Err(WalkFault::NotPresent),
            };
            let allowed = match access {
                Access::Read => leaf.readable,
                Access::Write => leaf.writable,
                Access::Execute => leaf.executable,
            };
            if !allowed {
                return Err(WalkFault::Permission);
            }
            let lacks_dirty = access == Access::Write && !leaf.dirty;
            if leaf.accessed && !lacks_dirty {
                return Ok(translation::<F>(&leaf, level, gfn));
            }
            if F::AD_POLICY != AdPolicy::Hardware {
                return Err(WalkFault::AccessedDirty);
            }
            let mut new = F::with_accessed(raw, true);
            if lacks_dirty {
                new = F::with_dirty(new, true);
            }
            // Like hardware: set the bits only in the entry that was judged, or walk again.
            if node.replace(F::index(gfn, level), raw, new).is_err() {
                continue;
            }
            if lacks_dirty && matches!(F::DIRTY_LOG, DirtyLogPolicy::DirtyBit) {
                // Hardware writes the address to its page-modification log, drained before the
                // harvest reads the bitmap; this log is one address long and drained at once.
                if let Some(kept) = self.slot_of(guard.inside(), *as_id, gfn, slot) {
                    kept.slot.mark_dirty(gfn);
                }
            }
            let leaf = Leaf {
                accessed: true,
                dirty: leaf.dirty || lacks_dirty,
                ..leaf
            };
            return Ok(translation::<F>(&leaf, level, gfn));
        }
    }
}
