//! The MMU without its format: the trait through which a backend drives any of them.
//!
//! Here is what concerns the whole MMU, or a vCPU, which says itself where it is. What concerns one
//! address space is in `space`.

use alloc::vec::Vec;
use core::fmt;

use super::{
    mmu::TdpMmu,
    prefault::PrefaultError,
    root::Root,
    space::AddressSpace,
    vcpu::Vcpu,
    walk::{Translation, WalkFault},
};
use crate::{
    addr::{Gfn, GfnRange, Level, Pfn},
    fault::{Access, Around, Fault, FaultOutcome, RangeOutcome},
    flush::Flush,
    format::{Format, FormatInfo},
    invalidate::{ForeignInvalidation, Invalidation},
    slot::{SlotError, SlotSpec},
    stats::MmuStats,
    table::{header::PageHeader, memory::TableMemory},
};

/// A guest's second-stage page tables, whatever their format.
///
/// All methods take `&self` and may be called from any thread, by vCPUs in parallel. An operation
/// that has returned is complete: its flushes have been carried out by the [`Host`](crate::Host).
/// So a vCPU calls [`fault`](Self::fault) and everything else here only *outside* the guest, where
/// it does not hold up flushes; [`access`](Self::access) and [`translate`](AddressSpace::translate)
/// wait for no flush and for nobody who waits for one, and may be called inside.
///
/// Address spaces (x86: system-management mode) have slots and roots of their own.
/// [`space`](Self::space) gives the handle of one, with its operations; most guests have number 0
/// alone. A [`Vcpu`] says where it is itself.
///
/// # A vCPU with a TLB of its own
///
/// 1. Look `gfn` up in the TLB. On a miss, [`access`](Self::access).
/// 2. If that fails, [`fault`](Self::fault), outside: on `Fixed`, `Spurious` and `Retry` begin
///    anew, after [`install_fence`](Self::install_fence) if the TLB remembers what was not mapped;
///    the other outcomes leave the guest.
/// 3. Before an entry that was just filled is used, obey the flush requests that have arrived
///    meanwhile; and whoever flushes waits until each vCPU has obeyed or is outside the guest.
pub trait SecondStage: Send + Sync + fmt::Debug {
    /// The format's constants.
    fn format(&self) -> FormatInfo;

    /// The handle of address space `as_id`, whether or not it exists.
    fn space(&self, as_id: u8) -> AddressSpace<'_>;

    /// A vCPU's part of the MMU, in address space 0.
    fn vcpu(&self) -> Vcpu;

    /// The root that `vcpu` is to run on, loaded: a withdrawn one is given up for the valid one. To
    /// be called before each entry into the guest by a vCPU that hardware walks for.
    fn load_root(&self, vcpu: &mut Vcpu) -> Option<Root>;

    /// Counters. Takes no lock that an operation holds for long.
    fn stats(&self) -> MmuStats;

    /// The header of the table that host frame `frame` is part of.
    fn page_header(&self, frame: Pfn) -> Option<PageHeader>;

    /// Adds a slot to the address space that `spec` names. Nothing is mapped until the guest
    /// faults.
    ///
    /// # Errors
    ///
    /// Each rule of [`SlotError`].
    fn create_slot(&self, spec: SlotSpec) -> Result<(), SlotError>;

    /// All slots by address space and number.
    fn slots(&self) -> Vec<SlotSpec>;

    /// Walks as hardware does, from the vCPU's root: checks permissions and, where the format says
    /// so, sets Accessed and Dirty.
    ///
    /// It takes no lock while the vCPU's root is valid. A vCPU whose root was withdrawn moves to
    /// the root that has taken its place, or finds nothing mapped while there is none. To move it
    /// takes the lock of the list of roots and, if it was the last to have the old root loaded,
    /// that of the tables to be given back. It may have to wait until another has looked through
    /// the one or given back a batch of the other; whoever holds them never waits for a flush, a
    /// grace period or the MMU lock, so a flush may wait for a vCPU that is in here.
    ///
    /// # Errors
    ///
    /// The fault that hardware would raise; take it to [`fault`](Self::fault).
    fn access(&self, vcpu: &mut Vcpu, gfn: Gfn, access: Access) -> Result<Translation, WalkFault>;

    /// Resolves a fault. A write to a logged page marks it dirty before this returns.
    fn fault(&self, vcpu: &mut Vcpu, fault: Fault) -> FaultOutcome;

