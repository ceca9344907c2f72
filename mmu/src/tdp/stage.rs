//! The MMU without its format: the trait through which a backend drives any of them.

use alloc::vec::Vec;
use core::fmt;

use super::{
    DirtyLogError, LeafBatch, PrefaultError, Root, TdpMmu, Translation, Vcpu, Walk, WalkFault,
};
use crate::{
    addr::{Gfn, GfnRange, Level, Pfn},
    fault::{Access, Fault, FaultOutcome},
    flush::{Flush, FlushCause},
    format::{Format, FormatInfo},
    invalidate::{ForeignInvalidation, Invalidation},
    slot::{SlotError, SlotFlags, SlotId, SlotSpec},
    stats::MmuStats,
    table::{header::PageHeader, memory::TableMemory},
};

/// A guest's second-stage address space, whatever its page-table format.
///
/// All methods take `&self` and may be called from any thread, by vCPUs in parallel. An operation that has returned is
/// complete: its flushes have been carried out by the [`Host`](crate::Host). So a vCPU calls [`fault`](Self::fault) and everything else here
/// only *outside* the guest, where it does not hold up flushes; [`access`](Self::access) and [`translate`](Self::translate) wait for no flush
/// and for nobody who waits for one, and may be called inside.
///
/// Address spaces (x86: system-management mode) have slots and roots of their own. Methods without `as_id` mean number 0; a
/// [`Vcpu`] says where it is itself.
///
/// # A vCPU with a TLB of its own
///
/// 1. Look `gfn` up in the TLB. On a miss, [`access`](Self::access).
/// 2. If that fails, [`fault`](Self::fault), outside: on `Fixed`, `Spurious` and `Retry` begin anew, after
///    [`install_fence`](Self::install_fence) if the TLB remembers what was not mapped; the other outcomes leave the guest.
/// 3. Before an entry that was just filled is used, obey the flush requests that have arrived meanwhile; and whoever
///    flushes waits until each vCPU has obeyed or is outside the guest.
pub trait SecondStage: Send + Sync + fmt::Debug {
    /// The format's constants.
    fn format(&self) -> FormatInfo;

    /// A vCPU's part of the MMU, in address space 0.
    fn vcpu(&self) -> Vcpu;

    /// The root to load, made if there is none. `None` if there is no memory for it, or no such address space.
    fn root_in(&self, as_id: u8) -> Option<Root>;

    /// [`root_in`](Self::root_in) address space 0.
    fn root(&self) -> Option<Root> {
        self.root_in(0)
    }

    /// The root that `vcpu` is to run on, loaded: a withdrawn one is given up for the valid one. To be called before each
    /// entry into the guest by a vCPU that hardware walks for.
    fn load_root(&self, vcpu: &mut Vcpu) -> Option<Root>;

    /// Counters. Takes no lock that an operation holds for long.
    fn stats(&self) -> MmuStats;

    /// The header of the table that host frame `frame` is part of.
    fn page_header(&self, frame: Pfn) -> Option<PageHeader>;

    /// Adds a slot. Nothing is mapped until the guest faults.
    ///
    /// # Errors
    ///
    /// Each rule of [`SlotError`].
    fn create_slot(&self, spec: SlotSpec) -> Result<(), SlotError>;

    /// Removes a slot and all its mappings. When it returns nothing maps the slot's memory.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownId`].
    fn delete_slot_in(&self, as_id: u8, id: SlotId) -> Result<(), SlotError>;

