//! Memory slots come, change and go.
//!
//! Every change holds the slots lock for its whole length, flushes included, and is published to
//! faults in two steps (`rcu::buffer`). When publishing returns, no fault uses the slots as they
//! were before.
//!
//! - *Create*: publish.
//! - *Flags*: publish, then protect (logging on) or recover (logging off): a fault cannot map huge,
//!   or writable without marking, after that, because it sees the new flags.
//! - *Delete, move*: publish the slot as invalid, so that faults retry; unmap what it covered, with
//!   its flush; publish it gone, or at its new place. So when the operation returns nothing maps
//!   the slot's memory, and no fault is on its way to.

use alloc::{sync::Arc, vec::Vec};

use super::{config::DirtyLogStart, mmu::TdpMmu, protect::Take};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::{Flush, FlushCause},
    format::{DirtyLogPolicy, Format},
    rcu::buffer::{Copies, Writer},
    slot::{DirtyBitmap, Memslot, SlotError, SlotFlags, SlotId, SlotSet, SlotSpec},
    table::memory::TableMemory,
};

/// The slots of one address space, in the hands of who holds the slots lock.
fn space<'w>(
    writer: &'w mut Writer<'_, SlotSet>,
    as_id: u8,
) -> Result<Copies<'w, SlotSet>, SlotError> {
    writer
        .at(usize::from(as_id))
        .ok_or(SlotError::UnknownAddressSpace { as_id })
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    /// Publishes a change of one address space's slots.
    fn publish(&self, space: &mut Copies<'_, SlotSet>, edit: impl FnMut(&mut SlotSet)) {
        let before = space.generation();
        space.change(edit);
        let bits = F::MMIO_GENERATION_BITS;
        if self.config.mmio_caching && bits > 0 && before >> bits != space.generation() >> bits {
            // The part of the generation that entries keep has come round: old entries would look
            // current.
            self.do_zap_all();
        }
    }

    fn put(&self, space: &mut Copies<'_, SlotSet>, slot: Memslot) -> Arc<Memslot> {
        let slot = Arc::new(slot);
        self.publish(space, |set| set.put(Arc::clone(&slot)));
        slot
    }

    fn bitmap(&self, spec: &SlotSpec) -> Result<Option<Arc<DirtyBitmap>>, SlotError> {
        if !spec.flags.contains(SlotFlags::LOG_DIRTY) {
            return Ok(None);
        }
        let set = self.config.dirty_log_start == DirtyLogStart::InitiallySet;
        let bitmap =
            DirtyBitmap::new(spec.npages, set).ok_or(SlotError::NoMemory { id: spec.id })?;
        Ok(Some(Arc::new(bitmap)))
    }

    pub(super) fn do_create_slot(&self, spec: SlotSpec) -> Result<(), SlotError> {
        let mut writer = self.spaces.lock();
        let mut space = space(&mut writer, spec.as_id)?;
        space.read().may_create(&spec)?;
        let dirty = self.bitmap(&spec)?;
        self.put(&mut space, Memslot::new(spec, dirty));
        Ok(())
    }

    pub(super) fn do_delete_slot(&self, as_id: u8, id: SlotId) -> Result<(), SlotError> {
        let mut writer = self.spaces.lock();
        let mut space = space(&mut writer, as_id)?;
        let slot = Arc::clone(space.read().get(id)?);
        self.empty_slot(&mut space, &slot);
        self.publish(&mut space, |set| set.remove(id));
        Ok(())
    }

    pub(super) fn do_move_slot(
        &self,
        as_id: u8,
        id: SlotId,
        base_gfn: Gfn,
    ) -> Result<(), SlotError> {
        let mut writer = self.spaces.lock();
        let mut space = space(&mut writer, as_id)?;
        let set = space.read();
        let slot = Arc::clone(set.get(id)?);
        let spec = set.may_move(id, base_gfn)?;
        if spec == slot.spec {
            return Ok(());
        }
        self.empty_slot(&mut space, &slot);
        // Permissions to map huge are by guest frame, so they do not come along.
        let moved = Memslot::new(spec, slot.dirty.clone());
        self.put(&mut space, moved);
        Ok(())
    }

    /// Makes a slot invalid and removes all it maps.
    fn empty_slot(&self, space: &mut Copies<'_, SlotSet>, slot: &Memslot) {
        let invalid = Memslot {
            invalid: true,
            ..slot.clone()
        };
        self.put(space, invalid);
        self.invalidations.bump();
        let spec = &slot.spec;
        self.unmap(spec.as_id, spec.range(), FlushCause::Slot, true);
    }

    pub(super) fn do_set_slot_flags(
        &self,
        as_id: u8,
        id: SlotId,
        flags: SlotFlags,
    ) -> Result<u64, SlotError> {
        let mut writer = self.spaces.lock();
        let mut space = space(&mut writer, as_id)?;
        let set = space.read();
        let old = Arc::clone(set.get(id)?);
        let spec = set.may_change(id, flags)?;
        if spec == old.spec {
            return Ok(0);
        }
        let dirty = match &old.dirty {
            Some(dirty) if flags.contains(SlotFlags::LOG_DIRTY) => Some(Arc::clone(dirty)),
            _ => self.bitmap(&spec)?,
        };
        let new = Memslot {
            spec,
            dirty,
            huge: Arc::clone(&old.huge),
            invalid: false,
        };
        let slot = self.put(&mut space, new);
        let mut unsplit = 0;
        match (old.dirty.is_some(), slot.dirty.is_some()) {
            (false, true) => unsplit = self.begin_logging(&slot.spec),
            (true, false) => self.recover_huge_pages(&slot),
            _ => {}
        }
        Ok(unsplit)
    }

    /// Protects what is mapped, split if so configured; how many huge leaves there was no memory to
    /// split. Faults see the slot as logged already.
    fn begin_logging(&self, spec: &SlotSpec) -> u64 {
        if self.config.dirty_log_start == DirtyLogStart::InitiallySet {
            return 0;
        }
        let (as_id, range) = (spec.as_id, spec.range());
        let unsplit = if self.config.eager_split {
            self.do_split_huge_pages(as_id, range, Level::SIZE_4K)
        } else {
            0
        };
        if matches!(F::DIRTY_LOG, DirtyLogPolicy::DirtyBit) {
            self.take_from_range(as_id, range, Level::SIZE_4K, Take::Dirty);
            self.take_from_range(as_id, range, Level::SIZE_2M, Take::Writable);
        } else {
            self.take_from_range(as_id, range, Level::SIZE_4K, Take::Writable);
        }
        // Unconditional: an entry may have lost its W bit before, and its old copy be in a TLB
        // still.
        self.flush(Flush::range(range), FlushCause::DirtyLog, as_id);
        unsplit
    }

    pub(super) fn do_slots(&self) -> Vec<SlotSpec> {
        let writer = self.spaces.lock();
        let slots = writer.iter().flat_map(SlotSet::iter);
        slots.map(|slot| slot.spec).collect()
    }

    /// Forbids mappings of `level` over the frames of `range`, or takes such a reason back. What is
    /// mapped already is split when it is forbidden.
    ///
    /// The work is a step for each slot and each table in the range, whatever its length.
    pub(super) fn do_forbid_huge_pages(
        &self,
        as_id: u8,
        range: GfnRange,
        level: Level,
        forbid: bool,
    ) -> Result<(), SlotError> {
        let mut writer = self.spaces.lock();
        let space = space(&mut writer, as_id)?;
        if range.is_empty() {
            return Ok(());
        }
        let last = F::align_down(Gfn(range.end.0 - 1), level);
        let places = GfnRange {
            start: F::align_down(range.start, level),
            end: Gfn(last.0.saturating_add(F::span(level))),
        };
        for slot in space.read().over(places) {
            if forbid {
                slot.huge.forbid(level, places);
            } else {
                slot.huge.allow(level, places);
            }
        }
        if forbid {
            // A fault that chose its level before may still be on its way to map it.
            self.participants.synchronize();
            let finer = level.child().unwrap_or(Level::SIZE_4K);
            if self.do_split_huge_pages(as_id, range, finer) > 0 {
                // No memory for tables. Nothing mapped is as good as nothing huge.
                self.unmap(as_id, range, FlushCause::Unmap, true);
            }
        }
        drop(writer);
        Ok(())
    }
}