    /// Resolves a fault in the mirror, [`Fault::mirror`] set or not, and maps with it what is not
    /// mapped yet of the neighbours that `around` names: in one batch for the owner of the tables.
    ///
    /// Neighbours are taken from the fault's own slot and from its own 4 KiB table, so at most 512
    /// pages are mapped, all in the same aligned 2 MiB. They are left out while memory is being
    /// taken back among them. Whatever comes of them, the [outcome](RangeOutcome::outcome) is the
    /// fault's own; when that cannot be resolved at all (no slot, try again), nothing is mapped.
    /// The owner is asked when the fault was spurious, too, if a neighbour is not mapped.
    ///
    /// *Contents*: the caller has made them be there, for the fault's page and for `around`, after
    /// it read [`Fault::seq`].
    ///
    /// *Locking*: the owner is called without any lock ([`ExternalTables`](crate::ExternalTables)).
    fn fault_range(&self, vcpu: &mut Vcpu, fault: Fault, around: Around) -> RangeOutcome;

    /// What the vCPU that took a fault on `gfn`, which ended in `outcome`, flushes in the TLB of
    /// the processor it runs on before it enters the guest again: because hardware may remember
    /// that entries were *invalid* ([`Format::INSTALL_NEEDS_FENCE`]). Nobody else has to. To be
    /// asked once after each [`fault`](Self::fault) on the guest's own tables, before the next.
    ///
    /// [`Flush::None`] for a format without the constant, and for an outcome that leaves nothing to
    /// be tried again. The span of the leaf if the fault made a leaf alone. [`Flush::All`] if it
    /// linked a table on the way or split a huge leaf, since a fence by address leaves entries
    /// above the leaf alone; and after [`Spurious`](FaultOutcome::Spurious), when it was another
    /// vCPU that may have done so. `All` stands for this guest's translations on this processor
    /// (RISC-V: `HFENCE.GVMA` with `rs1 = x0` and the VMID); the root stays loaded.
    ///
    /// [`prefault`](Self::prefault) owes nothing: a vCPU that remembers what was invalid before
    /// takes one spurious fault.
    fn install_fence(&self, vcpu: &mut Vcpu, gfn: Gfn, outcome: FaultOutcome) -> Flush;

    /// Maps every page of `range` as a read would, at `max_level` or finer, without counting as a
    /// use. Returns the number of pages.
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

    /// The memory is gone, or was replaced; faults may look again. Ends what
    /// [`invalidate_begin`](AddressSpace::invalidate_begin) began, in whatever address space.
    ///
    /// # Errors
    ///
    /// [`ForeignInvalidation`] gives back a token of another MMU. Nothing has changed.
    fn invalidate_end(&self, done: Invalidation) -> Result<(), ForeignInvalidation>;

    /// Unmaps everything and gives all tables back, fast: withdraws the roots, then zaps them.
    fn zap_all(&self);

    /// Withdraws the roots of all address spaces, with a full flush. Their tables stay until
    /// [`zap_invalidated_roots`](Self::zap_invalidated_roots).
    fn invalidate_roots(&self);

    /// Zaps and gives back the tables of withdrawn roots.
    fn zap_invalidated_roots(&self);

    /// Gives back tables that were removed while a reader looked, and what dropped vCPUs left.
    /// Operations do so by themselves; this is for when no operation follows.
    fn reclaim(&self);

    /// Zaps up to `most` of the tables that the NX-huge-page mitigation keeps; returns how many.
    fn recover_nx_huge_pages(&self, most: usize) -> usize;
}

impl<F: Format, H: TableMemory> SecondStage for TdpMmu<F, H> {
    fn format(&self) -> FormatInfo {
        F::info()
    }

    fn space(&self, as_id: u8) -> AddressSpace<'_> {
        AddressSpace::new(self, as_id)
    }

    fn vcpu(&self) -> Vcpu {
        self.do_vcpu()
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

    fn slots(&self) -> Vec<SlotSpec> {
        self.do_slots()
    }

    fn access(&self, vcpu: &mut Vcpu, gfn: Gfn, access: Access) -> Result<Translation, WalkFault> {
        self.do_access(vcpu, gfn, access)
    }

    #[inline(always)]
    fn fault(&self, vcpu: &mut Vcpu, fault: Fault) -> FaultOutcome {
        self.do_fault(vcpu, fault)
    }

    fn fault_range(&self, vcpu: &mut Vcpu, fault: Fault, around: Around) -> RangeOutcome {
        self.do_fault_range(vcpu, &fault, &around)
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

    fn invalidate_end(&self, done: Invalidation) -> Result<(), ForeignInvalidation> {
        self.do_invalidate_end(done)
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

    fn recover_nx_huge_pages(&self, most: usize) -> usize {
        self.do_recover_nx_huge_pages(most)
    }
}
