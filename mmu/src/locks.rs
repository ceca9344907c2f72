//! Every lock of this crate, in the order in which they are taken.
//!
//! Whoever holds a lock takes only locks further down this list. This is the one place that says
//! so; the modules refer to it.
//!
//! | | lock | where | guards | held |
//! |---|---|---|---|---|
//! | 1 | *slots lock* | `rcu::buffer::Buffers` | changes of slots, taking dirty bits, splitting ahead, zapping roots | for a whole operation |
//! | 2 | *MMU lock* | `rcu::lock::MmuLock` | shared: faults, long operations that cope with them; exclusive (one at a time by its `turn`): unmapping, harvesting, withdrawing | until done, or a yield |
//! | 3 | list of roots | `tdp::mmu::TdpMmu::roots` | which roots exist | for a look or a change |
//! | 4 | a root's count | `tdp::root::RootPage::counted_in` | where its leaves are counted | for a look or a change |
//! | 5 | list of counts | `tdp::mmu::TdpMmu::separate_counts` | counts of leaves that are not in cells | for a look or a change |
//! | 6 | *limbo* | `table::tables::Tables::limbo` | tables that wait for readers | for a batch of tables |
//! | 7 | list of cells | `rcu::participants::Participants::cells` | who may be inside | for a look at all cells |
//!
//! Nothing of this crate is taken while one of these is held, so they have no order among
//! themselves:
//!
//! | lock | where | guards |
//! |---|---|---|
//! | reserve | `tdp::mmu::TdpMmu::reserve` | tables that work ahead of faults leaves for them |
//! | free list | `tdp::vcpu::FreeList` | what dropped vCPUs left behind |
//! | noted tables | `tdp::nx_list::NxTables` | tables of the NX-huge-page mitigation |
//! | permissions | `slot::huge::HugePermission` | where huge mappings of a slot are forbidden |
//!
//! Last comes the host's own: a [`TableMemory`](crate::TableMemory) may have a lock for its free
//! frames (the [`Arena`](crate::Arena) does), which is taken with limbo held.
//!
//! # What is done with which lock held
//!
//! - [`Host::flush`](crate::Host::flush) and [`ExternalTables`](crate::ExternalTables) are called
//!   with 1 and 2 held, never with one further down. A vCPU acknowledges a flush, and walks, with
//!   neither of the two.
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
//! frame of a range that a caller names. Limbo is let go of between batches, and ageing leaves its
//! read section after a bounded number of tables.
