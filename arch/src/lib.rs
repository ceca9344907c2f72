//! Second-stage page-table formats for the Common MMU.
//!
//! A *format* is a zero-sized type that implements [`Format`](slat_mmu::Format): what one
//! page-table entry looks like, and the few facts about the processor that the MMU must know.
//! Everything else — walking, faults, splitting, dirty logging, flushes — is `slat-mmu`'s and the
//! same for all. Every format is compiled on every host; nothing here executes an instruction of
//! the architecture it describes.
//!
//! # Formats
//!
//! | name | type | address | index bits | largest leaf | A and D | MMIO | X only |
//! |---|---|---|---|---|---|---|---|
//! | `ept4` | [`Ept4`] | 48 bit | 9 9 9 9 | 1 GiB | hardware | 19 | yes |
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
//! *Index bits* are the root's first. *MMIO* is the bits of the slots' generation in an entry that
//! remembers a device. *X only* says whether a leaf may allow instruction fetches and nothing else.
//!
//! | architecture | entry becomes valid | replaced in one store | flush | root |
//! |---|---|---|---|---|
//! | [`x86`], Intel | no fence | yes | `INVEPT` | EPTP |
//! | [`x86`], AMD | no fence | yes | `TLB_CONTROL` | `N_CR3` |
//! | [`riscv`] | a fence on the hart that faulted | yes | `HFENCE.GVMA` | `hgatp` |
//! | [`arm64`] | no invalidation | no: break before make | `TLBI IPAS2E1IS` | `VTTBR_EL2` |
//!
//! On RISC-V, memory types other than normal are an extension: an MMU that is not told of it
//! refuses such slots (see [`riscv`]).
//!
//! The dirty log of `ept4` and `ept5` is the processor's PML, without which it loses writes; all
//! others log by write protection (see [`x86`]).
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
//!     Access, Arena, Entry, Fault, FaultOutcome, Gfn, Level, MmuConfig, NoTlb, Pfn, SlotFlags,
//!     SlotSpec,
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
//! let walk = mmu.space(0).walk(gfn);
//! let levels: Vec<u8> = walk.steps().map(|step| step.level.get()).collect();
//! assert_eq!(levels, [3, 2]);
//! assert!(matches!(walk.last().unwrap().entry, Entry::Leaf(leaf) if leaf.writable));
//!
//! // Dirty logging: the huge page becomes small ones without W, and the next write is noted.
//! mmu.space(0).set_slot_flags(0, SlotFlags::LOG_DIRTY)?;
//! assert!(!mmu.space(0).translate(gfn).unwrap().writable);
//! let write = Fault::new(gfn, Access::Write).with_present();
//! assert_eq!(mmu.fault(&mut vcpu, write), FaultOutcome::Fixed { level: Level::SIZE_4K });
//! let mut bitmap = vec![0; (64 << 20) / 4096 / 64];
//! assert_eq!(mmu.space(0).harvest_dirty_log(0, &mut bitmap)?, 1);
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
//! // The same bits one level up are a 2 MiB leaf, because the frame is aligned to 2 MiB; without U
//! // they are nothing.
//! assert!(Sv39x4::is_leaf(raw, Level::SIZE_2M));
//! assert_eq!(Sv39x4::decode(raw & !0x10, Level::SIZE_4K), Entry::Malformed);
//! ```
//!
//! # How to add an architecture
//!
//! A format is a table of constants: where the bits are (`layout.rs` says which). The code that
//! makes, reads and changes entries follows from it (`encoded.rs`) and is the same for all. The
//! worked example is arm64, the third port, in `arm64/stage2.rs`.
//!
//! 1. *Read the manual for the traps*, before any bit. May an invalid entry be cached
//!    ([`INSTALL_NEEDS_FENCE`](slat_mmu::Format::INSTALL_NEEDS_FENCE))? May a present entry change
//!    its size or address in one store
//!    ([`BREAK_BEFORE_MAKE`](slat_mmu::Format::BREAK_BEFORE_MAKE))? Who sets Accessed and Dirty
//!    ([`AdPolicy`](slat_mmu::AdPolicy))? Is the root wider than the other tables
//!    ([`INDEX_BITS`](slat_mmu::Format::INDEX_BITS))? Is a memory type an extension
//!    ([`OPTIONAL_MEMORY_TYPES`](slat_mmu::Format::OPTIONAL_MEMORY_TYPES))? For arm64: no, no, the
//!    MMU does, yes, and no.
//! 2. *Find two free bits* for software in a leaf, MMU-writable and host-writable, and a third
//!    where hardware keeps no Dirty. (arm64: bits 55 to 57.)
//! 3. *Fill in a `Layout`*: the frame's field, the fixed bits of a pointer and of a leaf, what
//!    tells a leaf from everything else, a bit for each property, the memory types. What overlaps,
//!    or could make a leaf of a pointer, does not compile. Whatever the manual reserves is
//!    malformed without a line of its own, because `decode` accepts only what encoding gives back.
//! 4. *Write the register of the root* as a pure function. (`arm64/vttbr.rs`)
//! 5. *Check bits against constants* computed by hand from the manual, with its section named, and
//!    what the manual reserves; then add one line to the list in `tests/format_laws.rs`, which
//!    tests every law.
//! 6. *Name it*: one line in `stage.rs` gives it a variant of [`GuestStage`], a name and an MMU. A
//!    hardware walker written from the manual in `mmu/tests/common` puts it under the model test.
//!
//! The MMU's code does not change: `git grep -i arm64 -- mmu/src` finds a word on barriers in the
//! documentation of vCPUs and of flushes, and nothing else. Neither does what uses formats by
//! [`GuestStage`]: the agent sees `dyn SecondStage` and finds the format by its name. What *lists*
//! formats has one more: the API (`proto`: the message's enumeration and its typed twin) and the
//! option of `slat create vm` (`cli`). Where an emulator walks the format, it is worth an entry in
//! `tests/src/oracle`, for a second opinion.
//!
//! What an entry needs that no other format has, such as arm64's contiguous hint, goes into
//! `Layout` as a constant with a default; MMIO entries are two functions of it, which x86 has.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod arm64;
mod check;
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
