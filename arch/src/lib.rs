//! Second-stage page-table formats for the Common MMU.
//!
//! A *format* is a zero-sized type that implements [`Format`](slat_mmu::Format): what one page-table entry looks like, and the few
//! facts about the processor that the MMU must know. Everything else — walking, faults, splitting, dirty logging,
//! flushes — is `slat-mmu`'s and the same for all. Every format is compiled on every host; nothing here executes an
//! instruction of the architecture it describes.
//!
//! # Formats
//!
//! | name | type | guest address | index bits, root first | largest leaf | Accessed, Dirty | MMIO entries | execute-only |
//! |---|---|---|---|---|---|---|---|
//! | `ept4` | [`Ept4`] | 48 bit | 9 9 9 9 | 1 GiB | hardware | 19 generation bits | yes |
//! | `ept5` | [`Ept5`] | 57 bit | 9 9 9 9 9 | 1 GiB | hardware | 19 | yes |
//! | `ept4-noad` | [`Ept4NoAd`] | 48 bit | 9 9 9 9 | 1 GiB | access tracking | 19 | yes |
//! | `ept5-noad` | [`Ept5NoAd`] | 57 bit | 9 9 9 9 9 | 1 GiB | access tracking | 19 | yes |
//! | `npt4` | [`Npt4`] | 48 bit | 9 9 9 9 | 1 GiB | hardware | 19 | no |
//! | `npt5` | [`Npt5`] | 57 bit | 9 9 9 9 9 | 1 GiB | hardware | 19 | no |
//! | `sv39x4` | [`Sv39x4`] | 41 bit | 11 9 9 | 1 GiB | set at install | none | yes |
//! | `sv48x4` | [`Sv48x4`] | 50 bit | 11 9 9 9 | 512 GiB | set at install | none | yes |
//! | `sv57x4` | [`Sv57x4`] | 59 bit | 11 9 9 9 9 | 256 TiB | set at install | none | yes |
//! | `arm64-ipa40` | [`Arm64Ipa40`] | 40 bit | 10 9 9 | 1 GiB | set at install | none | yes |
//! | `arm64-ipa48` | [`Arm64Ipa48`] | 48 bit | 9 9 9 9 | 1 GiB | set at install | none | yes |
//!
//! | architecture | entry that becomes valid | present entry replaced in one store | flush | register of the root |
//! |---|---|---|---|---|
//! | [`x86`], Intel | no fence | yes | `INVEPT` | EPTP |
//! | [`x86`], AMD | no fence | yes | `TLB_CONTROL` | `N_CR3` |
//! | [`riscv`] | a fence on the hart that faulted | yes | `HFENCE.GVMA` | `hgatp` |
//! | [`arm64`] | no invalidation | no: break before make | `TLBI IPAS2E1IS` | `VTTBR_EL2` |
//!
//! The dirty log of `ept4` and `ept5` is the processor's PML, without which it loses writes; all others log by write protection
//! (see [`x86`]).
//!
//! [`GuestStage`] picks a format at run time and builds an MMU of it.
//!
//! # Example
//!
//! Build a table for a guest with 64 MiB of memory and walk it as the hardware would:
//!
//! ```
//! use slat_arch::GuestStage;
//! use slat_mmu::{
//!     Access, Arena, Entry, Fault, FaultOutcome, Gfn, Level, MmuConfig, NoTlb, Pfn, SlotFlags, SlotSpec,
//! };
//!
//! let stage: GuestStage = "sv39x4".parse()?;
//! // Tables in 64 frames from 0x80000 on; there are no TLBs to flush; the usual choices.
//! let mmu = stage.build(Arena::new(Pfn(0x80000), 64), NoTlb, MmuConfig::default());
//!
//! // 64 MiB from guest physical address 0 on, backed by host frames from 0x100000 on.
//! mmu.create_slot(SlotSpec::from_bytes(0, 0, 64 << 20, 0x100000 << 12)?)?;
//!
//! // Nothing is mapped until the guest faults; then the largest page that fits is.
//! let mut vcpu = mmu.vcpu();
//! let gfn = Gfn::from_gpa(0x1234_5678 & (64 << 20) - 1);
//! assert!(mmu.access(&mut vcpu, gfn, Access::Write).is_err());
//! let outcome = mmu.fault(&mut vcpu, Fault::new(gfn, Access::Write));
//! assert_eq!(outcome, FaultOutcome::Fixed { level: Level::SIZE_2M });
//! assert_eq!(mmu.access(&mut vcpu, gfn, Access::Write)?.pfn, Pfn(0x100000 + gfn.0));
//!
//! // The walk itself: a root entry that points to a table, and in it the leaf.
//! let walk = mmu.walk(gfn);
//! let levels: Vec<u8> = walk.steps().map(|step| step.level.get()).collect();
//! assert_eq!(levels, [3, 2]);
//! assert!(matches!(walk.last().unwrap().entry, Entry::Leaf(leaf) if leaf.writable));
//!
//! // Dirty logging: the huge page becomes small ones without W, and the next write is noted.
//! mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY)?;
//! assert!(!mmu.translate(gfn).unwrap().writable);
//! let write = Fault::new(gfn, Access::Write).with_present();
//! assert_eq!(mmu.fault(&mut vcpu, write), FaultOutcome::Fixed { level: Level::SIZE_4K });
//! let mut bitmap = vec![0; (64 << 20) / 4096 / 64];
//! assert_eq!(mmu.harvest_dirty_log(0, &mut bitmap)?, 1);
//! assert_eq!(bitmap[(gfn.0 / 64) as usize], 1 << (gfn.0 % 64));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The entry itself
//!
//! A format can be used without the MMU, for example to read tables that something else has built:
//!
//! ```
//! use slat_arch::Sv39x4;
//! use slat_mmu::{Entry, Format, Leaf, Level, MemoryType, Pfn};
//!
//! // V, R, W, X, U, A and D, and frame 0x80000.
//! let raw = 0x80000 << 10 | 0xdf;
//! let Entry::Leaf(leaf) = Sv39x4::decode(raw, Level::SIZE_4K) else { unreachable!() };
//! assert_eq!((leaf.pfn, leaf.writable, leaf.memory), (Pfn(0x80000), true, MemoryType::Normal));
//! assert_eq!(Sv39x4::make_leaf(&Leaf { writable: false, ..leaf }, Level::SIZE_4K), raw & !4);
//! // The same bits one level up are a 2 MiB leaf, because the frame is aligned to 2 MiB; without U they are nothing.
//! assert!(Sv39x4::is_leaf(raw, Level::SIZE_2M));
//! assert_eq!(Sv39x4::decode(raw & !0x10, Level::SIZE_4K), Entry::Malformed);
//! ```
//!
//! # How to add an architecture
//!
//! The worked example is arm64, the third port; [`arm64`] and its commits show each step.
//!
//! 1. *Read the manual for the traps*, before any bit: may an invalid entry be cached
//!    ([`INSTALL_NEEDS_FENCE`](slat_mmu::Format::INSTALL_NEEDS_FENCE))? May a present entry change its size or address in one store
//!    ([`BREAK_BEFORE_MAKE`](slat_mmu::Format::BREAK_BEFORE_MAKE))? Who sets Accessed and Dirty
//!    ([`AdPolicy`](slat_mmu::AdPolicy))? Is the root wider than the other tables
//!    ([`INDEX_BITS`](slat_mmu::Format::INDEX_BITS))? For arm64: no, no, the MMU does, and yes.
//! 2. *Find room for two software bits* in a leaf, MMU-writable and host-writable, and a third where hardware keeps no
//!    Dirty. Choose `FROZEN` among the values that are not present. (arm64: bits 55 to 57; 0x1a0.)
//! 3. *Write the table of bits* into the head of a new file, then `make_leaf` and `make_table` from it. `decode` tells
//!    absent from present, asks `as_table`, fills a `Leaf` from the bits, and accepts it only if `make_leaf` gives the same value
//!    back: whatever the manual reserves is malformed without a line of its own. (`arm64/stage2.rs`)
//! 4. *Write the shortcuts* as a mask and a comparison each. Walks and sweeps call nothing else.
//! 5. *Write the register of the root* as a pure function. (`arm64/vttbr.rs`)
//! 6. *Check bits against constants* computed by hand from the manual, with its section named, and what the manual reserves;
//!    then add one line to the list in `tests/format_laws.rs`, which tests every law.
//! 7. *Name it*: one line in `stage.rs` gives it a variant of [`GuestStage`], a name and an MMU; a hardware walker written from
//!    the manual in `tests/common` puts it under the model test.
//!
//! The MMU does not change: `git grep -il arm64 -- mmu` finds nothing. Neither does what uses formats by [`GuestStage`]: the agent sees
//! `dyn SecondStage` and finds the format by its name. What *lists* formats has one more: the API (`proto`: the message's
//! enumeration and its typed twin) and the option of `slat create vm` (`cli`). And where an emulator walks the format, it is worth an
//! entry in `tests/src/oracle`, for a second opinion.
//!
//! arm64 took about 400 lines (`wc -l arch/src/arm64/*.rs`), of which half are code and the rest comments and tests, for two
//! formats and a register; and a line or two in each of `lib.rs`, `stage.rs` and the list of the laws.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod arm64;
mod encoded;
mod layout;
pub mod riscv;
mod stage;
pub mod x86;

pub use self::{
    arm64::{Arm64Ipa40, Arm64Ipa48},
    encoded::Encoded,
    riscv::{Sv39x4, Sv48x4, Sv57x4},
    stage::{GuestStage, UnknownStage},
    x86::{Ept4, Ept4NoAd, Ept5, Ept5NoAd, Npt4, Npt5},
};
