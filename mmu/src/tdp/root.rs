//! Roots: the tables that vCPUs load.
//!
//! There is at most one valid root. It is made when it is first asked for, and lives until it is *invalidated*: then it
//! is unreachable for new loads, but vCPUs that have it loaded use it until they obey the flush, so it still counts as
//! mapping memory, and [`zap`](super::zap) also visits invalid roots. Invalid roots are zapped and given back separately.
//!
//! *Locking*: everything here needs the MMU lock, except reading the root's frame.

use core::sync::atomic::{AtomicU64, Ordering};

use super::{State, TdpMmu};
use crate::{
    addr::{Gfn, Pfn},
    flush::Flush,
    format::Format,
    table::{memory::TableMemory, node::Guard},
};

/// What a vCPU loads into `hgatp`, `EPTP` or `nCR3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Root {
    /// First frame of the root table.
    pub pfn: Pfn,
    /// Changes with each new root. A vCPU that loads another generation flushes its own TLB.
    pub generation: u64,
}

#[derive(Debug, Default)]
pub(super) struct Generation(AtomicU64);

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Makes a root unless there is one; false if there is no memory.
    pub(super) fn ensure_root(&self, state: &mut State) -> bool {
        if self.tables.root_pfn().is_some() {
            return true;
        }
        let Some(node) = self.tables.allocate(F::ROOT_LEVEL) else {
            return false;
        };
        state.headers.insert(
            node.pfn(),
            F::node_size(F::ROOT_LEVEL),
            node.level(),
            Gfn(0),
            None,
        );
        self.generation.0.fetch_add(1, Ordering::Relaxed);
        let _none = self.tables.set_root(Some(node));
        true
    }

    pub(super) fn do_root(&self) -> Option<Root> {
        let mut state = self.state.lock();
        self.ensure_root(&mut state);
        let pfn = self.tables.root_pfn()?;
        Some(Root {
            pfn,
            generation: self.generation.0.load(Ordering::Relaxed),
        })
    }

    /// Withdraws the current root. It maps memory until it is zapped.
    pub(super) fn do_invalidate_roots(&self) -> Flush {
        self.locked(|state, _| self.invalidate_root(state));
        self.stats.flush(Flush::All)
    }

    /// Tears down withdrawn roots. No flush: the one that withdrew them covers it.
    pub(super) fn do_zap_invalidated_roots(&self) {
        self.locked(|state, guard| self.zap_invalidated(state, guard));
    }

    pub(super) fn do_zap_all(&self) -> Flush {
        self.locked(|state, guard| {
            self.invalidate_root(state);
            self.zap_invalidated(state, guard);
        });
        self.stats.flush(Flush::All)
    }

    fn invalidate_root(&self, state: &mut State) {
        if let Some(root) = self.tables.set_root(None) {
            state.headers.invalidate(root.pfn());
            state.invalid_roots.push(root);
        }
    }

    fn zap_invalidated(&self, state: &mut State, guard: &Guard<'_, F, H>) {
        for root in core::mem::take(&mut state.invalid_roots) {
            self.remove_table(state, guard, root);
        }
    }
}
