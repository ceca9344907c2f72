//! KVM: the kernel walks. One VM, its slots, its vCPU threads.
//!
//! | file | what |
//! |---|---|
//! | `vm` | [`KvmBackend`]: builds the VM, puts the rest behind [`Backend`](super::Backend) |
//! | `slots` | memory slots, dirty log, invalidation |
//! | `vcpu` | vCPU threads: run, pause, exits, pacing |
//! | `kick` | how a thread is got out of the guest: a signal, and the immediate-exit flag |
//! | `host` | opening `/dev/kvm`, probing it, what it gives guests |
//! | `refuse` | errors that several of these give |
//! | `stats` | the binary statistics files |
//! | `state` | the container of saved vCPU state |
//! | `exit` | why a vCPU left the guest, in no architecture's words |
//! | `arch` | all that differs between architectures, behind one set of names |
//! | `console` | what a raw image prints |
//! | `ioctl` | kernel calls that kvm-ioctls lacks |
//!
//! # Locking
//! Three locks, never two of `slots` and `control` at once, never one held while guest code runs
//! except a vCPU's own:
//! * `Slots::table` orders slot changes and harvests. Held over ioctls, some milliseconds for a
//!   large harvest.
//! * `Threads::control` says what the vCPU threads shall do and which of them are parked. Held for
//!   moments.
//! * each vCPU's descriptor is held by its thread from unpark to park; saving and loading take it
//!   while the thread is parked. Its holder may take `control`; nobody waits for a descriptor while
//!   holding `control`.
//!
//! A vCPU thread reads its control page through the published table of
//! [`GuestMemory`](crate::memory::GuestMemory), whose lock is held only to clone an `Arc`, so a
//! harvest never delays a doorbell. Statistics take no lock at all.

mod arch;
mod console;
mod exit;
mod host;
mod ioctl;
mod kick;
mod refuse;
mod slots;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

pub(super) use self::host::host_facts;
pub(crate) use self::{host::probe, vm::KvmBackend};
