//! The slots of an address space, found by number and by guest frame.
//!
//! *Locking*: one of two copies (`rcu::buffer`); changing methods are for the writer of that copy.
//! *Invariants*: slots do not overlap; both maps hold the same slots.

use alloc::{collections::BTreeMap, sync::Arc};

use super::{
    memslot::Memslot,
    spec::{MAX_SLOT_PAGES, SlotError, SlotFlags, SlotId, SlotSpec},
};
use crate::{
    addr::{Gfn, GfnRange, Pfn},
    format::MemoryType,
    sync::step,
};

/// The numbers a slot has to stay below.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The address space that the set is of.
    pub(crate) as_id: u8,
    pub(crate) slots: u16,
    pub(crate) gfn: Gfn,
    pub(crate) pfn: Pfn,
    /// Entries may carry memory types other than normal.
    pub(crate) memory_types: bool,
}

#[derive(Debug)]
pub(crate) struct SlotSet {
    limits: Limits,
    by_id: BTreeMap<SlotId, Arc<Memslot>>,
    by_gfn: BTreeMap<Gfn, Arc<Memslot>>,
}

impl SlotSet {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            by_id: BTreeMap::new(),
            by_gfn: BTreeMap::new(),
        }
    }

    pub(crate) fn get(&self, id: SlotId) -> Result<&Arc<Memslot>, SlotError> {
        self.by_id.get(&id).ok_or(SlotError::UnknownId { id })
    }

    pub(crate) fn find(&self, gfn: Gfn) -> Option<&Arc<Memslot>> {
        let (_, slot) = self.by_gfn.range(..=gfn).next_back()?;
        slot.contains(gfn).then_some(slot)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Memslot>> {
        self.by_id.values()
    }

    /// The slots that share a frame with `range`, by frame.
    pub(crate) fn over(&self, range: GfnRange) -> impl Iterator<Item = &Arc<Memslot>> {
        step();
        // The last slot that begins at or before the range may reach into it.
        let first = self
            .by_gfn
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(start, _)| *start);
        let end = range.end.max(first);
        self.by_gfn
            .range(first..end)
            .map(|(_, slot)| slot)
            .filter(move |slot| slot.spec.range().overlaps(range))
    }

    /// Whether `spec` can be created.
    pub(crate) fn may_create(&self, spec: &SlotSpec) -> Result<(), SlotError> {
        self.check(spec)?;
        if self.by_id.contains_key(&spec.id) {
            return Err(SlotError::Exists { id: spec.id });
        }
        self.check_overlap(spec)
    }

    /// Whether slot `id` can be at `base_gfn`; the slot as it would be there.
    pub(crate) fn may_move(&self, id: SlotId, base_gfn: Gfn) -> Result<SlotSpec, SlotError> {
        let spec = SlotSpec {
            base_gfn,
            ..self.get(id)?.spec
        };
        self.check(&spec)?;
        self.check_overlap(&spec)?;
        Ok(spec)
    }

    /// Whether slot `id` can have `flags`; the slot as it would be with them.
    pub(crate) fn may_change(&self, id: SlotId, flags: SlotFlags) -> Result<SlotSpec, SlotError> {
        let old = self.get(id)?.spec;
        let spec = SlotSpec { flags, ..old };
        self.check(&spec)?;
        if (old.flags ^ flags).contains(SlotFlags::READONLY) {
            return Err(SlotError::ReadOnlyIsFixed { id });
        }
        Ok(spec)
    }

    /// Puts a slot in, in place of the one of its number.
    pub(crate) fn put(&mut self, slot: Arc<Memslot>) {
        self.remove(slot.spec.id);
        self.by_gfn.insert(slot.spec.base_gfn, Arc::clone(&slot));
        self.by_id.insert(slot.spec.id, slot);
    }

    pub(crate) fn remove(&mut self, id: SlotId) {
        if let Some(old) = self.by_id.remove(&id) {
            self.by_gfn.remove(&old.spec.base_gfn);
        }
    }

    fn check(&self, spec: &SlotSpec) -> Result<(), SlotError> {
        let &SlotSpec {
            id, as_id, npages, ..
        } = spec;
        let unknown = spec.flags.difference(SlotFlags::all());
        if !unknown.is_empty() {
            return Err(SlotError::UnknownFlags {
                bits: unknown.bits(),
            });
        }
        if as_id != self.limits.as_id {
            return Err(SlotError::UnknownAddressSpace { as_id });
        }
        if id >= self.limits.slots {
            return Err(SlotError::TooMany {
                id,
                limit: self.limits.slots,
            });
        }
        let memory = spec.memory;
        if memory != MemoryType::Normal && !self.limits.memory_types {
            return Err(SlotError::MemoryType { id, memory });
        }
        if npages == 0 {
            return Err(SlotError::Empty { id });
        }
        if npages > MAX_SLOT_PAGES {
            return Err(SlotError::TooLarge { pages: npages });
        }
        let end = Gfn(spec
            .base_gfn
            .0
            .checked_add(npages)
            .ok_or(SlotError::Wraps { id })?);
        if end > self.limits.gfn {
            return Err(SlotError::BeyondFormat {
                id,
                end,
                limit: self.limits.gfn,
            });
        }
        let end = Pfn(spec
            .host_base_pfn
            .0
            .checked_add(npages)
            .ok_or(SlotError::Wraps { id })?);
        if end > self.limits.pfn {
            return Err(SlotError::BeyondHost {
                id,
                end,
                limit: self.limits.pfn,
            });
        }
        Ok(())
    }

    /// Slots other than `spec`'s own that share a frame with it.
    fn check_overlap(&self, spec: &SlotSpec) -> Result<(), SlotError> {
        let range = spec.range();
        let others = self.by_gfn.range(..range.end).rev();
        // Slots are disjoint and sorted, so the last one that begins before our end is the only one
        // to ask.
        match others
            .map(|(_, slot)| slot)
            .find(|slot| slot.spec.id != spec.id)
        {
            Some(other) if other.spec.range().overlaps(range) => Err(SlotError::Overlaps {
                id: spec.id,
                other: other.spec.id,
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use std::vec::Vec;

    use super::*;

    impl SlotSet {
        fn create(&mut self, spec: SlotSpec) -> Result<(), SlotError> {
            self.may_create(&spec)?;
            self.put(Arc::new(Memslot::new(spec, None)));
            Ok(())
        }

        fn relocate(&mut self, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError> {
            let spec = self.may_move(id, base_gfn)?;
            self.put(Arc::new(Memslot::new(spec, None)));
            Ok(())
        }
    }

    fn set() -> SlotSet {
        SlotSet::new(Limits {
            as_id: 0,
            slots: 4,
            gfn: Gfn(1 << 36),
            pfn: Pfn(1 << 40),
            memory_types: false,
        })
    }

    fn spec(id: SlotId, gfn: u64, npages: u64) -> SlotSpec {
        SlotSpec::new(id, Gfn(gfn), npages, Pfn(0x1000))
    }

    #[test]
    fn finds_by_frame() {
        let mut set = set();
        set.create(spec(0, 0, 16)).unwrap();
        set.create(spec(1, 32, 16)).unwrap();
        assert_eq!(set.find(Gfn(15)).unwrap().spec.id, 0);
        assert!(set.find(Gfn(16)).is_none());
        assert_eq!(set.find(Gfn(47)).unwrap().spec.id, 1);
        assert!(set.find(Gfn(48)).is_none());
    }

    #[test]
    fn each_rule_has_its_error() {
        let mut set = set();
        set.create(spec(0, 16, 16)).unwrap();
        let mut refuse = |spec: SlotSpec| set.create(spec).unwrap_err();
        assert_eq!(refuse(spec(0, 64, 1)), SlotError::Exists { id: 0 });
        assert_eq!(
            refuse(spec(1, 31, 1)),
            SlotError::Overlaps { id: 1, other: 0 }
        );
        assert_eq!(
            refuse(spec(1, 0, 17)),
            SlotError::Overlaps { id: 1, other: 0 }
        );
        assert_eq!(
            refuse(spec(1, 0, 100)),
            SlotError::Overlaps { id: 1, other: 0 }
        );
        assert_eq!(
            refuse(spec(4, 64, 1)),
            SlotError::TooMany { id: 4, limit: 4 }
        );
        assert_eq!(refuse(spec(1, 64, 0)), SlotError::Empty { id: 1 });
        assert_eq!(
            refuse(spec(1, 64, 1 << 31)),
            SlotError::TooLarge { pages: 1 << 31 }
        );
        assert_eq!(refuse(spec(1, u64::MAX - 1, 4)), SlotError::Wraps { id: 1 });
        assert!(matches!(
            refuse(spec(1, (1 << 36) - 1, 2)),
            SlotError::BeyondFormat { .. }
        ));
        let host = SlotSpec {
            host_base_pfn: Pfn(1 << 40),
            ..spec(1, 64, 1)
        };
        assert!(matches!(refuse(host), SlotError::BeyondHost { .. }));
        let space = SlotSpec {
            as_id: 1,
            ..spec(1, 64, 1)
        };
        assert_eq!(refuse(space), SlotError::UnknownAddressSpace { as_id: 1 });
        let memory = MemoryType::Device;
        assert_eq!(
            refuse(spec(1, 64, 1).with_memory(memory)),
            SlotError::MemoryType { id: 1, memory }
        );
        let flags = spec(1, 64, 1).with_flags(SlotFlags::from_bits_retain(1 << 7));
        assert_eq!(refuse(flags), SlotError::UnknownFlags { bits: 1 << 7 });
        assert_eq!(
            SlotSpec::from_bytes(1, 0, 4097, 0),
            Err(SlotError::Unaligned { value: 4097 })
        );
        assert!(set.create(spec(1, 0, 16)).is_ok());
    }

    #[test]
    fn a_slot_may_move_over_itself() {
        let mut set = set();
        set.create(spec(0, 16, 16)).unwrap();
        set.create(spec(1, 64, 16)).unwrap();
        assert_eq!(
            set.relocate(0, Gfn(60)).unwrap_err(),
            SlotError::Overlaps { id: 0, other: 1 }
        );
        set.relocate(0, Gfn(20)).unwrap();
        assert!(set.find(Gfn(19)).is_none());
        assert_eq!(set.find(Gfn(35)).unwrap().spec.id, 0);
    }

    #[test]
    fn a_failed_move_hidden_behind_the_slot_itself_is_still_found() {
        let mut set = set();
        set.create(spec(0, 0, 16)).unwrap();
        set.create(spec(1, 16, 4)).unwrap();
        // Slot 1 begins last before the end of the new place, but it is the slot that moves.
        assert_eq!(
            set.relocate(1, Gfn(14)).unwrap_err(),
            SlotError::Overlaps { id: 1, other: 0 }
        );
    }

    #[test]
    fn flags_never_change_readonly() {
        let mut set = set();
        set.create(spec(0, 0, 16)).unwrap();
        assert_eq!(
            set.may_change(0, SlotFlags::READONLY).unwrap_err(),
            SlotError::ReadOnlyIsFixed { id: 0 }
        );
        assert_eq!(
            set.may_change(9, SlotFlags::empty()).unwrap_err(),
            SlotError::UnknownId { id: 9 }
        );
        let logging = set.may_change(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(logging.flags, SlotFlags::LOG_DIRTY);
    }

    #[test]
    fn over_finds_the_slot_that_reaches_into_the_range() {
        let mut set = set();
        set.create(spec(0, 0, 16)).unwrap();
        set.create(spec(1, 32, 16)).unwrap();
        let over = |start, pages| -> Vec<SlotId> {
            let range = GfnRange::new(Gfn(start), pages);
            set.over(range).map(|slot| slot.spec.id).collect()
        };
        assert_eq!(over(15, 1), [0]);
        assert_eq!(over(16, 16), []);
        assert_eq!(over(10, 30), [0, 1]);
        assert_eq!(over(0, u64::MAX), [0, 1]);
        assert_eq!(over(47, 0), []);
    }
}
