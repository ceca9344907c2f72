//! Second-stage page-table formats for the Common MMU.
//!
//! Each format is a zero-sized type that implements [`Format`](slat_mmu::Format): [`Ept4`] for Intel, [`Sv39x4`],
//! [`Sv48x4`] and [`Sv57x4`] for RISC-V. All are compiled on every host; [`GuestStage`] picks one at run time. A new
//! architecture is a new file here and a new variant of `GuestStage`, and nothing else.
//!
//! # Example
//!
//! Build a table for a guest with 64 MiB of memory and walk it as the hardware would:
//!
//! ```
//! use slat_arch::GuestStage;
//! use slat_mmu::{Access, Arena, Entry, Fault, FaultOutcome, Flush, Gfn, Level, MmuConfig, Pfn, SlotFlags, SlotSpec};
//!
//! let stage: GuestStage = "sv39x4".parse()?;
//! let mmu = stage.build(Arena::new(Pfn(0x80000), 64), MmuConfig::default());
//!
//! // 64 MiB from guest physical address 0 on, backed by host frames from 0x100000 on.
//! mmu.create_slot(SlotSpec::from_bytes(0, 0, 64 << 20, 0x100000 << 12)?)?;
//!
//! // Nothing is mapped until the guest faults; then the largest page that fits is.
//! let gfn = Gfn::from_gpa(0x1234_5678 & (64 << 20) - 1);
//! assert!(mmu.translate(gfn).is_none());
//! let outcome = mmu.fault(Fault::new(gfn, Access::Write));
//! assert_eq!(outcome, FaultOutcome::Fixed { level: Level::SIZE_2M, flush: Flush::None });
//! assert_eq!(mmu.translate(gfn).unwrap().pfn, Pfn(0x100000 + gfn.0));
//!
//! // The walk itself: a root entry that points to a table, and in it the leaf.
//! let walk = mmu.walk(gfn);
//! let levels: Vec<u8> = walk.steps().map(|step| step.level.get()).collect();
//! assert_eq!(levels, [3, 2]);
//! assert!(matches!(walk.last().unwrap().entry, Entry::Leaf(leaf) if leaf.writable));
//!
//! // Dirty logging takes the W bit away; the change is complete when the flush it asks for is done.
//! let flush = mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY)?;
//! assert!(flush.covers(gfn));
//! assert!(!mmu.translate(gfn).unwrap().writable);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod arm64;
mod bits;
pub mod riscv;
mod stage;
pub mod x86;

pub use self::{
    arm64::{Arm64Ipa40, Arm64Ipa48},
    riscv::{Sv39x4, Sv48x4, Sv57x4},
    stage::{GuestStage, UnknownStage},
    x86::{Ept4, Ept4NoAd, Ept5, Ept5NoAd, Npt4, Npt5},
};
