//! Lock-free walks.
//!
//! What a vCPU does on a TLB miss. A walk sees each entry as it is at one moment; the table may change while the walk
//! goes down, and the result is then either the old or the new translation. A TLB that keeps the result must make sure
//! that a flush ordered *after* the walk began also hits the entry: check for flush requests after filling the TLB and
//! before using the entry.
//!
//! *Locking*: a guard, nothing else.

use super::TdpMmu;
use crate::{
    addr::{Gfn, Level, MAX_LEVELS, Pfn},
    fault::Access,
    format::{AdPolicy, Entry, Format, Leaf},
    table::{
        memory::TableMemory,
        node::{Guard, Node},
    },
};

/// Where a guest frame leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Translation {
    /// The host frame of exactly the guest frame asked for.
    pub pfn: Pfn,
    /// The level of the leaf; its neighbours in the same leaf are contiguous.
    pub level: Level,
    /// The guest may write.
    pub writable: bool,
    /// The guest may fetch instructions.
    pub executable: bool,
}

/// Why hardware would have faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WalkFault {
    /// Nothing is mapped.
    NotPresent,
    /// The mapping does not allow the access.
    Permission,
    /// The mapping allows it, but Accessed or Dirty is clear and hardware does not set it.
    AccessedDirty,
    /// Bits that hardware does not accept.
    Malformed,
}

/// One entry on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// Level of the entry.
    pub level: Level,
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

fn translation<F: Format>(leaf: &Leaf, level: Level, gfn: Gfn) -> Translation {
    Translation {
        pfn: Pfn(leaf.pfn.0 + (gfn.0 & (F::span(level) - 1))),
        level,
        writable: leaf.writable,
        executable: leaf.executable,
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// The table whose entry for `gfn` ends the walk; `visit` sees each entry, the last one once more.
    fn descend<'g>(
        guard: &'g Guard<'_, F, H>,
        gfn: Gfn,
        mut visit: impl FnMut(WalkStep),
    ) -> Option<(Node<'g, F>, WalkStep)> {
        if gfn >= F::MAX_GFN {
            return None;
        }
        let mut node = guard.root()?;
        loop {
            let level = node.level();
            let index = F::index(gfn, level);
            let raw = node.load(index);
            let step = WalkStep {
                level,
                raw,
                entry: F::decode(raw, level),
            };
            visit(step);
            // Reads the entry again: if it is a table no longer, what was seen stands.
            match guard.child(node, index) {
                Some(child) if matches!(step.entry, Entry::Table { .. }) => node = child,
                _ => return Some((node, step)),
            }
        }
    }

    pub(super) fn do_walk(&self, gfn: Gfn) -> Walk {
        let guard = self.tables.guard();
        let mut walk = Walk::default();
        let mut next = 0;
        Self::descend(&guard, gfn, |step| {
            walk.steps[next] = Some(step);
            next += 1;
        });
        walk
    }

    pub(super) fn do_translate(&self, gfn: Gfn) -> Option<Translation> {
        let guard = self.tables.guard();
        match Self::descend(&guard, gfn, |_| {})? {
            (
                _,
                WalkStep {
                    level,
                    entry: Entry::Leaf(leaf),
                    ..
                },
            ) => Some(translation::<F>(&leaf, level, gfn)),
            _ => None,
        }
    }

    pub(super) fn do_access(&self, gfn: Gfn, access: Access) -> Result<Translation, WalkFault> {
        let guard = self.tables.guard();
        loop {
            let (node, step) = Self::descend(&guard, gfn, |_| {}).ok_or(WalkFault::NotPresent)?;
            let (level, leaf) = match step.entry {
                Entry::Leaf(leaf) => (step.level, leaf),
                Entry::Malformed => return Err(WalkFault::Malformed),
                _ => return Err(WalkFault::NotPresent),
            };
            if (access == Access::Write && !leaf.writable)
                || (access == Access::Execute && !leaf.executable)
            {
                return Err(WalkFault::Permission);
            }
            let lacks_dirty = access == Access::Write && !leaf.dirty;
            if leaf.accessed && !lacks_dirty {
                return Ok(translation::<F>(&leaf, level, gfn));
            }
            if F::AD_POLICY == AdPolicy::SetAtInstall {
                return Err(WalkFault::AccessedDirty);
            }
            let mut new = F::with_accessed(step.raw, true);
            if lacks_dirty {
                new = F::with_dirty(new, true);
            }
            // Like hardware: set the bits only in the entry that was judged, or walk again.
            if node.replace(F::index(gfn, level), step.raw, new).is_ok() {
                return Ok(translation::<F>(&leaf, level, gfn));
            }
        }
    }
}
