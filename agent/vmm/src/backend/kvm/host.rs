//! `/dev/kvm`: whether it can run VMs here, and what it gives them.

use std::sync::OnceLock;

use kvm_ioctls::{Cap, Kvm};

use super::{
    super::{BackendError, cpu::CpuFact},
    arch,
    refuse::{failed, unsupported},
};

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
pub(super) fn open_to_run() -> Result<Kvm, BackendError> {
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

/// What KVM gives guests here. Asked once a process, with a VM of one vCPU: the answer does not
/// change, and some kernels log that they were asked.
///
/// # Errors
/// When `/dev/kvm` cannot be opened or makes no vCPU.
pub(in crate::backend) fn host_facts() -> Result<Vec<CpuFact>, BackendError> {
    static FACTS: OnceLock<Vec<CpuFact>> = OnceLock::new();
    if let Some(facts) = FACTS.get() {
        return Ok(facts.clone());
    }
    let facts = arch::host_facts(&open()?)?;
    Ok(FACTS.get_or_init(|| facts).clone())
}
