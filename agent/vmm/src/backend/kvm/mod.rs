//! KVM: the kernel walks. One VM, its slots, its vCPU threads.
//!
//! | file | what |
//! |---|---|
//! | `vm` | [`KvmBackend`]: builds the VM, puts the rest behind [`Backend`](super::Backend) |
//! | `slots` | memory slots, dirty log, invalidation |
//! | `slot_error` | what the kernel may say to a change of one |
//! | `ring` | dirty rings: what vCPUs wrote, in rings in place of bitmaps |
//! | `engine` | which of the two a VM has |
//! | `vcpu` | vCPU threads: run, pause, exits, pacing |
//! | `vcpu_error` | what the kernel may say to a call about a vCPU's registers |
//! | `run_error` | what it may say to KVM_RUN |
//! | `kick` | how a thread is got out of the guest: a signal, and the immediate-exit flag |
//! | `device` | `/dev/kvm`: opened, made to make VMs, what to do where that fails |
//! | `host` | whether it can run VMs, what it gives guests |
//! | `refuse` | errors that several of these give |
//! | `stats` | the counters: binary statistics files, and what stands in for what they lack |
//! | `tracepoint` | counting by a tracepoint |
//! | `state` | the container of saved vCPU state |
//! | `exit` | why a vCPU left the guest, in no architecture's words |
//! | `arch` | all that differs between architectures, behind one set of names |
//! | `console` | what a raw image prints |
//! | `ioctl` | kernel calls that kvm-ioctls lacks |
//! | `raw` | a VM used by kernel calls alone, which benchmarks compare with |
//!
//! # Locking
//! Five locks, never `control` at once with one of `slots` and `ring`, never one held while guest
//! code runs except a vCPU's own:
//! * `Slots::table` orders slot changes and harvests. Held over ioctls, some milliseconds for a
//!   large harvest.
//! * `Rings::state` is over the readers of dirty rings. Taken after `Slots::table`, and by a vCPU
//!   thread whose ring is full; held over the kernel's freeing of entries.
//! * `Threads::control` says what the vCPU threads shall do and which of them are parked. Held for
//!   moments.
//! * each vCPU's descriptor is held by its thread from unpark to park; saving and loading take it
//!   while the thread is parked. Its holder may take `control`; nobody waits for a descriptor while
//!   holding `control`.
//! * `KvmBackend::told` is what each vCPU was told of its CPU. A leaf, held to copy in or out.
//!
//! A vCPU thread reads its control page through the published table of
//! [`GuestMemory`](crate::memory::GuestMemory), whose lock is held to clone an `Arc`, or by a
//! change of slots to copy a list: a harvest never delays a doorbell. Statistics take no lock.

mod arch;
mod console;
mod device;
mod engine;
mod exit;
mod host;
mod ioctl;
mod kick;
mod raw;
mod refuse;
mod ring;
mod run_error;
mod slot_error;
mod slots;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod tracepoint;
mod vcpu;
mod vcpu_error;
mod vm;

#[cfg(all(feature = "fuzz", target_arch = "x86_64"))]
pub(crate) use self::arch::FUZZED_X86_64_VCPU;
#[cfg(feature = "fuzz")]
pub(crate) use self::arch::{FUZZED_RISCV64_REGISTERS, FUZZED_RISCV64_TOLD};
pub(super) use self::host::host_facts;
#[cfg(test)]
pub(crate) use self::tests::logging_modes;
pub use self::{
    host::count_faults,
    raw::{RawVm, SpareSlot},
    tracepoint::FaultEvents,
};
pub(crate) use self::{
    host::{offers_dirty_rings, probe},
    vm::KvmBackend,
};