    /// [`delete_slot_in`](Self::delete_slot_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn delete_slot(&self, id: SlotId) -> Result<(), SlotError> {
        self.delete_slot_in(0, id)
    }

    /// Moves a slot, with its dirty bitmap, to another guest frame. The guest may see the gap between; it never sees the
    /// memory at both places.
    ///
    /// # Errors
    ///
    /// As for [`create_slot`](Self::create_slot), and [`SlotError::UnknownId`].
    fn move_slot_in(&self, as_id: u8, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError>;

    /// [`move_slot_in`](Self::move_slot_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn move_slot(&self, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError> {
        self.move_slot_in(0, id, base_gfn)
    }

    /// Changes a slot's flags: dirty logging on or off. Bits collected so far are lost when it goes off, and what may be
    /// huge becomes huge again.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownId`], [`SlotError::ReadOnlyIsFixed`], [`SlotError::NoMemory`].
    fn set_slot_flags_in(&self, as_id: u8, id: SlotId, flags: SlotFlags) -> Result<(), SlotError>;

    /// [`set_slot_flags_in`](Self::set_slot_flags_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.set_slot_flags_in(0, id, flags)
    }

    /// All slots by address space and number.
    fn slots(&self) -> Vec<SlotSpec>;

    /// Forbids mappings of `level` over the frames of `range`, whatever alignment allows, and splits those there are. Each
    /// call is one reason; [`allow_huge_pages`](Self::allow_huge_pages) takes one back. Reasons go with the slot.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownAddressSpace`].
    fn forbid_huge_pages(&self, as_id: u8, range: GfnRange, level: Level) -> Result<(), SlotError>;

    /// Takes back one reason given by [`forbid_huge_pages`](Self::forbid_huge_pages) with the same range and level.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownAddressSpace`].
    fn allow_huge_pages(&self, as_id: u8, range: GfnRange, level: Level) -> Result<(), SlotError>;

    /// Where `gfn` leads now. Changes nothing. Walks without a lock, from a root that it looks up under the lock of their list.
    fn translate_in(&self, as_id: u8, gfn: Gfn) -> Option<Translation>;

    /// [`translate_in`](Self::translate_in) address space 0.
    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        self.translate_in(0, gfn)
    }

    /// Walks as hardware does, from the vCPU's root: checks permissions and, where the format says so, sets Accessed and
    /// Dirty.
    ///
    /// It takes no lock while the vCPU's root is valid. A vCPU whose root was withdrawn moves to the root that has taken its
    /// place, or finds nothing mapped while there is none. To move it takes the lock of the list of roots and, if it was the last
    /// to have the old root loaded, that of the tables to be given back. It may have to wait until another has looked through the
    /// one or given back what is in the other; whoever holds them never waits for a flush, a grace period or the MMU lock, so
    /// a flush may wait for a vCPU that is in here.
    ///
    /// # Errors
    ///
    /// The fault that hardware would raise; take it to [`fault`](Self::fault).
    fn access(&self, vcpu: &mut Vcpu, gfn: Gfn, access: Access) -> Result<Translation, WalkFault>;

    /// The entries on the way to `gfn`, as [`translate_in`](Self::translate_in) finds them.
    fn walk_in(&self, as_id: u8, gfn: Gfn) -> Walk;

    /// The first leaves over `range`, by guest frame, and the rest of the range:
    /// [`Leaves`](crate::Leaves) goes through all of it. Takes no lock and changes nothing.
    fn leaf_batch_in(&self, as_id: u8, range: GfnRange) -> LeafBatch;

    /// [`walk_in`](Self::walk_in) address space 0.
    fn walk(&self, gfn: Gfn) -> Walk {
        self.walk_in(0, gfn)
    }

    /// Resolves a fault. A write to a logged page marks it dirty before this returns.
    fn fault(&self, vcpu: &mut Vcpu, fault: Fault) -> FaultOutcome;

    /// What the vCPU that took a fault on `gfn`, which ended in `outcome`, flushes in the TLB of the processor it runs on before it
    /// enters the guest again: because hardware may remember that entries were *invalid*
    /// ([`Format::INSTALL_NEEDS_FENCE`]). Nobody else has to. To be asked once after each [`fault`](Self::fault) on the guest's own
    /// tables, before the next.
    ///
    /// [`Flush::None`] for a format without the constant, and for an outcome that leaves nothing to be tried again. The span of the
    /// leaf if the fault made a leaf alone. [`Flush::All`] if it linked a table on the way or split a huge leaf, since a fence by
    /// address leaves entries above the leaf alone; and after [`Spurious`](FaultOutcome::Spurious), when it was another vCPU
    /// that may have done so. `All` stands for this guest's translations on this processor (RISC-V: `HFENCE.GVMA` with `rs1 = x0` and
    /// the VMID); the root stays loaded.
    ///
    /// [`prefault`](Self::prefault) owes nothing: a vCPU that remembers what was invalid before takes one spurious fault.
    fn install_fence(&self, vcpu: &mut Vcpu, gfn: Gfn, outcome: FaultOutcome) -> Flush;

    /// Maps every page of `range` as a read would, at `max_level` or finer, without counting as a use. Returns the number
    /// of pages.
    ///
    /// # Errors
    ///
    /// [`PrefaultError`] says where and why it stopped; the pages before are mapped.
    fn prefault(
        &self,
        vcpu: &mut Vcpu,
        range: GfnRange,
        max_level: Level,
    ) -> Result<u64, PrefaultError>;

    /// The invalidation sequence number, for [`Fault::seq`].
    fn invalidate_seq(&self) -> u64;

    /// The host is about to take back the memory behind `range`: unmaps it and holds faults off until
    /// [`invalidate_end`](Self::invalidate_end). `may_yield`: vCPUs may fault elsewhere meanwhile; without it the lock is held
    /// to the end, so the range should be small. Memory is named by guest frames: until the end, a slot over the range must
    /// neither be moved nor made anew elsewhere, or faults would map what is being taken at its new place.
    fn invalidate_begin_in(&self, as_id: u8, range: GfnRange, may_yield: bool) -> Invalidation;

    /// [`invalidate_begin_in`](Self::invalidate_begin_in) address space 0, with yields.
    fn invalidate_begin(&self, range: GfnRange) -> Invalidation {
        self.invalidate_begin_in(0, range, true)
    }

    /// The memory is gone, or was replaced; faults may look again.
    ///
    /// # Errors
    ///
    /// [`ForeignInvalidation`] gives back a token of another MMU. Nothing has changed.
    fn invalidate_end(&self, done: Invalidation) -> Result<(), ForeignInvalidation>;

    /// Unmaps every leaf that covers a frame of `range`. Slots stay; the guest faults the frames in again. Whether anything
    /// was mapped.
    fn zap_gfn_range_in(&self, as_id: u8, range: GfnRange) -> bool;

    /// [`zap_gfn_range_in`](Self::zap_gfn_range_in) address space 0.
    fn zap_gfn_range(&self, range: GfnRange) -> bool {
        self.zap_gfn_range_in(0, range)
    }

    /// Unmaps everything and gives all tables back, fast: withdraws the roots, then zaps them.
    fn zap_all(&self);

    /// Withdraws the roots of all address spaces, with a full flush. Their tables stay until
    /// [`zap_invalidated_roots`](Self::zap_invalidated_roots).
    fn invalidate_roots(&self);

    /// Zaps and gives back the tables of withdrawn roots.
    fn zap_invalidated_roots(&self);

    /// Gives back tables that were removed while a reader looked, and what dropped vCPUs left. Operations do so by
    /// themselves; this is for when no operation follows.
    fn reclaim(&self);

    /// Splits mappings coarser than `target` over `range`, ahead of the faults that would. Needs no flush. False if
    /// table memory ran out; what is left is split on fault.
    fn split_huge_pages_in(&self, as_id: u8, range: GfnRange, target: Level) -> bool;

    /// [`split_huge_pages_in`](Self::split_huge_pages_in) address space 0.
    fn split_huge_pages(&self, range: GfnRange, target: Level) -> bool {
        self.split_huge_pages_in(0, range, target)
    }

    /// Takes the leave to write from the mapping over `gfn`, if it is of `min_level` or coarser, and flushes: the next write
    /// faults and is judged anew. Whether there was any to take. A huge mapping over the frame would allow writes again, so
    /// [`forbid_huge_pages`](Self::forbid_huge_pages) there as well where it must last.
    fn write_protect_gfn_in(&self, as_id: u8, gfn: Gfn, min_level: Level) -> bool;

    /// [`write_protect_gfn_in`](Self::write_protect_gfn_in) address space 0.
    fn write_protect_gfn(&self, gfn: Gfn, min_level: Level) -> bool {
        self.write_protect_gfn_in(0, gfn, min_level)
    }

    /// Zaps up to `most` of the tables that the NX-huge-page mitigation keeps; returns how many.
    fn recover_nx_huge_pages(&self, most: usize) -> usize;

    /// Copies a slot's dirty bitmap and changes nothing (`KVM_GET_DIRTY_LOG` with manual protection).
    ///
    /// # Errors
    ///
    /// Unknown slot, no logging, or `bitmap` shorter than the slot's pages / 64, rounded up.
    fn get_dirty_log_in(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError>;

    /// [`get_dirty_log_in`](Self::get_dirty_log_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn get_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), DirtyLogError> {
        self.get_dirty_log_in(0, id, bitmap)
    }

    /// Clears those bits that are set both in `bitmap` and in the slot's, and protects their pages
    /// (`KVM_CLEAR_DIRTY_LOG`). `first_page` is relative to the slot and a multiple of 64; so is `num_pages`, unless it
    /// ends with the slot. Bit 0 of `bitmap` is `first_page`. Returns how many bits were cleared; their pages may be read.
    ///
    /// # Errors
    ///
    /// Each of [`DirtyLogError`].
    fn clear_dirty_log_in(
        &self,
        as_id: u8,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError>;

    /// [`clear_dirty_log_in`](Self::clear_dirty_log_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn clear_dirty_log(
        &self,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError> {
        self.clear_dirty_log_in(0, id, first_page, num_pages, bitmap)
    }

    /// Takes all dirty bits of a slot, protects their pages, and *adds* the bits to `bitmap` (`KVM_GET_DIRTY_LOG` without
    /// manual protection). Returns how many; their pages may be read.
    ///
    /// # Errors
    ///
    /// As for [`get_dirty_log`](Self::get_dirty_log).
    fn harvest_dirty_log_in(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<u64, DirtyLogError>;

    /// [`harvest_dirty_log_in`](Self::harvest_dirty_log_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn harvest_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<u64, DirtyLogError> {
        self.harvest_dirty_log_in(0, id, bitmap)
    }

    /// Marks pages dirty that the host wrote, that hardware logged, or whose harvested bits are given back. Frames
    /// outside logged slots are passed over. Returns how many pages were marked.
    fn mark_dirty_in(&self, as_id: u8, range: GfnRange) -> u64;

    /// [`mark_dirty_in`](Self::mark_dirty_in) address space 0.
    fn mark_dirty(&self, range: GfnRange) -> u64 {
        self.mark_dirty_in(0, range)
    }

    /// Dirty pages of a slot now.
    ///
    /// # Errors
    ///
    /// Unknown slot, or no logging.
    fn dirty_pages_in(&self, as_id: u8, id: SlotId) -> Result<u64, DirtyLogError>;

    /// [`dirty_pages_in`](Self::dirty_pages_in) address space 0.
    ///
    /// # Errors
    ///
    /// As there.
    fn dirty_pages(&self, id: SlotId) -> Result<u64, DirtyLogError> {
        self.dirty_pages_in(0, id)
    }

    /// Clears Accessed over `range`; whether any page was used since the last time. No lock, no flush: idle is a hint.
    fn age_in(&self, as_id: u8, range: GfnRange) -> bool;

    /// [`age_in`](Self::age_in) address space 0.
    fn age(&self, range: GfnRange) -> bool {
        self.age_in(0, range)
    }

    /// Whether a page of `range` was used since it was last aged.
    fn test_age_in(&self, as_id: u8, range: GfnRange) -> bool;

    /// [`test_age_in`](Self::test_age_in) address space 0.
    fn test_age(&self, range: GfnRange) -> bool {
        self.test_age_in(0, range)
    }
}

