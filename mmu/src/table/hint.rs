//! The table that a vCPU's last walk ended in, remembered from one fault to the next.
//!
//! A software paging-structure cache of one entry. A hint is believed only while no table at all
//! has been retired since it was taken ([`Tables::unlinks`]). That is enough:
//!
//! - the count was read *before* the walk that found the table, so the table was reachable when the
//!   count had that value;
//! - who uses the hint is inside, and reads the same value after a full barrier. A later retirement
//!   counts first, then ends an era and looks at the cells, so it waits for this user (Dekker).
//!
//! The table may have been *detached* by then, as in every walk; whoever tears it down freezes or
//! takes what is put into it.

use super::{guard::Guard, memory::TableMemory, node::Node};
use crate::{
    addr::{Gfn, Level},
    format::Format,
};

/// See the module. Belongs to one root: who changes roots forgets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hint {
    /// The 4 KiB table's first guest frame; no frame if there is none.
    base: u64,
    hpa: u64,
    unlinks: u64,
    /// The generation of slots in which nothing coarser than 4 KiB was allowed there.
    small: u64,
    /// Where the last lookup was, by the first frame of its 4 KiB table.
    last: u64,
}

/// No table's first frame.
const NOWHERE: u64 = u64::MAX;
/// No generation: they count up from 0.
const NEVER: u64 = u64::MAX;

impl Default for Hint {
    fn default() -> Self {
        Self {
            base: NOWHERE,
            hpa: 0,
            unlinks: 0,
            small: NEVER,
            last: NOWHERE,
        }
    }
}

impl Hint {
    /// First frame of the 4 KiB table that covers `gfn`.
    #[inline(always)]
    fn table_of<F: Format>(gfn: Gfn) -> u64 {
        gfn.0 & !((1 << F::INDEX_BITS[0]) - 1)
    }

    /// A hint for a walk that begins now; it holds nothing until it is told where the walk ended.
    #[inline(always)]
    pub(crate) fn begin<F: Format, H: TableMemory>(guard: &Guard<'_, F, H>) -> Self {
        Self {
            unlinks: guard.tables.unlinks(),
            ..Self::default()
        }
    }

    /// The walk for `gfn` came to `node`. `small`: the generation of slots in which nothing coarser
    /// than 4 KiB is allowed there.
    #[inline(always)]
    pub(crate) fn found<F: Format>(&mut self, node: Node<'_, F>, gfn: Gfn, small: Option<u64>) {
        self.small = small.unwrap_or(NEVER);
        if node.level() == Level::SIZE_4K {
            self.base = Self::table_of::<F>(gfn);
            self.hpa = node.hpa();
            self.last = self.base;
        }
    }

    /// Whether the last lookup was in `gfn`'s table, too. Only then is the table worth keeping:
    /// neighbours share it, and faults elsewhere shall not pay for it.
    #[inline(always)]
    pub(crate) fn comes_again<F: Format>(&mut self, gfn: Gfn) -> bool {
        let table = Self::table_of::<F>(gfn);
        core::mem::replace(&mut self.last, table) == table
    }

    /// Whether the hint is about `gfn`'s table.
    #[inline(always)]
    pub(crate) fn is_about<F: Format>(&self, gfn: Gfn) -> bool {
        self.base == Self::table_of::<F>(gfn)
    }

    /// Whether only 4 KiB mappings are allowed there, with slots as in `generation`.
    #[inline(always)]
    pub(crate) fn is_small_in(&self, generation: u64) -> bool {
        self.small == generation
    }

    /// The 4 KiB table for `gfn`, if the hint has it and is to be believed.
    #[inline(always)]
    pub(crate) fn node<'g, F: Format, H: TableMemory>(
        &self,
        guard: &'g Guard<'_, F, H>,
        gfn: Gfn,
    ) -> Option<Node<'g, F>> {
        if !self.is_about::<F>(gfn) || self.unlinks != guard.tables.unlinks() {
            return None;
        }
        // SAFETY: the table was reachable when the count was what it is now, so no retirement of it
        // has ended an era that this guard is not part of (see the module).
        Some(unsafe { guard.node(self.hpa, Level::SIZE_4K) })
    }
}
