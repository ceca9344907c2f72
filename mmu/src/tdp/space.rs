//! The operations on one address space.
//!
//! [`AddressSpace`] is a handle: it names a space of an MMU and holds nothing. Each operation is
//! documented here, once; what carries it out is in the file of its name. The format is a type
//! parameter of the MMU and not of the handle, so the handle reaches the MMU through
//! [`Operations`], which only this crate implements.

use core::fmt;

use super::{
    dirty::DirtyLogError,
    leaves::LeafBatch,
    mirror_range::{Aged, Aim, MirrorChange},
    mmu::TdpMmu,
    root::Root,
    walk::{Translation, Walk},
};
use crate::{
    addr::{Gfn, GfnRange, Level},
    flush::FlushCause,
    format::Format,
    invalidate::Invalidation,
    slot::{SlotError, SlotFlags, SlotId},
    table::memory::TableMemory,
};

/// One address space of an MMU: the operations on its slots, mappings and dirty logs.
///
/// Given out by [`SecondStage::space`](crate::SecondStage::space), for any number. A space that was
/// not configured has no slot and no root, and stays like that: what can fail fails, and the rest
/// finds nothing to do.
///
/// An operation that has returned is complete: its flushes have been carried out.
#[derive(Clone, Copy)]
pub struct AddressSpace<'m> {
    mmu: &'m dyn Operations,
    as_id: u8,
}

impl fmt::Debug for AddressSpace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("as_id", &self.as_id)
            .finish_non_exhaustive()
    }
}

impl<'m> AddressSpace<'m> {
    #[inline]
    pub(super) fn new(mmu: &'m dyn Operations, as_id: u8) -> Self {
        Self { mmu, as_id }
    }

    /// The space's number.
    pub fn as_id(self) -> u8 {
        self.as_id
    }

    /// The root to load, made if there is none. `None` if there is no memory for it, or no such
    /// space.
    pub fn root(self) -> Option<Root> {
        self.mmu.root(self.as_id)
    }

    /// Removes a slot and all its mappings. When it returns nothing maps the slot's memory.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownId`], [`SlotError::UnknownAddressSpace`].
    pub fn delete_slot(self, id: SlotId) -> Result<(), SlotError> {
        self.mmu.delete_slot(self.as_id, id)
    }

    /// Moves a slot, with its dirty bitmap, to another guest frame. The guest may see the gap
    /// between; it never sees the memory at both places.
    ///
    /// # Errors
    ///
    /// As for [`create_slot`](crate::SecondStage::create_slot), and [`SlotError::UnknownId`].
    pub fn move_slot(self, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError> {
        self.mmu.move_slot(self.as_id, id, base_gfn)
    }

    /// Changes a slot's flags: dirty logging on or off. When it goes off, the bits collected so far
    /// are lost, and what may be huge becomes huge again.
    ///
    /// Returns how many huge mappings were left whole although they should have been split ahead
    /// ([`MmuConfig::eager_split`](crate::MmuConfig::eager_split)), for want of table memory. No
    /// write to them is lost: they are protected whole, and the first write to each splits it, for
    /// which that fault needs a table. Not 0 means that the memory for tables is too small (see the
    /// crate's page).
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownId`], [`SlotError::UnknownAddressSpace`],
    /// [`SlotError::ReadOnlyIsFixed`], [`SlotError::UnknownFlags`], [`SlotError::NoMemory`].
    pub fn set_slot_flags(self, id: SlotId, flags: SlotFlags) -> Result<u64, SlotError> {
        self.mmu.set_slot_flags(self.as_id, id, flags)
    }

    /// Forbids mappings of `level` over the frames of `range`, whatever alignment allows, and
    /// splits those there are. Each call is one reason;
    /// [`allow_huge_pages`](Self::allow_huge_pages) takes one back. Reasons go with the slot.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownAddressSpace`].
    pub fn forbid_huge_pages(self, range: GfnRange, level: Level) -> Result<(), SlotError> {
        self.mmu.forbid_huge_pages(self.as_id, range, level, true)
    }

