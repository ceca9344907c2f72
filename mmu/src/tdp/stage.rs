//! The MMU without its format: the trait through which a backend drives any of them.

use alloc::vec::Vec;
use core::fmt;

use super::{DirtyLogError, PageHeader, Root, TdpMmu, Translation, Walk, WalkFault};
use crate::{
    addr::{Gfn, GfnRange, Level, Pfn},
    fault::{Access, Fault, FaultOutcome},
    flush::Flush,
    format::{Format, FormatInfo},
    invalidate::Invalidation,
    slot::{SlotError, SlotFlags, SlotId, SlotSpec},
    stats::MmuStats,
    table::{memory::TableMemory, readers::ReadGuard},
};

/// A guest's second-stage address space, whatever its page-table format.
///
/// All methods take `&self` and may be called from any thread. A method that returns a [`Flush`] is complete only when
/// the caller has carried it out on every vCPU.
///
/// # A vCPU with a TLB of its own
///
/// 1. Look `gfn` up in the TLB. On a miss, [`access`](Self::access) (or [`translate`](Self::translate)).
/// 2. If that fails, [`fault`](Self::fault): on `Fixed` carry out its flush, on `Fixed`, `Spurious` and `Retry` begin
///    anew; the other outcomes leave the guest.
/// 3. Before an entry that was just filled is used, obey the flush requests that have arrived meanwhile; and whoever
///    flushes waits until each vCPU has obeyed or is outside the guest.
pub trait SecondStage: Send + Sync + fmt::Debug {
    /// The format's constants.
    fn format(&self) -> FormatInfo;

    /// The root to load, made if there is none. `None` if there is no memory for it.
    fn root(&self) -> Option<Root>;

    /// Keeps removed tables in memory while the guard lives; see [`ReadGuard`].
    fn pin(&self) -> ReadGuard<'_>;

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

    /// Removes a slot and all its mappings. Its memory may be reused when the flush is done.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownId`].
    fn delete_slot(&self, id: SlotId) -> Result<Flush, SlotError>;

    /// Moves a slot, with its dirty bitmap, to another guest frame. The guest may see the gap between.
    ///
    /// # Errors
    ///
    /// As for [`create_slot`](Self::create_slot), and [`SlotError::UnknownId`].
    fn move_slot(&self, id: SlotId, base_gfn: Gfn) -> Result<Flush, SlotError>;

    /// Changes a slot's flags: dirty logging on or off. Bits collected so far are lost when it goes off.
    ///
    /// # Errors
    ///
    /// [`SlotError::UnknownId`], [`SlotError::ReadOnlyIsFixed`], [`SlotError::NoMemory`].
    fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<Flush, SlotError>;

    /// All slots by number.
    fn slots(&self) -> Vec<SlotSpec>;

    /// Where `gfn` leads now. Lock-free, changes nothing.
    fn translate(&self, gfn: Gfn) -> Option<Translation>;

    /// Walks as hardware does: checks permissions and, where the format says so, sets Accessed and Dirty. Lock-free.
    ///
    /// # Errors
    ///
    /// The fault that hardware would raise; take it to [`fault`](Self::fault).
    fn access(&self, gfn: Gfn, access: Access) -> Result<Translation, WalkFault>;

    /// The entries on the way to `gfn`. Lock-free.
    fn walk(&self, gfn: Gfn) -> Walk;

    /// Resolves a fault. A write to a logged page marks it dirty before this returns.
    fn fault(&self, fault: Fault) -> FaultOutcome;

    /// The invalidation sequence number, for [`Fault::seq`].
    fn invalidate_seq(&self) -> u64;

    /// The host is about to take back the memory behind `range`: unmaps it and holds faults off until
    /// [`invalidate_end`](Self::invalidate_end). Take the memory when the flush is done.
    fn invalidate_begin(&self, range: GfnRange) -> (Invalidation, Flush);

    /// The memory is gone, or was replaced; faults may look again.
    fn invalidate_end(&self, done: Invalidation);

    /// Unmaps every leaf that covers a frame of `range`. Slots stay; the guest faults the frames in again.
    fn zap_gfn_range(&self, range: GfnRange) -> Flush;

    /// Unmaps everything and gives all tables back, the root included.
    fn zap_all(&self) -> Flush;

    /// Withdraws the root. Its tables stay until [`zap_invalidated_roots`](Self::zap_invalidated_roots).
    fn invalidate_roots(&self) -> Flush;

    /// Gives back the tables of withdrawn roots. Call it when the flush that withdrew them is done.
    fn zap_invalidated_roots(&self);

    /// Gives back tables that were removed while a reader looked. Operations do so by themselves; this is for when no
    /// operation follows.
    fn reclaim(&self);

    /// Splits mappings coarser than `target` over `range`, ahead of the faults that would. Needs no flush. False if
    /// table memory ran out; what is left is split on fault.
    fn split_huge_pages(&self, range: GfnRange, target: Level) -> bool;

