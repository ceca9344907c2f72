//! The Common MMU: a second-stage page table that knows no architecture.
//!
//! [`TdpMmu`] owns one guest's memory slots and page tables: it maps on fault, logs writes, unmaps, splits huge
//! mappings, and says which TLB flushes each change owes. What an entry looks like is a [`Format`], which the `slat-arch`
//! crate implements for x86 and RISC-V; where tables live is a [`TableMemory`]. [`SecondStage`] is the same MMU without
//! its type parameters, for a backend that learns the format at run time.
//!
//! # Map
//!
//! | module | holds |
//! |---|---|
//! | `format` | the border to an architecture: raw entry ⇄ neutral [`Entry`] |
//! | `slot` | memory slots and their dirty bitmaps |
//! | `table` | table memory, and the only unsafe code: nodes, readers, reclamation |
//! | `tdp` | the operations: fault, dirty log, zap, split, age, walk, roots |
//! | `flush` | flush requests as values |
//! | `invalidate` | the sequence by which a fault notices that memory was taken back |
//!
//! # Rules
//!
//! - An operation is complete when its [`Flush`] has been carried out, not before.
//! - Nothing panics on what a guest or a caller passes in.
//! - `no_std` with `alloc`; no operating system below.
//!
//! The terms are KVM's; the algorithms follow Linux's TDP MMU in idea (Documentation/virt/kvm/mmu.rst, locking.rst).

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod addr;
mod fault;
mod flush;
mod format;
mod invalidate;
mod slot;
mod stats;
#[expect(
    unsafe_code,
    reason = "table memory is raw memory; nothing outside this module touches it"
)]
mod table;
mod tdp;

pub use self::{
    addr::{Gfn, GfnRange, Level, MAX_LEVELS, PAGE_SHIFT, PAGE_SIZE, Pfn},
    fault::{Access, Fault, FaultOutcome},
    flush::Flush,
    format::{
        AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, FormatInfo, Leaf, MemoryType,
    },
    invalidate::Invalidation,
    slot::{DEFAULT_MAX_SLOTS, MAX_SLOT_PAGES, SlotError, SlotFlags, SlotId, SlotSpec},
    stats::MmuStats,
    table::{arena::Arena, memory::TableMemory, readers::ReadGuard},
    tdp::{
        DirtyLogError, DirtyLogStart, MmuConfig, PageHeader, PageRole, Root, SecondStage, TdpMmu,
        Translation, Walk, WalkFault, WalkStep,
    },
};
