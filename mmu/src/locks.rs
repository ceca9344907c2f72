//! Every lock of this crate, in the order in which they are taken.
//!
//! Whoever holds a lock takes only locks further down this list. This is the one place that says
//! so; the modules refer to it.
//!
//! 1. *Slots lock* (`rcu::buffer::Buffers`): changes of slots, taking dirty bits, splitting ahead,
//!    zapping roots. Held for a whole operation.
//! 2. *MMU lock* (`rcu::lock::MmuLock`): shared for faults and for long operations that cope with
//!    them; exclusive, one at a time by its `turn`, for unmapping, harvesting and withdrawing
//!    roots. Held until the operation is done, or yields.
//! 3. *List of roots* (`tdp::mmu::TdpMmu::roots`): which roots exist. Held for a look or a change.
//! 4. *A root's count* (`tdp::root::RootPage::counted_in`): where its leaves are counted. Held for
//!    a look or a change.
//! 5. *List of counts* (`tdp::mmu::TdpMmu::separate_counts`): counts of leaves that are not in
//!    cells. Held for a look or a change.
//! 6. *Limbo* (`table::tables::Tables::limbo`): tables that wait for readers. Held for a batch of
//!    tables.
//! 7. *List of cells* (`rcu::participants::Participants::cells`): who may be inside. Held for a
//!    look at all cells.
//!
//! While one of these is held, nothing else of this crate is taken, so they have no order among
//! themselves:
//!
//! - *Reserve* (`tdp::mmu::TdpMmu::reserve`): tables that work ahead of faults leaves for them.
//! - *Free list* (`tdp::vcpu::FreeList`): what dropped vCPUs left behind.
//! - *Noted tables* (`tdp::nx_list::NxTables`): tables of the NX-huge-page mitigation.
//! - *Permissions* (`slot::huge::HugePermission`): where huge mappings of a slot are forbidden.
//!
//! Last comes the host's own: a [`TableMemory`](crate::TableMemory) may have a lock for its free
//! frames (the [`Arena`](crate::Arena) does), which is taken with limbo held.
//!
//! # What is done with which lock held
//!
//! - [`Host::flush`](crate::Host::flush) is called with at most 1 and 2 held, never with one
//!   further down; so are those functions of [`ExternalTables`](crate::ExternalTables) that are
//!   about tables. A vCPU acknowledges a flush, and walks, with neither of the two.
//! - [`ExternalTables::apply`](crate::ExternalTables::apply) is called with at most 1 held, where a
//!   slot is going, and never inside. Entries stay frozen meanwhile. Whoever waits for such an
//!   entry holds at most 1 as well, is not inside, and has none frozen itself (`tdp::batch`).
//! - A grace period is waited for with 1 held. So nobody who is inside takes the slots lock.
//! - Memory for tables is allocated with no lock held, or with the slots lock alone.
//! - Being inside (an RCU read section) is no lock: nobody waits to get in. It does not nest, which
//!   debug builds assert.
//!
//! # How long
//!
//! No lock is held for a number of steps that nobody bounds. Sweeps under the MMU lock offer it to
//! others after each run of entries (`tdp::sweep`), unless the caller asked for one that does not
//! yield. Under the slots lock a step is a slot, a table or a word of a slot's bitmap, never a
//! frame of a range that a caller names. Limbo is offered to others between batches, and ageing
//! leaves its read section after a bounded number of tables.