impl<F: Format, H: TableMemory> SecondStage for TdpMmu<F, H> {
    fn format(&self) -> FormatInfo {
        F::info()
    }

    fn vcpu(&self) -> Vcpu {
        self.do_vcpu()
    }

    fn root_in(&self, as_id: u8) -> Option<Root> {
        self.do_root(as_id)
    }

    fn load_root(&self, vcpu: &mut Vcpu) -> Option<Root> {
        if !self.owns(vcpu) || !self.load_root(vcpu, false) {
            return None;
        }
        vcpu.root.as_ref().map(|root| root.root())
    }

    fn stats(&self) -> MmuStats {
        self.snapshot()
    }

    fn page_header(&self, frame: Pfn) -> Option<PageHeader> {
        let back = self.tables.header(frame).frames_back()?;
        let first = Pfn(frame.0.checked_sub(back)?);
        self.tables.header(first).snapshot(first)
    }

    fn create_slot(&self, spec: SlotSpec) -> Result<(), SlotError> {
        self.do_create_slot(spec)
    }

    fn delete_slot_in(&self, as_id: u8, id: SlotId) -> Result<(), SlotError> {
        self.do_delete_slot(as_id, id)
    }

    fn move_slot_in(&self, as_id: u8, id: SlotId, base_gfn: Gfn) -> Result<(), SlotError> {
        self.do_move_slot(as_id, id, base_gfn)
    }

