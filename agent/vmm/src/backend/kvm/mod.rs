//! KVM: the kernel walks. One VM, its slots, its vCPU threads.
//!
//! | file | what |
//! |---|---|
//! | `vm` | [`KvmBackend`]: builds the VM, puts the rest behind [`Backend`](super::Backend) |
//! | `slots` | memory slots, dirty log, invalidation |
//! | `vcpu` | vCPU threads: run, pause, exits, pacing |
//! | `kick` | how a thread is got out of the guest: a signal, and the immediate-exit flag |
//! | `stats` | the binary statistics files |
//! | `state` | the container of saved vCPU state |
//! | `x86_64` | all that is x86-64: CPUID, first registers, saving and loading a vCPU |
//! | `console` | what a raw image prints |
//! | `ioctl` | kernel calls that kvm-ioctls lacks |
//!
//! # Locking
//! Three locks, never two of `slots` and `control` at once, never one held while guest code runs except a vCPU's own:
//! * `Slots::table` orders slot changes and harvests. Held over ioctls, some milliseconds for a large harvest.
//! * `Threads::control` says what the vCPU threads shall do and which of them are parked. Held for moments.
//! * each vCPU's descriptor is held by its thread from unpark to park; saving and loading take it while the thread is
//!   parked. Its holder may take `control`; nobody waits for a descriptor while holding `control`.
//!
//! A vCPU thread reads its control page through the published table of [`GuestMemory`](crate::memory::GuestMemory), whose
//! lock is held only to clone an `Arc`, so a harvest never delays a doorbell. Statistics take no lock at all.

mod console;
mod ioctl;
mod kick;
mod slots;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;
mod x86_64;

use kvm_ioctls::{Cap, Kvm};
use slat_proto::model::BackendKind;

pub(crate) use self::vm::KvmBackend;
use super::BackendError;

/// Of `KVM_GET_API_VERSION` since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What a VM cannot do without, with the names an operator finds in the kernel's documentation.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (
        Cap::DestroyMemoryRegionWorks,
        "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
    ),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
];

fn failed(op: &'static str) -> impl Fn(kvm_ioctls::Error) -> BackendError {
    move |error| BackendError::Ioctl {
        op,
        source: error.into(),
    }
}

fn unsupported(what: impl Into<String>) -> BackendError {
    BackendError::Unsupported {
        backend: BackendKind::Kvm,
        what: what.into(),
    }
}

/// Opens `/dev/kvm` and checks that it has all a VM needs.
fn open() -> Result<Kvm, BackendError> {
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(unsupported(format!(
            "speak API version {version} of /dev/kvm, only {API_VERSION}"
        )));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(unsupported(format!("run VMs without {name}")));
        }
    }
    Ok(kvm)
}

/// Whether KVM can run VMs here. Makes a VM and drops it.
///
/// # Errors
/// Why not: `/dev/kvm` cannot be opened, lacks a capability, or makes no VM.
pub(crate) fn probe() -> Result<(), BackendError> {
    let vm = open()?.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    drop(vm);
    Ok(())
}
