//! Arm 64-bit stage-2 translation with a 4 KiB granule: entries and `VTTBR_EL2`.
//!
//! Source: Arm ARM (DDI 0487), chapter D8 "The AArch64 Virtual Memory System Architecture":
//! "VMSAv8-64 translation table format descriptors", "Stage 2 memory type and Shareability
//! attributes", "TLB maintenance"; and the register descriptions of `VTTBR_EL2` and `VTCR_EL2`.
//!
//! # Break before make
//!
//! A valid entry may not become a different valid entry in one store if that changes its size or
//! its output address: it is made invalid, the invalidation is broadcast and waited for, and only
//! then is the new entry written (unless the processor has FEAT_BBM level 2, which these formats do
//! not rely on). A change of permissions alone needs no break. This is
//! [`BREAK_BEFORE_MAKE`](slat_mmu::Format::BREAK_BEFORE_MAKE).
//!
//! # Fences
//!
//! An entry that would give a translation fault or an Access-flag fault is never kept in a TLB. So
//! neither an entry that becomes valid nor one that gets its Access flag owes an invalidation. One
//! that gets W back does, at the processor that faulted: it may hold the entry that did not allow
//! the write. `TLBI IPAS2E1IS` drops stage-2 entries by address, and what was cached from both
//! stages together needs `TLBI VMALLE1IS` after it.
//!
//! *Stores and the table walker.* The walker is an observer of its own. The MMU's release stores
//! see to it that a walker which sees a pointer sees the table behind it; they do not make a store
//! arrive there. That takes a `DSB`, which is the host's to execute:
//!
//! - a flush ([`Host::flush`](slat_mmu::Host::flush)): `DSB ISHST` before the first `TLBI`, so that
//!   no walk brings back the old entry, and `DSB ISH` after the last, which waits until all
//!   processors have finished it;
//! - a fault that ended in [`Fixed`](slat_mmu::FaultOutcome::Fixed): `DSB ISHST` before the guest
//!   is entered again, or it may take the same fault for want of a store that is still under way.
//!   The return to the guest synchronises the context.

mod stage2;
mod vttbr;

pub use self::{
    stage2::{Arm64Ipa40, Arm64Ipa48, Stage2},
    vttbr::{VmidBits, vttbr},
};
