//! The TDP MMU: one guest's second-stage page tables.
//!
//! | file | what |
//! |---|---|
//! | `config` | choices for an MMU's life |
//! | `root`, `kept` | a root; a slot as a vCPU remembers it |
//! | `work`, `vcpu` | a batch of changes of a mirror; what a vCPU brings along |
//! | `nx_list` | the tables that the NX-huge-page mitigation keeps |
//! | `mmu` | [`TdpMmu`]: the state of one MMU, how it begins and ends |
//! | `stock` | table memory at hand, for faults and for work ahead of them |
//! | `session`, `sweep` | holding the lock over a range, with yields and owed flushes |
//! | `descent`, `level` | a fault on its way down; at which level it is mapped |
//! | `roots` | roots: made, withdrawn, given back |
//! | `protect` | taking W and D away |
//! | `split`, `recover` | huge leaf → table, and back |
//! | `batch` | having such changes carried out by the mirror's owner |
//! | `mirror_range`, `mirror` | a range of a mirror; its tables, and how it ends |
//! | `zap` | removing leaves, tables, roots |
//! | `nx` | the NX-huge-page mitigation |
//! | `nearby`, `fast` | faults beside the last one; without the lock |
//! | `mirror_fault`, `fault` | faults in mirrors, and all others in full |
//! | `fence` | what a vCPU fences after a fault, where hardware remembers invalid entries |
//! | `prefault` | mapping a range in advance |
//! | `walk`, `leaves`, `age` | lockless walks; listing what is mapped; Accessed bits |
//! | `dirty` | the dirty log |
//! | `slots` | memory slots come, change and go |
//! | `space`, `stage` | the operations as users call them: on one address space, on the MMU |
//! | `list`, `mirrors` | all leaves over a range; the operations on a mirror |
//!
//! A file imports only from files above it.
//!
//! # Locking
//!
//! | operation | MMU lock | yields | flush | roots |
//! |---|---|---|---|---|
//! | fault, pre-fault | shared | no | range if a table becomes a leaf | the vCPU's |
//! | fast fault, walk, listing leaves | none (inside) | – | none | the vCPU's |
//! | unmap, invalidate | exclusive | unless atomic | before yield and at the end | valid, invalid |
//! | write-protect, clear dirty of a slot | shared + slots lock | yes | by the caller | valid |
//! | harvest, clear dirty log | exclusive + slots lock | yes | after the lock, if due | valid |
//! | write-protect a frame | exclusive | no | before the lock goes | valid |
//! | fault in a mirror | shared, but not while the owner is asked | no | none | the vCPU's |
//! | unmap, protect, age a mirror | the same, a batch at a time | – | none (the owner's) | valid |
//! | withdraw mirrors | exclusive | no | none | valid mirrors |
//! | split | shared + slots lock, or exclusive | yes | none | valid |
//! | recover huge pages | shared + slots lock | yes | before yield and at the end | valid |
//! | withdraw roots | exclusive | no | all, before the lock goes | valid, not mirrors |
//! | zap withdrawn roots | shared | yes | none | withdrawn |
//! | age | none (inside) | – | none | valid |
//! | NX recovery | shared | yes | before yield and at the end | valid |
//!
//! The order of locks is in `locks`. Slots are looked up inside, without a lock; changing
//! them takes the slots lock and waits for those who may still see the old ones.
//!
//! # Observers
//!
//! - A vCPU that walks sees each entry before or after a change, and never a table that was given
//!   back.
//! - Once an operation has returned, no walk that begins later uses what it removed, and no TLB
//!   does.
//! - A page's dirty bit is set after its writable entry is installed and before the guest can use
//!   it; a harvest takes bits, then protects, then flushes: no write goes unseen.
//!
//! # Invariants
//!
//! - A leaf maps what the slot over it says; a frame without a slot has no leaf.
//! - While a slot logs writes by protection, each page under a writable leaf has its dirty bit set,
//!   or its fault has not returned yet.
//! - Under the shared lock, a 4 KiB leaf with W and D set is changed by nobody but the holder of
//!   the slots lock, teardown of the table it is in, and ageing (which may be lost). So the holder
//!   of the slots lock may store plainly.
//! - `MmuStats::pages` counts the leaves reachable from roots, valid or not.

mod age;
mod batch;
mod config;
mod descent;
mod dirty;
mod fast;
mod fault;
mod fence;
mod kept;
mod leaves;
mod level;
mod list;
mod mirror;
mod mirror_fault;
mod mirror_range;
mod mirrors;
mod mmu;
mod nearby;
mod nx;
mod nx_list;
mod prefault;
mod protect;
mod recover;
mod root;
mod roots;
mod session;
mod slots;
mod space;
mod split;
mod stage;
mod stock;
mod sweep;
mod vcpu;
mod walk;
mod work;
mod zap;

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests;

pub use self::{
    config::{DirtyLogStart, MmuConfig},
    dirty::DirtyLogError,
    leaves::{LeafBatch, MappedLeaf},
    list::Leaves,
    mirror_range::{Aged, MirrorChange},
    mmu::TdpMmu,
    prefault::PrefaultError,
    root::Root,
    space::AddressSpace,
    stage::SecondStage,
    vcpu::Vcpu,
    walk::{Translation, Walk, WalkFault, WalkStep, Walker, WalkerSlot},
};