    fn set_slot_flags_in(&self, as_id: u8, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.do_set_slot_flags(as_id, id, flags)
    }

    fn slots(&self) -> Vec<SlotSpec> {
        self.do_slots()
    }

    fn forbid_huge_pages(&self, as_id: u8, range: GfnRange, level: Level) -> Result<(), SlotError> {
        self.do_forbid_huge_pages(as_id, range, level, true)
    }

    fn allow_huge_pages(&self, as_id: u8, range: GfnRange, level: Level) -> Result<(), SlotError> {
        self.do_forbid_huge_pages(as_id, range, level, false)
    }

    fn translate_in(&self, as_id: u8, gfn: Gfn) -> Option<Translation> {
        self.do_translate(as_id, gfn)
    }

    fn access(&self, vcpu: &mut Vcpu, gfn: Gfn, access: Access) -> Result<Translation, WalkFault> {
        self.do_access(vcpu, gfn, access)
    }

    fn walk_in(&self, as_id: u8, gfn: Gfn) -> Walk {
        self.do_walk(as_id, gfn)
    }

    fn leaf_batch_in(&self, as_id: u8, range: GfnRange) -> LeafBatch {
        self.do_leaf_batch(as_id, range)
    }

    #[inline(always)]
    fn fault(&self, vcpu: &mut Vcpu, fault: Fault) -> FaultOutcome {
        self.do_fault(vcpu, fault)
    }

