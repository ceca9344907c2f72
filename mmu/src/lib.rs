//! The Common MMU: second-stage page tables that know no architecture.
//!
//! [`TdpMmu`] owns one guest's memory slots and page tables: it maps on fault, logs writes, unmaps,
//! splits and recovers huge mappings, and has TLBs flushed. Faults run in parallel and walks
//! without a lock. What an entry looks like is a [`Format`], which the `slat-arch` crate implements
//! for each architecture; where tables live is a [`TableMemory`]; who flushes is a [`Host`].
//! [`SecondStage`] is the same MMU without its type parameters, for a backend that learns the
//! format at run time.
//!
//! The terms are KVM's; the algorithms follow Linux's TDP MMU in idea
//! (Documentation/virt/kvm/mmu.rst, locking.rst), made common as the series "KVM: Refactor the
//! KVM/x86 TDP MMU into common code" set out to do.
//!
//! # Embedding it
//!
//! 1. *Memory for tables*: implement [`TableMemory`] over frames that the hardware walker reads,
//!    with a [`Header`] beside each; or take an [`Arena`].
//! 2. *TLBs*: implement [`Host::flush`]. When it returns, no vCPU uses what it was asked to flush.
//!    It is called with the MMU lock held, so a vCPU must be able to obey while it waits for that
//!    lock: a vCPU is *outside* the guest whenever it calls into the MMU for anything but
//!    [`access`](SecondStage::access) and [`translate`](AddressSpace::translate).
//! 3. *Slots*: [`create_slot`](SecondStage::create_slot) for each piece of guest memory. Nothing is
//!    mapped yet. *Huge pages* need guest and host frame congruent modulo the page's size: place
//!    memory so that [`SlotSpec::alignment_level`] says what you want. *Memory types* other than
//!    normal may need an extension of the processor, of which the MMU must be told
//!    ([`MmuConfig::memory_types`]).
//! 4. *vCPUs*: one [`Vcpu`] each. Before entering the guest, [`load_root`](SecondStage::load_root)
//!    says what to load. On a fault, [`fault`](SecondStage::fault); its outcome says whether to
//!    enter again or to leave to the device model. Before it enters again the vCPU flushes, on its
//!    own processor: a translation of the frame that allowed less, where the fault does not drop it
//!    by itself (x86's does); and what [`install_fence`](SecondStage::install_fence) says, because
//!    hardware may remember that nothing was mapped (RISC-V). On arm64 it waits until its stores
//!    have reached the table walker (`DSB ISHST`).
//! 5. *The dirty log*: where the format logs by [Dirty bits](DirtyLogPolicy::DirtyBit) (EPT with
//!    Accessed and Dirty), the processor must log too: page-modification logging on for every vCPU
//!    while a slot logs, and each vCPU's log drained into [`mark_dirty`](AddressSpace::mark_dirty)
//!    before each harvest, the last one included. A write that is not reported is lost. Without
//!    PML, or with it off, take a format that logs by write protection (`ept4-noad`, `ept5-noad`).
//! 6. *The host takes memory back*: [`invalidate_begin`](AddressSpace::invalidate_begin), take it,
//!    [`invalidate_end`](SecondStage::invalidate_end) at the same MMU; a token that is dropped ends
//!    nothing. A fault that looked its memory up outside the MMU passes the [sequence](Fault::seq)
//!    that it saw first.
//!
//! 7. *Mirrors*: where someone else keeps the tables that the guest runs on (a kernel whose
//!    mappings a process steers, firmware), a fault [with_mirror](Fault::with_mirror) has its
//!    mapping made there: by an [`ExternalTables`], in batches, with no lock held. The MMU keeps a
//!    mirror that says what is mapped. [`fault_range`](SecondStage::fault_range) maps neighbours as
//!    well; unmapping, protecting and ageing a range, listing, and forgetting a view that was
//!    replaced are operations of [`AddressSpace`].
//!
//! To see what is mapped, [`leaves`](AddressSpace::leaves) lists it;
//! [`walk`](AddressSpace::walk) shows the way to one frame.
//!
//! ```
//! use slat_mmu::{
//!     Access, Arena, Fault, FaultOutcome, Format, Gfn, MmuConfig, NoTlb, Pfn, SecondStage,
//!     SlotSpec, TdpMmu, Walk,
//! };
//!
//! /// Maps the frame that a guest with 64 MiB touches first, and walks to it.
//! fn first_touch<F: Format>(tables: Arena) -> Option<Walk> {
//!     let mmu = TdpMmu::<F, _>::new(tables, NoTlb, MmuConfig::default());
//!     mmu.create_slot(SlotSpec::new(0, Gfn(0), 64 << 8, Pfn(0x10_0000))).ok()?;
//!     let mut vcpu = mmu.vcpu();
//!     match mmu.fault(&mut vcpu, Fault::new(Gfn(5), Access::Write)) {
//!         FaultOutcome::Fixed { .. } => Some(mmu.space(0).walk(Gfn(5))),
//!         _ => None,
//!     }
//! }
//! ```
//!
//! `slat-arch` has the same with a format, and `examples/bare` is a whole stand-in hypervisor
//! without an operating system.
//!
//! # How much table memory
//!
//! - Mapped by 4 KiB pages, guest memory needs a table for each 2 MiB, and one for each 512 of
//!   those on every level above: 0.2 % of the guest's size. A slot that is not aligned to what a
//!   table spans needs one more a level. Mapped by huge pages it needs almost nothing.
//! - A slot that logs writes is mapped by 4 KiB pages. Switching logging on splits what is huge
//!   ([`eager_split`](MmuConfig::eager_split)), so the memory for the whole slot should be there.
//!   [`set_slot_flags`](AddressSpace::set_slot_flags) and
//!   [`split_huge_pages`](AddressSpace::split_huge_pages) return how many huge mappings they left
//!   whole because it was not. Their first writes split them, one table each, from what is left.
//! - Splitting ahead leaves [`fault_reserve`](MmuConfig::fault_reserve) tables for faults, of this
//!   slot and of others. They last until they are used: a fault in a new place takes up to one for
//!   each level below the root, and one for each 2 MiB after that. So set it to what all slots may
//!   need to map while one of them logs, or to 8 for each vCPU where memory is enough for
//!   everything.
//! - Each vCPU keeps up to 8 tables for its next faults. There is a root for each address space, of
//!   [`root_size`](FormatInfo::root_size) bytes: a frame, or more where it is wider than other
//!   tables (four on RISC-V). Tables that were removed are given back when the last reader has
//!   left.
//!
//! # The lock protocol
//!
//! - *Inside.* Whoever looks at tables or slots announces itself in a cell of its own, which nobody
//!   else writes: an RCU read section. Tables that are unlinked meanwhile are given back when
//!   everyone who was inside has left.
//! - *The MMU lock.* Faults hold it shared, also by the mark in their own cell, so faults on two
//!   processors share no cache line that is written. Unmapping and harvesting hold it exclusive,
//!   and yield to whoever waits. Splitting, protecting a slot, recovering huge pages and zapping
//!   roots hold it shared.
//! - *Entries* change by compare-exchange. One value, *frozen*, marks an entry that has an owner:
//!   others leave it alone and retry. A table is filled before the entry that links it; a removed
//!   table is flushed before its memory can be used again.
//! - *The slots lock* serialises changes of slots and everything that takes dirty bits, with the
//!   flush that makes it complete. Slots are kept in two copies: faults read one while the other is
//!   changed.
//! - *Order*: the module `locks` lists every lock in its order. Flushes are carried out with the
//!   slots lock and the MMU lock held, and a vCPU obeys them with none.
//!
//! The modules say the rest, each at its head: `rcu` (who is inside, grace periods, the lock),
//! `table` (entries and tickets), `slot`, `tdp` (the operations, with a table of which lock, which
//! yields, which flush each has).
//!
//! # Rules
//!
//! - An operation that has returned is complete, flushes included.
//! - Nothing panics on what a guest or a caller passes in.
//! - `no_std` with `alloc`. Feature `std` lets waiters yield their time slice; `loom` and `shuttle`
//!   are for this crate's tests.
//! - Drop every [`Vcpu`] before the MMU: what a vCPU holds beyond that is not given back to the
//!   [`TableMemory`].
//!
//! # Layers
//!
//! From the bottom. A module imports only from those above it in this list; `cargo xtask structure`
//! checks it, and the same for the files of each folder.
//!
//! - `locks`: a page without code: every lock, in its order
//! - `addr`: frame numbers and levels
//! - `sync`: atomics, locks and waiting, so that model checkers can replace them
//! - `refused`: why the owner of mirrored tables refused a change
//! - `fault`: a fault and its outcome
//! - `flush`: what is flushed, why, and when it is owed
//! - `format`: the border to an architecture: raw entry ⇄ neutral [`Entry`]
//! - `invalidate`: the sequence by which a fault notices that memory was taken back
//! - `rcu`: participants, grace periods, the MMU lock, double buffers
//! - `slot`: memory slots, their dirty bitmaps, where huge pages are forbidden
//! - `external`: the owner of the tables that mirrors stand for, and changes in batches
//! - `stats`: counters
//! - `table`: table memory: headers, tickets, nodes, reclamation
//! - `host`: the border to whoever runs the MMU
//! - `tdp`: the operations: fault, dirty log, zap, split, recover, age, walk, roots, mirrors
//!
//! # Adding an architecture
//!
//! Implement [`Format`]; nothing here changes. `slat-arch`'s front page goes through it step by
//! step.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "std", feature = "loom", feature = "shuttle"))]
extern crate std;

