//! The right to follow entries: a read section over the tables of one MMU.
//!
//! While a [`Guard`] lives, no table that is reachable is freed, so a pointer read from an entry
//! may be followed. All walks from a root go through here.
//!
//! *Locking*: none; whoever holds a guard is inside (`rcu`).

use core::{marker::PhantomData, ptr::NonNull, slice};

use super::{
    memory::{EntryCell, TableMemory},
    node::Node,
    tables::{Retiring, Tables},
    ticket::{Detached, RootTable},
};
use crate::{
    addr::{Gfn, Level, PAGE_SHIFT, Pfn},
    format::Format,
    rcu::participants::Inside,
    sync::Relaxed,
};

/// Leave to look at tables: nothing that is reachable now is freed while it lives.
pub(crate) struct Guard<'a, F: Format, H: TableMemory> {
    pub(super) tables: &'a Tables<F, H>,
    /// Kept here, where it stays in a register: behind `tables` the compiler must fetch it after
    /// each entry. Null if not asked for.
    direct_map: *mut EntryCell,
    inside: Inside<'a>,
}

impl<'a, F: Format, H: TableMemory> Guard<'a, F, H> {
    #[inline(always)]
    pub(crate) fn new(tables: &'a Tables<F, H>, inside: Inside<'a>) -> Self {
        Self {
            tables,
            direct_map: if H::DIRECTLY_MAPPED {
                tables.memory().direct_map()
            } else {
                core::ptr::null_mut()
            },
            inside,
        }
    }

    #[inline(always)]
    pub(crate) fn inside(&self) -> &Inside<'a> {
        &self.inside
    }

    #[inline(always)]
    pub(crate) fn root<'g>(&'g self, root: &'g RootTable) -> Node<'g, F> {
        // SAFETY: the root is live while `root` is.
        unsafe { self.node(root.pfn.hpa(), F::ROOT_LEVEL) }
    }

    /// A table that was unlinked but not retired.
    pub(crate) fn detached(&self, node: &Detached) -> Node<'_, F> {
        // SAFETY: the ticket exists, so the table is not retired yet; if it is retired later, this
        // guard is older.
        unsafe { self.node(node.pfn.hpa(), node.level) }
    }

    /// Detaches all tables below a cut-off table: they, and then itself, become `gone`. Entries
    /// stay as they are, and who is still in there goes on reading them.
    ///
    /// # Safety
    ///
    /// Nobody else exchanges an entry that points to a table, in this table or below it, since it
    /// was cut off.
    pub(crate) unsafe fn detach_all(&self, table: Detached, gone: &mut Retiring) {
        let node = self.detached(&table);
        for entry in node.entries {
            // Relaxed: whoever linked the table was done before this one was cut off.
            let Some(child) = node.detach(entry.0.load(Relaxed)) else {
                continue;
            };
            if child.level == Level::SIZE_4K {
                gone.push(self.tables, child);
            } else {
                // SAFETY: the caller's promise covers what is below.
                unsafe { self.detach_all(child, gone) };
            }
        }
        gone.push(self.tables, table);
    }

    /// The table that entry `index` of `node` points to now, if it points to one.
    #[inline(always)]
    pub(crate) fn child<'g>(&'g self, node: Node<'g, F>, index: usize) -> Option<Node<'g, F>> {
        let hpa = F::table_hpa(node.load(index), node.level)?;
        let level = node.level.child()?;
        // SAFETY: invariant 1, and the entry was read under this guard.
        Some(unsafe { self.node(hpa, level) })
    }

    /// The 4 KiB table for `gfn`, if the tables go down so far. Its entry is not looked at.
    #[inline(always)]
    pub(crate) fn bottom<'g>(&'g self, root: &'g RootTable, gfn: Gfn) -> Option<Node<'g, F>> {
        self.descend_tables(root, gfn, |_, _, _| ()).ok()
    }

    /// Walks from `root` to the entry for `gfn` that is not a table.
    #[inline(always)]
    pub(crate) fn descend<'g>(&'g self, root: &'g RootTable, gfn: Gfn) -> (Node<'g, F>, u64) {
        self.descend_to(root, gfn, |node, raw, _| (node, raw))
    }

    /// As [`descend`](Self::descend), and tells `end` where the walk ended.
    #[inline(always)]
    pub(crate) fn descend_to<'g, R>(
        &'g self,
        root: &'g RootTable,
        gfn: Gfn,
        mut end: impl FnMut(Node<'g, F>, u64, Level) -> R,
    ) -> R {
        match self.descend_tables(root, gfn, &mut end) {
            Ok(node) => {
                let raw = node.load(F::index(gfn, Level::SIZE_4K));
                end(node, raw, Level::SIZE_4K)
            }
            Err(result) => result,
        }
    }

    /// To the 4 KiB table, or to `end` at a coarser level.
    ///
    /// Level by level with each level a constant, also to `end`, because this is what every TLB
    /// miss and every fault does.
    #[inline(always)]
    fn descend_tables<'g, R>(
        &'g self,
        root: &'g RootTable,
        gfn: Gfn,
        mut end: impl FnMut(Node<'g, F>, u64, Level) -> R,
    ) -> Result<Node<'g, F>, R> {
        let mut node = Node {
            // SAFETY: this many entries are at this pointer while the root is live, which it is
            // while `root` is.
            entries: unsafe {
                slice::from_raw_parts(root.entries.as_ptr(), F::entries(F::ROOT_LEVEL))
            },
            hpa: root.pfn.hpa(),
            level: F::ROOT_LEVEL,
            format: PhantomData,
        };
        macro_rules! step {
            ($level:expr, $below:expr) => {
                if F::ROOT_LEVEL.get() >= $level.get() {
                    let raw = node.load(F::index(gfn, $level));
                    match F::table_hpa(raw, $level) {
                        // SAFETY: invariant 1, and the entry was read under this guard.
                        Some(hpa) => node = unsafe { self.node(hpa, $below) },
                        None => return Err(end(node, raw, $level)),
                    }
                }
            };
        }
        step!(Level::SIZE_256T, Level::SIZE_512G);
        step!(Level::SIZE_512G, Level::SIZE_1G);
        step!(Level::SIZE_1G, Level::SIZE_2M);
        step!(Level::SIZE_2M, Level::SIZE_4K);
        Ok(node)
    }

    /// # Safety
    ///
    /// At `hpa` is a live table of `level`, and it is not freed while this guard lives.
    #[inline(always)]
    pub(super) unsafe fn node(&self, hpa: u64, level: Level) -> Node<'_, F> {
        let first = if H::DIRECTLY_MAPPED {
            // SAFETY: it is what `entries` would return, as `TableMemory` promises.
            unsafe { NonNull::new_unchecked(self.direct_map.wrapping_byte_add(hpa as usize)) }
        } else {
            // SAFETY: a live table was allocated and not freed.
            unsafe { self.tables.memory().entries(Pfn(hpa >> PAGE_SHIFT)) }
        };
        Node {
            // SAFETY: `TableMemory` promises `node_size(level)` bytes of atomics at this pointer
            // while the table is live; the caller promises that it is.
            entries: unsafe { slice::from_raw_parts(first.as_ptr(), F::entries(level)) },
            hpa,
            level,
            format: PhantomData,
        }
    }
}
