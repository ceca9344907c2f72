//! A fault in a mirror, alone or with its neighbours.
//!
//! The order is a fault's (`fault`): tables into the cache; a root; then, under the shared lock, is
//! the root still valid, is there a slot, is its memory being taken back; then down the tables,
//! which are linked on the way. What follows is a batch (`batch`): the fault's entry is frozen, and
//! those of its neighbours that are empty; the lock is let go of, the owner asked, and the entries
//! settled.
//!
//! A fault that meets an entry of another batch is told to try again at once. Its caller knows
//! better how to wait: a vCPU looks at what else it has to do, a handler takes the next event.
//!
//! A leaf that the slot over it would not make (other memory, or more leave to write) is one whose
//! unmapping was refused when its slot went. It is asked for again, and the fault tries again.
//!
//! *Locking*: the shared MMU lock while entries are frozen, and again to settle them.

use alloc::vec::Vec;

use super::{
    kept::KeptSlot,
    mirror::NotLinked,
    mmu::TdpMmu,
    root::RootPage,
    vcpu::Vcpu,
    work::{Wish, Work},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    external::{Change, ChangeKind},
    fault::{Access, Around, Fault, FaultOutcome, RangeOutcome},
    flush::FlushCause,
    format::{AdPolicy, Entry, Format, Leaf},
    rcu::cell::Counter,
    refused::Refused,
    slot::Memslot,
    stats::count_fault,
    sync::Counted,
    table::{
        guard::Guard,
        memory::TableMemory,
        node::{Node, Run},
        ticket::Blank,
    },
};

const LEVEL: Level = Level::SIZE_4K;

