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
mod ioctl;
mod kick;
mod slots;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use kvm_ioctls::{Cap, Kvm};
use slat_proto::model::BackendKind;

pub(crate) use self::vm::KvmBackend;
use super::{BackendError, cpu::CpuFact};

/// Of `KVM_GET_API_VERSION` since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What a VM of any architecture cannot do without, with the names an operator finds in the
/// kernel's documentation.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (
        Cap::DestroyMemoryRegionWorks,
        "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
    ),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
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

/// Opens `/dev/kvm`.
fn open() -> Result<Kvm, BackendError> {
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(unsupported(format!(
            "speak API version {version} of /dev/kvm, only {API_VERSION}"
        )));
    }
    Ok(kvm)
}

/// Opens `/dev/kvm` and checks that it has all a VM needs, and that this build can run one.
fn open_to_run() -> Result<Kvm, BackendError> {
    arch::supported()?;
    let kvm = open()?;
    for (cap, name) in NEEDED.into_iter().chain(arch::NEEDED) {
        if !kvm.check_extension(cap) {
            return Err(unsupported(format!("run VMs without {name}")));
        }
    }
    Ok(kvm)
}

/// Whether KVM can run VMs here. Makes a VM and drops it.
///
/// # Errors
/// Why not: this build cannot run vCPUs of this architecture, or `/dev/kvm` cannot be opened, lacks
/// a capability, or makes no VM.
pub(crate) fn probe() -> Result<(), BackendError> {
    let vm = open_to_run()?
        .create_vm()
        .map_err(failed("KVM_CREATE_VM"))?;
    drop(vm);
    Ok(())
}

/// What KVM gives guests here. Makes a VM with one vCPU and drops both.
///
/// # Errors
/// When `/dev/kvm` cannot be opened or makes no vCPU.
pub(super) fn host_facts() -> Result<Vec<CpuFact>, BackendError> {
    arch::host_facts(&open()?)
}
