//! One VM's process, `slat vm`: guest memory, vCPUs, ownership, migration, and the services to ask
//! for them.
//!
//! | module | what |
//! |---|---|
//! | [`confine`] | what the process and its threads may do to the host
//! | `memory` | guest memory: backing, views, the slot table, digests, the dirty log |
//! | `guest` | memstress, the guest that checks its own memory, and the raw image |
//! | `backend` | runs vCPUs and walks second-stage tables: KVM, or the Common MMU in software |
//! | `pager` | the process beside it that pages its guest, seen from here |
//! | `machine` | the VM: its life, its slots, its ownership |
//! | `handover` | what both sides of a migration share about giving the VM away |
//! | `migration` | source and destination, and the wire between them |
//! | `service` | VmService, MemoryService, TransferService |
//! | [`process`] | `slat vm` itself |
//!
//! Arrows point up this table: a module knows those above it. Guests stand below backends, because
//! a backend runs them: the software backend's vCPUs execute memstress' steps, and both backends
//! enter where the guest's layout says. The daemon of the host meets a VM process only over its
//! socket and over what both read on disk ([`slat_record`]).

mod backend;
pub mod confine;
mod cpu_time;
mod guest;
pub mod handover;
mod machine;
mod memory;
mod migration;
mod pager;
pub mod process;
mod service;

#[cfg(test)]
mod fake;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;

pub use backend::{
    FaultEvents, RawVm, SpareSlot, available as available_backends, count_faults,
    kvm_offers_dirty_rings,
};
pub use machine::fits_here;
pub use memory::{Filled, fill_fresh, huge_page_pools};
pub use pager::host_paging;

/// The decoders of what comes from outside, for libFuzzer.
#[cfg(feature = "fuzz")]
pub const FUZZ_TARGETS: &[&fuzz::Target] = &[
    &handover::FUZZED_STATE,
    &handover::FUZZED_MONITOR,
    &migration::FUZZED_FRAMES,
    &migration::FUZZED_HARVEST,
    &backend::FUZZED_RISCV64_TOLD,
    &backend::FUZZED_RISCV64_REGISTERS,
    #[cfg(target_arch = "x86_64")]
    &backend::FUZZED_X86_64_VCPU,
    &service::FUZZED_SOCKET,
];