/// What a fault has in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    /// Nothing: the leaf allows the access.
    Spurious,
    /// Its mapping or its leave to write.
    Wanted,
    /// The end of a leaf that should not be there.
    Leftover,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_fault_range(
        &self,
        vcpu: &mut Vcpu,
        fault: &Fault,
        around: &Around,
    ) -> RangeOutcome {
        if !self.owns(vcpu) {
            // As any fault of another MMU's vCPU.
            let mut own = self.do_vcpu();
            own.as_id = vcpu.as_id;
            return self.do_fault_range(&mut own, fault, around);
        }
        // Whatever the caller said: what is asked of the slot depends on it.
        let fault = Fault {
            mirror: true,
            ..*fault
        };
        let result = self.resolve_mirrored(vcpu, &fault, around);
        count_fault(&vcpu.reader, &result.outcome, fault.prefetch);
        if result.mapped > 0 {
            // What was mapped is in the batch still.
            let new = |change: &&Change| newly_mapped(change) > 0;
            let mut new = vcpu.work.changes().iter().filter(new);
            let own = new.any(|change| change.did(fault.gfn));
            let beside = result.mapped - u64::from(own);
            vcpu.reader.count(Counter::Prefetched, beside);
        }
        result
    }

    fn resolve_mirrored(&self, vcpu: &mut Vcpu, fault: &Fault, around: &Around) -> RangeOutcome {
        if fault.gfn >= F::MAX_GFN {
            return RangeOutcome::alone(FaultOutcome::OutOfRange);
        }
        if !self.top_up(&mut vcpu.cache) {
            return RangeOutcome::alone(FaultOutcome::OutOfMemory);
        }
        if !self.load_root(vcpu, true) {
            return RangeOutcome::alone(if self.can_have_root(vcpu.as_id, true) {
                FaultOutcome::OutOfMemory
            } else {
                FaultOutcome::NoRoot
            });
        }
        let Vcpu {
            reader,
            as_id,
            cache,
            mirror: Some(root),
            slot,
            work,
            ..
        } = vcpu
        else {
            return RangeOutcome::alone(FaultOutcome::Retry);
        };
        let own = {
            let guard = Guard::new(&self.tables, self.lock.shared(reader));
            let asking = Asking {
                fault,
                around,
                root,
                as_id: *as_id,
            };
            match self.ask(&guard, &asking, cache, slot, work) {
                Ok(own) => own,
                Err(outcome) => return RangeOutcome::alone(outcome),
            }
        };
        let valid = self.carry_out(work, root, reader, FlushCause::Unmap);
        told(work, fault.gfn, own, valid)
    }

    /// Freezes what the fault is about, and puts it in the batch.
    fn ask(
        &self,
        guard: &Guard<'_, F, H>,
        asking: &Asking<'_>,
        cache: &mut Vec<Blank>,
        kept: &mut Option<KeptSlot>,
        work: &mut Work,
    ) -> Result<Own, FaultOutcome> {
        let Asking {
            fault,
            around,
            root,
            as_id,
        } = *asking;
        if root.is_invalid() {
            return Err(FaultOutcome::Retry);
        }
        let kept = self.slot_of(guard.inside(), as_id, fault.gfn, kept);
        let slot = &*kept.ok_or(FaultOutcome::NoSlot)?.slot;
        if slot.invalid || self.invalidations.must_retry(fault.gfn, fault.seq) {
            return Err(FaultOutcome::Retry);
        }
        if fault.access == Access::Write && slot.is_readonly() {
            return Err(FaultOutcome::ReadOnly);
        }
        let node = self.mirrored_bottom(guard, root, fault.gfn, cache)?;
        work.begin(root);
        let (own, wish) = self.freeze_own(node, slot, fault)?;
        let beside = self.beside(slot, fault.gfn, around);
        let mut wish = wish;
        if beside.is_empty() || fault.gfn < beside.start {
            add(work, fault.gfn, &mut wish);
        }
        if !beside.is_empty() {
            self.freeze_beside(node, slot, asking, beside, work, &mut wish);
        }
        add(work, fault.gfn, &mut wish);
        Ok(own)
    }

    /// The 4 KiB table for `gfn`, with what is missing above it linked.
    fn mirrored_bottom<'g>(
        &self,
        guard: &'g Guard<'_, F, H>,
        root: &'g RootPage,
        gfn: Gfn,
        cache: &mut Vec<Blank>,
    ) -> Result<Node<'g, F>, FaultOutcome> {
        if let Some(node) = guard.bottom(&root.table, gfn) {
            return Ok(node);
        }
        let mut node = guard.root(&root.table);
        while node.level() > LEVEL {
            let (level, index) = (node.level(), F::index(gfn, node.level()));
            if let Some(child) = guard.child(node, index) {
                node = child;
                continue;
            }
            let raw = node.load(index);
            match F::decode(raw, level) {
                // Someone linked it just now.
                Entry::Table { .. } => {}
                Entry::NonPresent => {
                    let blank = cache.pop().ok_or(FaultOutcome::Retry)?;
                    match self.link_mirrored(root, node, index, raw, blank, gfn) {
                        Ok(()) => {}
                        Err(NotLinked::Lost(blank)) => cache.push(blank),
                        Err(NotLinked::Refused(why)) => return Err(FaultOutcome::Refused(why)),
                    }
                }
                Entry::Frozen => return Err(FaultOutcome::Retry),
                _ => return Err(FaultOutcome::BadEntry { level }),
            }
        }
        Ok(node)
    }

    /// Freezes the fault's own entry, if it is to change.
    fn freeze_own(
        &self,
        node: Node<'_, F>,
        slot: &Memslot,
        fault: &Fault,
    ) -> Result<(Own, Option<Wish>), FaultOutcome> {
        let index = F::index(fault.gfn, LEVEL);
        loop {
            let raw = node.load(index);
            let (own, wish) = match F::decode(raw, LEVEL) {
                Entry::Frozen => return Err(FaultOutcome::Retry),
                Entry::NonPresent => {
                    let wanted = fault.access == Access::Write || fault.map_writable;
                    let leaf = self.mirrored_leaf(slot, fault, fault.gfn, wanted);
                    let again = false;
                    (Own::Wanted, map::<F>(&leaf, raw, again))
                }
                Entry::Leaf(leaf) => match judge::<F>(&leaf, raw, slot, fault) {
                    Some(judged) => judged,
                    None => return Ok((Own::Spurious, None)),
                },
                _ => return Err(FaultOutcome::BadEntry { level: LEVEL }),
            };
            if node.replace(index, raw, F::FROZEN).is_ok() {
                return Ok((own, Some(wish)));
            }
        }
    }

    /// The neighbours of `gfn` that may be mapped with it: in its table, in its slot, and not about
    /// to be taken back.
    fn beside(&self, slot: &Memslot, gfn: Gfn, around: &Around) -> GfnRange {
        let table = GfnRange::new(F::align_down(gfn, Level::SIZE_2M), 1 << F::INDEX_BITS[0]);
        let slot = slot.spec.range();
        let range = GfnRange {
            start: around.range.start.max(table.start).max(slot.start),
            end: around.range.end.min(table.end).min(slot.end),
        };
        if !range.is_empty() && self.invalidations.overlaps(range) {
            return GfnRange::default();
        }
        range
    }

    /// Freezes each empty entry over `range`, and adds it; the fault's own in its place.
    fn freeze_beside(
        &self,
        node: Node<'_, F>,
        slot: &Memslot,
        asking: &Asking<'_>,
        range: GfnRange,
        work: &mut Work,
        own: &mut Option<Wish>,
    ) {
        let (fault, around) = (asking.fault, asking.around);
        let beside = Fault {
            prefetch: true,
            access: Access::Read,
            ..*fault
        };
        let leaf = self.mirrored_leaf(slot, &beside, range.start, around.map_writable);
        let mut wish = map::<F>(&leaf, F::EMPTY, false);
        let first = F::index(range.start, LEVEL);
        let run = Run {
            node,
            first,
            end: first + range.pages() as usize,
            gfn: range.start,
        };
        let Some(bottom) = run.bottom() else { return };
        let step = F::leaf_step(LEVEL);
        let mut gfn = range.start;
        for index in 0..bottom.len() {
            if gfn == fault.gfn {
                add(work, gfn, own);
            } else if bottom.load(index) == F::EMPTY
                && bottom.replace(index, F::EMPTY, F::FROZEN).is_ok()
            {
                work.push(gfn, wish);
            }
            gfn.0 += 1;
            wish.pfn.0 += 1;
            wish.new = wish.new.wrapping_add(step);
        }
    }

    fn mirrored_leaf(&self, slot: &Memslot, fault: &Fault, gfn: Gfn, writable: bool) -> Leaf {
        let leaf = self.new_leaf(slot, gfn, LEVEL, fault);
        let writable = writable && leaf.host_writable;
        Leaf {
            writable,
            dirty: writable || F::AD_POLICY != AdPolicy::Hardware,
            ..leaf
        }
    }
}

