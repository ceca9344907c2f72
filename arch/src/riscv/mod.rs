//! RISC-V G-stage translation: the entries of Sv39x4, Sv48x4 and Sv57x4, `hgatp`, and the operands of the fences.
//!
//! Source: RISC-V privileged specification, chapters "H Extension for Hypervisor Support" ("Two-Stage Address Translation",
//! "Hypervisor Guest Address Translation and Protection Register", "Hypervisor Memory-Management Fence Instructions")
//! and "Supervisor-Level ISA" ("Sv39", "Svnapot", "Svpbmt", "Svinval", "Svadu", "Svvptc").
//!
//! # Fences
//!
//! A hart may keep in its translation caches that an entry was *invalid*, unless it has Svvptc. So an entry that becomes
//! valid owes the hart that faulted on it one `HFENCE.GVMA` for the page
//! ([`INSTALL_NEEDS_FENCE`](slat_mmu::Format::INSTALL_NEEDS_FENCE)); another hart that remembers the invalid entry faults
//! once more, finds the mapping in place, fences and goes on. With Svvptc the fence may be left out: the new entry becomes visible by
//! itself in bounded time. The constant stays true for all harts, because a guest may move to one without the extension.
//!
//! The same holds for an entry that becomes a pointer to a table, and a fence by address drops leaves alone: read strictly, a
//! fault that linked a table owes a fence of the whole VMID. See [`HfenceGvma`].
//!
//! Replacing a table by a huge leaf or the reverse without an invalid entry between is allowed: a hart uses either
//! the old or the new one until the fence. A root is not part of the tag of a cached translation, the VMID is; so when a guest is
//! given a new root under its old VMID, the VMID must be fenced.

mod gstage;
mod hfence;
mod hgatp;

pub use self::{
    gstage::{GStage, Sv39x4, Sv48x4, Sv57x4},
    hfence::HfenceGvma,
    hgatp::{Hgatp, HgatpMode},
};
