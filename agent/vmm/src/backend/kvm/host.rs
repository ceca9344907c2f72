//! `/dev/kvm`: whether it can run VMs here, and what it gives them.

use std::sync::OnceLock;

use kvm_ioctls::{Cap, Kvm, VmFd};

use super::{
    super::{BackendError, cpu::CpuFact},
    arch,
    device::{DEVICE, create_vm, open},
    refuse::unsupported,
    ring,
    tracepoint::FaultEvents,
};

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

/// Opens `/dev/kvm` and makes an empty VM that has all a VM needs, where this build can run one.
///
/// What is offered is asked of the VM: a kind of VM may lack what the device has.
pub(super) fn new_vm() -> Result<(Kvm, VmFd), BackendError> {
    arch::supported()?;
    let kvm = open(DEVICE)?;
    let vm = create_vm(&kvm)?;
    for (cap, name) in NEEDED.into_iter().chain(arch::NEEDED) {
        if !vm.check_extension(cap) {
            return Err(unsupported(format!("run VMs without {name}")));
        }
    }
    Ok((kvm, vm))
}

/// Most vCPUs of a VM.
pub(super) fn most_vcpus(vm: &VmFd) -> u32 {
    // Where the most is not told, what is recommended is the most.
    let told = [Cap::MaxVcpus, Cap::NrVcpus].map(|cap| vm.check_extension_int(cap));
    let most = told.into_iter().find(|most| *most > 0).unwrap_or(1);
    most.unsigned_abs()
}

/// Whether KVM can run VMs here. Makes a VM and drops it.
///
/// # Errors
/// Why not: this build cannot run vCPUs of this architecture, or `/dev/kvm` cannot be opened, lacks
/// a capability, or makes no VM.
pub(crate) fn probe() -> Result<(), BackendError> {
    new_vm().map(drop)
}

/// Whether VMs can have dirty rings here. Asked once a process, of a VM; false where there can be
/// none.
#[must_use]
pub(crate) fn offers_dirty_rings() -> bool {
    static OFFERED: OnceLock<bool> = OnceLock::new();
    *OFFERED.get_or_init(|| new_vm().is_ok_and(|(_, vm)| ring::is_offered(&vm)))
}

/// Counts the page faults of this process's guests from now on, where the kernel's statistics have
/// none. Call it before there is a second thread, and before the process is confined.
#[must_use]
pub fn count_faults() -> FaultEvents {
    FaultEvents::by(arch::FAULTS)
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
    let facts = arch::host_facts(&open(DEVICE)?)?;
    Ok(FACTS.get_or_init(|| facts).clone())
}