    /// Takes back one reason given by [`forbid_huge_pages`](Self::forbid_huge_pages) with the same
    /// range and level.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownAddressSpace`].
    pub fn allow_huge_pages(self, range: GfnRange, level: Level) -> Result<(), SlotError> {
        self.mmu.forbid_huge_pages(self.as_id, range, level, false)
    }

    /// Where `gfn` leads now. Changes nothing. Walks without a lock, from a root that it looks up
    /// under the lock of their list.
    #[inline]
    pub fn translate(self, gfn: Gfn) -> Option<Translation> {
        self.mmu.translate(self.as_id, gfn)
    }

    /// The entries on the way to `gfn`, as [`translate`](Self::translate) finds them.
    pub fn walk(self, gfn: Gfn) -> Walk {
        self.mmu.walk(self.as_id, gfn)
    }

    /// The first leaves over `range`, by guest frame, and the rest of the range:
    /// [`leaves`](Self::leaves) goes through all of it. Takes no lock and changes nothing.
    pub fn leaf_batch(self, range: GfnRange) -> LeafBatch {
        self.batch_of(range, false)
    }

    pub(super) fn batch_of(self, range: GfnRange, mirror: bool) -> LeafBatch {
        self.mmu.leaf_batch(self.as_id, range, mirror)
    }

    pub(super) fn operations(self) -> &'m dyn Operations {
        self.mmu
    }

    /// The host is about to take back the memory behind `range`: unmaps it and holds faults off
    /// until [`invalidate_end`](crate::SecondStage::invalidate_end).
    ///
    /// `may_yield`: vCPUs may fault elsewhere meanwhile. Without it the lock is held to the end, so
    /// the range should be small. Memory is named by guest frames: until the end, a slot over the
    /// range must neither be moved nor made anew elsewhere, or faults would map what is being taken
    /// at its new place. A mirror is unmapped without the lock in any case, because its owner is
    /// asked; what the owner refuses to unmap stays mapped there, and
    /// [`MmuStats::pages`](crate::MmuStats::pages) shows it.
    ///
    /// Unmapped is this address space alone: memory that is mapped in several is taken back in each
    /// of them. Faults are held off by frame number, in every address space.
    pub fn invalidate_begin(self, range: GfnRange, may_yield: bool) -> Invalidation {
        self.mmu.invalidate_begin(self.as_id, range, may_yield)
    }

    /// Unmaps every leaf that covers a frame of `range`, of the mirror too. Slots stay; the guest
    /// faults the frames in again. Whether anything was unmapped.
    pub fn zap_gfn_range(self, range: GfnRange) -> bool {
        self.mmu.zap_gfn_range(self.as_id, range)
    }

    /// Splits mappings coarser than `target` over `range`, ahead of the faults that would. Needs no
    /// flush.
    ///
    /// Returns how many are left whole because table memory ran out, down to what is kept for
    /// faults ([`MmuConfig::fault_reserve`](crate::MmuConfig::fault_reserve)). Those are split on
    /// fault.
    pub fn split_huge_pages(self, range: GfnRange, target: Level) -> u64 {
        self.mmu.split_huge_pages(self.as_id, range, target)
    }

    /// Takes the leave to write from the mapping over `gfn`, if it is of `min_level` or coarser,
    /// and flushes: the next write faults and is judged anew. Whether there was any to take. A huge
    /// mapping over the frame would allow writes again, so
    /// [`forbid_huge_pages`](Self::forbid_huge_pages) there as well where it must last.
    pub fn write_protect_gfn(self, gfn: Gfn, min_level: Level) -> bool {
        self.mmu.write_protect_gfn(self.as_id, gfn, min_level)
    }

    /// Copies a slot's dirty bitmap and changes nothing (`KVM_GET_DIRTY_LOG` with manual
    /// protection).
    ///
    /// # Errors
    ///
    /// Unknown slot, no logging, or `bitmap` shorter than the slot's pages / 64, rounded up.
    pub fn get_dirty_log(self, id: SlotId, bitmap: &mut [u64]) -> Result<(), DirtyLogError> {
        self.mmu.get_dirty_log(self.as_id, id, bitmap)
    }

    /// Clears those bits that are set both in `bitmap` and in the slot's, and protects their pages
    /// (`KVM_CLEAR_DIRTY_LOG`). `first_page` is relative to the slot and a multiple of 64; so is
    /// `num_pages`, unless it ends with the slot. Bit 0 of `bitmap` is `first_page`. Returns how
    /// many bits were cleared; their pages may be read.
    ///
    /// # Errors
    ///
    /// Each of [`DirtyLogError`].
    pub fn clear_dirty_log(
        self,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError> {
        self.mmu
            .clear_dirty_log(self.as_id, id, first_page, num_pages, bitmap)
    }

    /// Takes all dirty bits of a slot, protects their pages, and *adds* the bits to `bitmap`
    /// (`KVM_GET_DIRTY_LOG` without manual protection). Returns how many; their pages may be read.
    ///
    /// # Errors
    ///
    /// As for [`get_dirty_log`](Self::get_dirty_log).
    pub fn harvest_dirty_log(self, id: SlotId, bitmap: &mut [u64]) -> Result<u64, DirtyLogError> {
        self.mmu.harvest_dirty_log(self.as_id, id, bitmap)
    }

    /// Marks pages dirty that the host wrote, that hardware logged, or whose harvested bits are
    /// given back. Frames outside logged slots are left out. Returns how many pages were marked.
    pub fn mark_dirty(self, range: GfnRange) -> u64 {
        self.mmu.mark_dirty(self.as_id, range)
    }

    /// Dirty pages of a slot now.
    ///
    /// # Errors
    ///
    /// Unknown slot, or no logging.
    pub fn dirty_pages(self, id: SlotId) -> Result<u64, DirtyLogError> {
        self.mmu.dirty_pages(self.as_id, id)
    }

    /// Clears Accessed over `range`; whether any page was used since the last time. No lock, no
    /// flush: idle is a hint.
    pub fn age(self, range: GfnRange) -> bool {
        self.mmu.age(self.as_id, range)
    }

    /// Whether a page of `range` was used since it was last aged.
    pub fn test_age(self, range: GfnRange) -> bool {
        self.mmu.test_age(self.as_id, range)
    }
}

