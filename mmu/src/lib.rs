//! The Common MMU: second-stage page tables that know no architecture.
//!
//! [`TdpMmu`] owns one guest's memory slots and page tables: it maps on fault, logs writes, unmaps, splits and recovers huge
//! mappings, and has TLBs flushed. Faults run in parallel and walks without a lock. What an entry looks like is a [`Format`],
//! which the `slat-arch` crate implements; where tables live is a [`TableMemory`]; who flushes is a [`Host`].
//! [`SecondStage`] is the same MMU without its type parameters, for a backend that learns the format at run time.
//!
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "std", feature = "loom", feature = "shuttle"))]
extern crate std;

mod addr;
mod fault;
mod flush;
mod format;
mod host;
mod invalidate;
#[cfg(all(test, feature = "loom"))]
#[expect(
    unsafe_code,
    reason = "values whose unordered use a model is to notice"
)]
mod models;
#[expect(
    unsafe_code,
    reason = "a value that readers use without a lock while its other copy is changed"
)]
mod rcu;
mod slot;
mod stats;
mod sync;
#[expect(
    unsafe_code,
    reason = "table memory is raw memory; nothing outside this module touches it"
)]
mod table;
mod tdp;

pub use self::{
    addr::{Gfn, GfnRange, Level, MAX_LEVELS, PAGE_SHIFT, PAGE_SIZE, Pfn},
    fault::{Access, Fault, FaultOutcome},
    flush::{Flush, FlushCause, FlushRequest},
    format::{
        AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, FormatInfo, Leaf, MemoryType,
    },
    host::{ExternalTables, Host, NoTlb, Refused},
    invalidate::Invalidation,
    slot::{DEFAULT_MAX_SLOTS, MAX_SLOT_PAGES, SlotError, SlotFlags, SlotId, SlotSpec},
    stats::{FlushStats, MmuStats},
    table::{
        arena::Arena,
        header::{Header, PageHeader, PageRole},
        memory::{EntryCell, TableMemory},
    },
    tdp::{
        DirtyLogError, DirtyLogStart, MmuConfig, PrefaultError, Root, SecondStage, TdpMmu,
        Translation, Vcpu, Walk, WalkFault, WalkStep, Walker, WalkerSeat,
    },
};