    /// Copies a slot's dirty bitmap and changes nothing (`KVM_GET_DIRTY_LOG` with manual protection).
    ///
    /// # Errors
    ///
    /// Unknown slot, no logging, or `bitmap` shorter than the slot's pages / 64, rounded up.
    fn get_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), DirtyLogError>;

    /// Clears those bits that are set both in `bitmap` and in the slot's, and protects their pages
    /// (`KVM_CLEAR_DIRTY_LOG`). `first_page` is relative to the slot and a multiple of 64; so is `num_pages`, unless it
    /// ends with the slot. Bit 0 of `bitmap` is `first_page`.
    ///
    /// # Errors
    ///
    /// Each of [`DirtyLogError`].
    fn clear_dirty_log(
        &self,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<Flush, DirtyLogError>;

    /// Takes all dirty bits of a slot into `bitmap` and protects their pages (`KVM_GET_DIRTY_LOG` without manual
    /// protection). The pages may be read when the flush is done.
    ///
    /// # Errors
    ///
    /// As for [`get_dirty_log`](Self::get_dirty_log).
    fn harvest_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<Flush, DirtyLogError>;

    /// Marks pages dirty that the host wrote, or whose harvested bits are given back. Frames outside logged slots are
    /// passed over. Returns how many pages were marked.
    fn mark_dirty(&self, range: GfnRange) -> u64;

    /// Dirty pages of a slot now.
    ///
    /// # Errors
    ///
    /// Unknown slot, or no logging.
    fn dirty_pages(&self, id: SlotId) -> Result<u64, DirtyLogError>;

    /// Clears Accessed over `range`; whether any page was used since the last time. No flush: idle is a hint.
    fn age(&self, range: GfnRange) -> bool;

    /// Whether a page of `range` was used since it was last aged.
    fn test_age(&self, range: GfnRange) -> bool;
}

impl<F: Format, H: TableMemory> SecondStage for TdpMmu<F, H> {
    fn format(&self) -> FormatInfo {
        F::info()
    }

    fn root(&self) -> Option<Root> {
        self.do_root()
    }

    fn pin(&self) -> ReadGuard<'_> {
        self.tables.pin()
    }

    fn stats(&self) -> MmuStats {
        self.snapshot()
    }

    fn page_header(&self, frame: Pfn) -> Option<PageHeader> {
        self.state.lock().headers.of_frame(frame)
    }

    fn create_slot(&self, spec: SlotSpec) -> Result<(), SlotError> {
        self.state.lock().slots.create(spec).map(drop)
    }

    fn delete_slot(&self, id: SlotId) -> Result<Flush, SlotError> {
        Ok(self.stats.flush(self.do_delete_slot(id)?))
    }

    fn move_slot(&self, id: SlotId, base_gfn: Gfn) -> Result<Flush, SlotError> {
        Ok(self.stats.flush(self.do_move_slot(id, base_gfn)?))
    }

    fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<Flush, SlotError> {
        Ok(self.stats.flush(self.do_set_slot_flags(id, flags)?))
    }

    fn slots(&self) -> Vec<SlotSpec> {
        self.do_slots()
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        self.do_translate(gfn)
    }

    fn access(&self, gfn: Gfn, access: Access) -> Result<Translation, WalkFault> {
        self.do_access(gfn, access)
    }

    fn walk(&self, gfn: Gfn) -> Walk {
        self.do_walk(gfn)
    }

    fn fault(&self, fault: Fault) -> FaultOutcome {
        self.do_fault(fault)
    }

    fn invalidate_seq(&self) -> u64 {
        self.sequence.read()
    }

    fn invalidate_begin(&self, range: GfnRange) -> (Invalidation, Flush) {
        self.do_invalidate_begin(range)
    }

    fn invalidate_end(&self, done: Invalidation) {
        self.do_invalidate_end(done);
    }

    fn zap_gfn_range(&self, range: GfnRange) -> Flush {
        self.do_zap_range(range)
    }

    fn zap_all(&self) -> Flush {
        self.do_zap_all()
    }

    fn invalidate_roots(&self) -> Flush {
        self.do_invalidate_roots()
    }

    fn zap_invalidated_roots(&self) {
        self.do_zap_invalidated_roots();
    }

    fn reclaim(&self) {
        self.tables.reclaim();
    }

    fn split_huge_pages(&self, range: GfnRange, target: Level) -> bool {
        self.do_split_huge_pages(range, target)
    }

    fn get_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), DirtyLogError> {
        self.do_get_dirty_log(id, bitmap)
    }

    fn clear_dirty_log(
        &self,
        id: SlotId,
        first_page: u64,
        num_pages: u64,
        bitmap: &[u64],
    ) -> Result<Flush, DirtyLogError> {
        self.do_clear_dirty_log(id, first_page, num_pages, bitmap)
    }

    fn harvest_dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<Flush, DirtyLogError> {
        self.do_harvest_dirty_log(id, bitmap)
    }

    fn mark_dirty(&self, range: GfnRange) -> u64 {
        self.do_mark_dirty(range)
    }

    fn dirty_pages(&self, id: SlotId) -> Result<u64, DirtyLogError> {
        self.do_dirty_pages(id)
    }

    fn age(&self, range: GfnRange) -> bool {
        self.do_age(range)
    }

    fn test_age(&self, range: GfnRange) -> bool {
        self.do_test_age(range)
    }
}
