//! Mapping a range in advance (`KVM_PRE_FAULT_MEMORY`, fault-around).
//!
//! Each page is mapped as a read would map it, without counting as a use. Whole tables that are
//! missing are filled before they are linked, so a large range costs little more than writing its
//! entries; single entries are installed one by one, by compare-exchange like any fault. A page
//! that is mapped already is left as it is, better or not.
//!
//! *Locking*: as a fault: the shared MMU lock, one table's worth at a time.

use thiserror::Error;

use super::{mmu::TdpMmu, vcpu::Vcpu};
use crate::{
    addr::{Gfn, GfnRange, Level},
    fault::{Fault, FaultOutcome},
    format::{Entry, Format},
    rcu::cell::Counter,
    slot::Memslot,
    table::{guard::Guard, header::PageRole, hint::Hint, memory::TableMemory, node::Run},
};

/// Times that a page is tried again when an entry or a root is going.
const RETRIES: usize = 64;

/// Why a range was not mapped to its end. The pages before are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PrefaultError {
    /// A frame has no slot.
    #[error("{gfn} has no memory slot, after {done} pages")]
    NoSlot {
        /// The frame.
        gfn: Gfn,
        /// Pages mapped before it.
        done: u64,
    },
    /// The slot is being deleted or moved, or the memory taken back. Try again.
    #[error("{gfn} is being taken away, after {done} pages; try again")]
    Again {
        /// The frame.
        gfn: Gfn,
        /// Pages mapped before it.
        done: u64,
    },
    /// No memory for a table.
    #[error("no memory for page tables at {gfn}, after {done} pages")]
    OutOfMemory {
        /// The frame.
        gfn: Gfn,
        /// Pages mapped before it.
        done: u64,
    },
    /// The table holds something that the MMU did not write, or there is no root for the vCPU's
    /// address space.
    #[error("{gfn} cannot be mapped, after {done} pages: {outcome:?}")]
    Failed {
        /// The frame.
        gfn: Gfn,
        /// Pages mapped before it.
        done: u64,
        /// What its fault said.
        outcome: FaultOutcome,
    },
}

impl PrefaultError {
    /// Pages mapped before the error.
    pub fn done(&self) -> u64 {
        match *self {
            Self::NoSlot { done, .. }
            | Self::Again { done, .. }
            | Self::OutOfMemory { done, .. }
            | Self::Failed { done, .. } => done,
        }
    }
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_prefault(
        &self,
        vcpu: &mut Vcpu,
        range: GfnRange,
        max_level: Level,
    ) -> Result<u64, PrefaultError> {
        let mut gfn = range.start;
        let mut retries = 0;
        while gfn < range.end {
            let done = gfn.0 - range.start.0;
            let rest = GfnRange {
                start: gfn,
                end: range.end,
            };
            if let Some(next) = self.fill_tables(vcpu, rest, max_level) {
                gfn = next;
                retries = 0;
                continue;
            }
            let fault = Fault::prefetch(gfn).with_max_level(max_level);
            match self.do_fault(vcpu, fault) {
                FaultOutcome::Fixed { level } | FaultOutcome::Spurious { level } => {
                    gfn = Gfn(F::align_down(gfn, level).0 + F::span(level));
                    retries = 0;
                }
                FaultOutcome::Retry if retries < RETRIES => {
                    retries += 1;
                    crate::sync::give_way();
                }
                FaultOutcome::Retry => return Err(PrefaultError::Again { gfn, done }),
                FaultOutcome::NoSlot => return Err(PrefaultError::NoSlot { gfn, done }),
                FaultOutcome::OutOfMemory => {
                    return Err(PrefaultError::OutOfMemory { gfn, done });
                }
                outcome => return Err(PrefaultError::Failed { gfn, done, outcome }),
            }
        }
        Ok(range.pages())
    }

