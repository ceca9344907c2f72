//! One VM's process, `slat vm`: guest memory, vCPUs, ownership, migration, and the services to ask
//! for them.
//!
//! | module | what |
//! |---|---|
//! | `memory` | guest memory: backing, views, the slot table, digests, the dirty log |
//! | `guest` | memstress, the guest that checks its own memory, and the raw image |
//! | `backend` | runs vCPUs and walks second-stage tables: KVM, or the Common MMU in software |
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
mod guest;
pub mod handover;
mod machine;
mod memory;
mod migration;
pub mod process;
mod service;

#[cfg(test)]
mod fake;

pub use backend::available as available_backends;