/// How a handle reaches the MMU. Each method is the one of [`AddressSpace`] of that name. `Send`
/// and `Sync`, so that a handle may go to another thread as a reference to the MMU may.
pub(super) trait Operations: Send + Sync {
    fn root(&self, as_id: u8) -> Option<Root>;
    fn delete_slot(&self, as_id: u8, id: SlotId) -> Result<(), SlotError>;
    fn move_slot(&self, as_id: u8, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError>;
    fn set_slot_flags(&self, as_id: u8, id: SlotId, flags: SlotFlags) -> Result<u64, SlotError>;
    fn forbid_huge_pages(
        &self,
        as_id: u8,
        range: GfnRange,
        level: Level,
        forbid: bool,
    ) -> Result<(), SlotError>;
    fn translate(&self, as_id: u8, gfn: Gfn) -> Option<Translation>;
    fn walk(&self, as_id: u8, gfn: Gfn) -> Walk;
    fn leaf_batch(&self, as_id: u8, range: GfnRange, mirror: bool) -> LeafBatch;
    fn invalidate_begin(&self, as_id: u8, range: GfnRange, may_yield: bool) -> Invalidation;
    fn zap_gfn_range(&self, as_id: u8, range: GfnRange) -> bool;
    fn split_huge_pages(&self, as_id: u8, range: GfnRange, target: Level) -> u64;
    fn write_protect_gfn(&self, as_id: u8, gfn: Gfn, min_level: Level) -> bool;
    fn get_dirty_log(&self, as_id: u8, id: SlotId, bitmap: &mut [u64])
    -> Result<(), DirtyLogError>;
    fn clear_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError>;
    fn harvest_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<u64, DirtyLogError>;
    fn mark_dirty(&self, as_id: u8, range: GfnRange) -> u64;
    fn dirty_pages(&self, as_id: u8, id: SlotId) -> Result<u64, DirtyLogError>;
    fn age(&self, as_id: u8, range: GfnRange) -> bool;
    fn test_age(&self, as_id: u8, range: GfnRange) -> bool;
    fn change_mirror(
        &self,
        as_id: u8,
        range: GfnRange,
        aim: Aim,
        cause: FlushCause,
    ) -> MirrorChange;
    fn age_mirror(&self, as_id: u8, range: GfnRange) -> Aged;
    fn withdraw_mirrors(&self, as_id: u8) -> u64;
}

impl<F: Format, H: TableMemory> Operations for TdpMmu<F, H> {
    fn root(&self, as_id: u8) -> Option<Root> {
        self.do_root(as_id)
    }