mod addr;
mod external;
mod fault;
mod flush;
mod format;
mod host;
mod invalidate;
mod locks;
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
mod refused;
mod slot;
mod stats;
mod sync;
#[expect(
    unsafe_code,
    reason = "table memory is raw memory; only zapping a root, which knows when a tree is nobody else's, joins in"
)]
mod table;
mod tdp;

pub use self::{
    addr::{Gfn, GfnRange, Level, MAX_LEVELS, PAGE_SHIFT, PAGE_SIZE, Pfn},
    external::{Batch, Change, ChangeKind, ExternalTables},
    fault::{Access, Around, Fault, FaultOutcome, RangeOutcome},
    flush::{Flush, FlushCause, FlushRequest},
    format::{
        AdPolicy, DirtyLogPolicy, Entry, FlushPrimitive, Format, FormatInfo, Leaf, MemoryType,
    },
    host::{Host, NoTlb},
    invalidate::{ForeignInvalidation, Invalidation},
    refused::Refused,
    slot::{DEFAULT_MAX_SLOTS, MAX_SLOT_PAGES, SlotError, SlotFlags, SlotId, SlotSpec},
    stats::{FlushStats, MmuStats, OwnerStats, RefusalStats},
    table::{
        arena::Arena,
        header::{Header, PageHeader, PageRole},
        memory::{EntryCell, TableMemory},
    },
    tdp::{
        AddressSpace, Aged, DirtyLogError, DirtyLogStart, LeafBatch, Leaves, MappedLeaf,
        MirrorChange, MmuConfig, PrefaultError, Root, SecondStage, TdpMmu, Translation, Vcpu, Walk,
        WalkFault, WalkStep, Walker, WalkerSlot,
    },
};
