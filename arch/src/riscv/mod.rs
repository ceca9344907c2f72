//! RISC-V G-stage translation: the entries of Sv39x4, Sv48x4 and Sv57x4, `hgatp`, and the operands
//! of the fences.
//!
//! Source: RISC-V privileged specification, chapters "H Extension for Hypervisor Support"
//! ("Two-Stage Address Translation", "Hypervisor Guest Address Translation and Protection
//! Register", "Hypervisor Memory-Management Fence Instructions") and "Supervisor-Level ISA"
//! ("Sv39", "Svnapot", "Svpbmt", "Svinval", "Svadu", "Svvptc").
//!
//! # Fences
//!
//! A hart may keep in its translation caches that an entry was *invalid*, unless it has Svvptc. So
//! an entry that becomes valid owes the hart that faulted on it an `HFENCE.GVMA`
//! ([`INSTALL_NEEDS_FENCE`](slat_mmu::Format::INSTALL_NEEDS_FENCE)), and
//! [`install_fence`](slat_mmu::SecondStage::install_fence) says of what:
//!
//! | answer | meaning | fence, on this hart alone |
//! |---|---|---|
//! | nothing | nothing became valid | – |
//! | a range | an entry became a leaf | [`HfenceGvma::for_range`] |
//! | all | an entry became a pointer to a table, by whichever hart | [`HfenceGvma::guest`] |
//!
//! A fence by address orders accesses to leaves alone, so it need not make a hart forget that an
//! entry was invalid which points to a table now. Another hart that remembers an invalid entry
//! faults once more, finds the mapping in place, fences and goes on. With Svvptc all these fences
//! may be left out: the new entry becomes visible by itself in bounded time. The constant stays
//! true for all harts, because a guest may move to one without the extension.
//!
//! *Stores before fences.* The fence orders stores of its own hart, and those of others that this
//! hart has seen, before later walks of its own: after a fault no other barrier is owed. A flush of
//! other harts begins with `FENCE rw, rw`, so that the entries are visible where the interrupt
//! arrives; each then executes its own `HFENCE.GVMA`.
//!
//! Replacing a table by a huge leaf or the reverse without an invalid entry between is allowed: a
//! hart uses either the old or the new one until the fence. A root is not part of the tag of a
//! cached translation, the VMID is; so when a guest is given a new root under its old VMID, the
//! VMID must be fenced.
//!
//! # Memory types
//!
//! PBMT, in bits 62:61 of an entry, is Svpbmt's. On a hart without it, or with `menvcfg.PBMTE`
//! clear, the two bits are reserved, and each access to a page whose entry has one set faults for
//! ever. So the MMU is told: [`MmuConfig::memory_types`](slat_mmu::MmuConfig::memory_types) says
//! that every hart which the guest may ever run on has Svpbmt, enabled. The rule:
//!
//! - with it, a slot of any memory type is accepted, and its leaves carry PBMT;
//! - without it, which is the default, a slot whose memory is not
//!   [`Normal`](slat_mmu::MemoryType::Normal) is refused with
//!   [`SlotError::MemoryType`](slat_mmu::SlotError::MemoryType). Nothing is mapped as normal
//!   silently. Where the owner wants that, it says `Normal`: PBMT is then 0, and the platform's
//!   physical memory attributes decide, which already know device memory as such. Only ordinary RAM
//!   that is to be uncached for the guest cannot be had.
//!
//! [`GStage`] itself encodes and decodes PBMT always: tables of another's making may hold it.

mod gstage;
mod hfence;
mod hgatp;

pub use self::{
    gstage::{GStage, Sv39x4, Sv48x4, Sv57x4},
    hfence::HfenceGvma,
    hgatp::{Hgatp, HgatpMode},
};