    fn delete_slot(&self, as_id: u8, id: SlotId) -> Result<(), SlotError> {
        self.do_delete_slot(as_id, id)
    }

    fn move_slot(&self, as_id: u8, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError> {
        self.do_move_slot(as_id, id, base_gfn)
    }

    fn set_slot_flags(&self, as_id: u8, id: SlotId, flags: SlotFlags) -> Result<u64, SlotError> {
        self.do_set_slot_flags(as_id, id, flags)
    }

    fn forbid_huge_pages(
        &self,
        as_id: u8,
        range: GfnRange,
        level: Level,
        forbid: bool,
    ) -> Result<(), SlotError> {
        self.do_forbid_huge_pages(as_id, range, level, forbid)
    }

    fn translate(&self, as_id: u8, gfn: Gfn) -> Option<Translation> {
        self.do_translate(as_id, gfn)
    }

    fn walk(&self, as_id: u8, gfn: Gfn) -> Walk {
        self.do_walk(as_id, gfn)
    }

    fn leaf_batch(&self, as_id: u8, range: GfnRange, mirror: bool) -> LeafBatch {
        self.do_leaf_batch(as_id, range, mirror)
    }

    fn invalidate_begin(&self, as_id: u8, range: GfnRange, may_yield: bool) -> Invalidation {
        self.do_invalidate_begin(as_id, range, may_yield)
    }

    fn zap_gfn_range(&self, as_id: u8, range: GfnRange) -> bool {
        self.unmap(as_id, range, FlushCause::Unmap, true)
    }

    fn split_huge_pages(&self, as_id: u8, range: GfnRange, target: Level) -> u64 {
        let _slots = self.spaces.lock();
        self.do_split_huge_pages(as_id, range, target)
    }

    fn write_protect_gfn(&self, as_id: u8, gfn: Gfn, min_level: Level) -> bool {
        self.do_write_protect_gfn(as_id, gfn, min_level)
    }

    fn get_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        self.do_get_dirty_log(as_id, id, bitmap)
    }

    fn clear_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError> {
        self.do_clear_dirty_log(as_id, id, first_page, num_pages, bitmap)
    }

    fn harvest_dirty_log(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<u64, DirtyLogError> {
        self.do_harvest_dirty_log(as_id, id, bitmap)
    }

    fn mark_dirty(&self, as_id: u8, range: GfnRange) -> u64 {
        self.do_mark_dirty(as_id, range)
    }

    fn dirty_pages(&self, as_id: u8, id: SlotId) -> Result<u64, DirtyLogError> {
        self.do_dirty_pages(as_id, id)
    }

    fn age(&self, as_id: u8, range: GfnRange) -> bool {
        self.do_age(as_id, range)
    }

    fn test_age(&self, as_id: u8, range: GfnRange) -> bool {
        self.do_test_age(as_id, range)
    }

    fn change_mirror(
        &self,
        as_id: u8,
        range: GfnRange,
        aim: Aim,
        cause: FlushCause,
    ) -> MirrorChange {
        self.do_change_mirror(as_id, range, aim, cause)
    }

    fn age_mirror(&self, as_id: u8, range: GfnRange) -> Aged {
        self.do_age_mirror(as_id, range)
    }

    fn withdraw_mirrors(&self, as_id: u8) -> u64 {
        self.do_withdraw_mirrors(as_id)
    }
}