    fn install_fence(&self, vcpu: &mut Vcpu, gfn: Gfn, outcome: FaultOutcome) -> Flush {
        self.do_install_fence(vcpu, gfn, outcome)
    }

    fn prefault(
        &self,
        vcpu: &mut Vcpu,
        range: GfnRange,
        max_level: Level,
    ) -> Result<u64, PrefaultError> {
        self.do_prefault(vcpu, range, max_level)
    }

    fn invalidate_seq(&self) -> u64 {
        self.invalidations.sequence()
    }

    fn invalidate_begin_in(&self, as_id: u8, range: GfnRange, may_yield: bool) -> Invalidation {
        self.do_invalidate_begin(as_id, range, may_yield)
    }

    fn invalidate_end(&self, done: Invalidation) -> Result<(), ForeignInvalidation> {
        self.do_invalidate_end(done)
    }

    fn zap_gfn_range_in(&self, as_id: u8, range: GfnRange) -> bool {
        self.unmap(as_id, range, FlushCause::Unmap, true)
    }

    fn zap_all(&self) {
        // One zapper at a time: when this returns, none is still at work for another.
        let _slots = self.spaces.lock();
        self.do_zap_all();
    }

    fn invalidate_roots(&self) {
        let _slots = self.spaces.lock();
        self.do_invalidate_roots();
    }

    fn zap_invalidated_roots(&self) {
        let _slots = self.spaces.lock();
        self.do_zap_invalidated_roots();
    }

    fn reclaim(&self) {
        self.tidy();
    }

    fn split_huge_pages_in(&self, as_id: u8, range: GfnRange, target: Level) -> bool {
        let _slots = self.spaces.lock();
        self.do_split_huge_pages(as_id, range, target)
    }

    fn write_protect_gfn_in(&self, as_id: u8, gfn: Gfn, min_level: Level) -> bool {
        self.do_write_protect_gfn(as_id, gfn, min_level)
    }

    fn recover_nx_huge_pages(&self, most: usize) -> usize {
        self.do_recover_nx_huge_pages(most)
    }

    fn get_dirty_log_in(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        self.do_get_dirty_log(as_id, id, bitmap)
    }

    fn clear_dirty_log_in(
        &self,
        as_id: u8,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<u64, DirtyLogError> {
        self.do_clear_dirty_log(as_id, id, first_page, num_pages, bitmap)
    }

    fn harvest_dirty_log_in(
        &self,
        as_id: u8,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<u64, DirtyLogError> {
        self.do_harvest_dirty_log(as_id, id, bitmap)
    }

    fn mark_dirty_in(&self, as_id: u8, range: GfnRange) -> u64 {
        self.do_mark_dirty(as_id, range)
    }

    fn dirty_pages_in(&self, as_id: u8, id: SlotId) -> Result<u64, DirtyLogError> {
        self.do_dirty_pages(as_id, id)
    }

    fn age_in(&self, as_id: u8, range: GfnRange) -> bool {
        self.do_age(as_id, range)
    }

    fn test_age_in(&self, as_id: u8, range: GfnRange) -> bool {
        self.do_test_age(as_id, range)
    }
}