    /// Maps as much of `range`'s beginning as 4 KiB tables are missing for, or as lies in the first
    /// one. `None`: not such a case; take a fault. Otherwise the frame to go on from.
    fn fill_tables(&self, vcpu: &mut Vcpu, range: GfnRange, max_level: Level) -> Option<Gfn> {
        let first = range.start;
        if first >= F::MAX_GFN
            || !self.owns(vcpu)
            || !self.top_up(&mut vcpu.cache)
            || !self.load_root(vcpu, false)
        {
            return None;
        }
        let Vcpu {
            reader,
            as_id,
            cache,
            root: Some(root),
            slot,
            hint,
            ..
        } = vcpu
        else {
            return None;
        };
        let inside = self.lock.shared(reader);
        let guard = Guard::new(&self.tables, inside);
        let slot = &*self.slot_of(guard.inside(), *as_id, first, slot)?.slot;
        let table_pages = 1u64 << F::INDEX_BITS[0];
        let span = GfnRange::new(Gfn(first.0 & !(table_pages - 1)), table_pages);
        let end = Gfn(range.end.0.min(span.end.0).min(slot.spec.range().end.0));
        let fault = Fault::prefetch(first).with_max_level(max_level);
        if root.is_invalid()
            || slot.invalid
            || self.invalidations.overlaps(span)
            || self.goal(slot, &fault).level > Level::SIZE_4K
        {
            return None;
        }
        let mut found = Hint::begin(&guard);
        let mut node = guard.root(&root.table);
        while node.level() > Level::SIZE_2M {
            node = guard.child(node, F::index(first, node.level()))?;
        }
        let index = F::index(first, Level::SIZE_2M);
        let raw = node.load(index);
        let leaf = self.new_leaf(slot, first, Level::SIZE_4K, &fault);
        let new = F::make_leaf(&leaf, Level::SIZE_4K);
        let step = F::leaf_step(Level::SIZE_4K);
        let (skip, upto) = (
            (first.0 - span.start.0) as usize,
            (end.0 - span.start.0) as usize,
        );
        let count = (upto - skip) as i64;
        if node.level() == Level::SIZE_2M
            && matches!(F::decode(raw, Level::SIZE_2M), Entry::NonPresent)
        {
            let blank = cache.pop()?;
            let base = new.wrapping_sub(step.wrapping_mul(skip as u64));
            let table = if count as u64 == table_pages {
                blank.fill(&self.tables, Level::SIZE_4K, |i| {
                    base.wrapping_add(step.wrapping_mul(i as u64))
                })
            } else {
                blank.fill(&self.tables, Level::SIZE_4K, |i| {
                    if (skip..upto).contains(&i) {
                        base.wrapping_add(step.wrapping_mul(i as u64))
                    } else {
                        F::EMPTY
                    }
                })
            };
            let role = PageRole::new(*as_id, Level::SIZE_4K, false);
            let header = self.tables.header(table.pfn());
            header.describe(role, span.start, Some((node.pfn(), index)));
            if let Err(table) = node.link(index, raw, table) {
                cache.push(self.tables.blank_again(table));
                return None;
            }
            reader.add_pages(Level::SIZE_4K.index(), count);
            reader.count(Counter::Prefetched, count as u64);
            mark_if_writable(slot, leaf.writable && leaf.dirty, first, end);
            return Some(end);
        }
        let node = guard.child(node, index)?;
        found.found(node, first, None);
        *hint = found;
        let run = Run {
            node,
            first: skip,
            end: upto,
            gfn: first,
        };
        let bottom = run.bottom()?;
        let (mut installed, mut raw, mut done) = (0, new, 0);
        while done < bottom.len() {
            // A look first: a page that is mapped costs a load then, and no line is taken from who
            // writes it.
            let old = bottom.load(done);
            if old == F::EMPTY {
                if bottom.replace(done, old, raw).is_err() {
                    break;
                }
                installed += 1;
            } else if !F::is_leaf(old, Level::SIZE_4K) {
                break;
            }
            raw = raw.wrapping_add(step);
            done += 1;
        }
        let gfn = Gfn(first.0 + done as u64);
        if installed > 0 {
            reader.add_pages(Level::SIZE_4K.index(), installed);
            reader.count(Counter::Prefetched, installed as u64);
            mark_if_writable(slot, leaf.writable && leaf.dirty, first, gfn);
        }
        (gfn > first).then_some(gfn)
    }
}

fn mark_if_writable(slot: &Memslot, writable: bool, first: Gfn, end: Gfn) {
    if writable && let Some(dirty) = &slot.dirty {
        let base = slot.spec.base_gfn.0;
        dirty.set_range(first.0 - base, end.0 - base);
    }
}