/// A fault, and where it is.
#[derive(Clone, Copy)]
struct Asking<'a> {
    fault: &'a Fault,
    around: &'a Around,
    root: &'a Counted<RootPage>,
    as_id: u8,
}

fn add(work: &mut Work, gfn: Gfn, wish: &mut Option<Wish>) {
    if let Some(wish) = wish.take() {
        work.push(gfn, wish);
    }
}

fn map<F: Format>(leaf: &Leaf, old: u64, again: bool) -> Wish {
    let writable = leaf.writable;
    Wish {
        kind: ChangeKind::Map { writable, again },
        pfn: leaf.pfn,
        old,
        new: F::make_leaf(leaf, LEVEL),
    }
}

/// What a fault makes of a leaf that is there. `None`: nothing.
fn judge<F: Format>(leaf: &Leaf, raw: u64, slot: &Memslot, fault: &Fault) -> Option<(Own, Wish)> {
    if leaf.pfn != slot.pfn(fault.gfn) || leaf.writable && slot.is_readonly() {
        let wish = Wish {
            kind: ChangeKind::Unmap,
            pfn: leaf.pfn,
            old: raw,
            new: F::EMPTY,
        };
        return Some((Own::Leftover, wish));
    }
    let grants = fault.access == Access::Write && !fault.prefetch && !leaf.writable;
    if !grants {
        return fault.again.then(|| {
            let again = true;
            let wish = Wish {
                new: raw,
                ..map::<F>(leaf, raw, again)
            };
            (Own::Wanted, wish)
        });
    }
    let granted = Leaf {
        writable: true,
        accessed: true,
        dirty: true,
        ..*leaf
    };
    let wish = map::<F>(&granted, raw, true);
    let kind = if fault.again {
        wish.kind
    } else {
        ChangeKind::Protect { writable: true }
    };
    Some((Own::Wanted, Wish { kind, ..wish }))
}

/// What the owner's answers make of the fault.
fn told(work: &Work, gfn: Gfn, own: Own, valid: bool) -> RangeOutcome {
    if !valid {
        return RangeOutcome::alone(FaultOutcome::Retry);
    }
    let change = work
        .changes()
        .iter()
        .find(|change| change.gfns().contains(gfn));
    let outcome = match (own, change) {
        (Own::Spurious, _) | (_, None) => FaultOutcome::Spurious { level: LEVEL },
        (Own::Wanted, Some(change)) if change.did(gfn) => FaultOutcome::Fixed { level: LEVEL },
        (Own::Leftover, Some(change)) if change.did(gfn) => FaultOutcome::Retry,
        (_, Some(change)) => FaultOutcome::Refused(change.refused().unwrap_or(Refused::Busy)),
    };
    RangeOutcome {
        outcome,
        mapped: work.changes().iter().map(newly_mapped).sum(),
        refused: work.refused(),
    }
}

fn newly_mapped(change: &Change) -> u64 {
    match change.kind() {
        ChangeKind::Map { again: false, .. } => change.done(),
        _ => 0,
    }
}
