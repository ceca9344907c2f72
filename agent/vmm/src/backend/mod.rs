//! What runs a VM's vCPUs and walks its second stage, behind one trait.
//!
//! `traits` is the contract, `error` what can go wrong, `run_failure` why vCPUs stopped for good,
//! `cpu` what guests are told of their CPU. `kvm` lets the kernel walk, `software` runs the Common
//! MMU. This file knows both backends and chooses.

use std::{path::Path, sync::Arc};

use slat_proto::{
    ApiError,
    model::{BackendKind, VmSpec},
};

mod cpu;
mod error;
mod kvm;
mod run_failure;
mod software;
mod traits;
mod unavailable;

#[cfg(all(feature = "fuzz", target_arch = "x86_64"))]
pub(crate) use self::kvm::FUZZED_X86_64_VCPU;
#[cfg(test)]
pub(crate) use self::kvm::logging_modes;
#[cfg(feature = "fuzz")]
pub(crate) use self::kvm::{FUZZED_RISCV64_REGISTERS, FUZZED_RISCV64_TOLD};
pub use self::kvm::{FaultEvents, RawVm, SpareSlot, count_faults};
use self::unavailable::KvmUnavailable;
pub(crate) use self::{
    cpu::{CpuFact, compare_facts},
    error::BackendError,
    run_failure::RunFailure,
    traits::{Backend, EngineInUse, EventSink, GuestEvent, PagedGuest},
};

/// Backends that work on this host, best first, and why KVM is not among them when it is not.
#[must_use]
pub fn available() -> (Vec<BackendKind>, Option<String>) {
    let why_no_kvm = kvm::probe().err().map(|error| match &error {
        BackendError::NoKvm(why) => format!("{error}; {}", why.advice()),
        _ => error.to_string(),
    });
    let mut kinds = vec![BackendKind::Software];
    if why_no_kvm.is_none() {
        kinds.insert(0, BackendKind::Kvm);
    }
    (kinds, why_no_kvm)
}

/// Whether VMs of that backend can have dirty rings here. The first call asks the kernel.
#[must_use]
pub(crate) fn offers_dirty_rings(kind: BackendKind) -> bool {
    match kind {
        BackendKind::Software => false,
        BackendKind::Kvm => kvm::offers_dirty_rings(),
    }
}

/// Whether VMs on KVM can have dirty rings on this host. The first call asks the kernel.
#[must_use]
pub fn kvm_offers_dirty_rings() -> bool {
    offers_dirty_rings(BackendKind::Kvm)
}

/// What VMs of that backend can rely on here, for [`compare_facts`]. The first call asks the
/// kernel, some milliseconds.
///
/// # Errors
/// KVM_IOCTL when KVM cannot be asked.
pub(crate) fn host_facts(kind: BackendKind) -> Result<Vec<CpuFact>, ApiError> {
    match kind {
        BackendKind::Software => Ok(Vec::new()),
        BackendKind::Kvm => Ok(kvm::host_facts()?),
    }
}

/// Builds a stopped backend for `spec` without slots. `spec.backend` and `spec.format` are already
/// resolved. What a raw image prints is appended to the file `console`. Page faults that KVM's
/// statistics lack are counted by `faults`.
///
/// # Errors
/// `Unsupported` when the host lacks it; `Ioctl`.
pub(crate) fn create(
    spec: &VmSpec,
    events: EventSink,
    console: Option<&Path>,
    faults: &FaultEvents,
) -> Result<Arc<dyn Backend>, BackendError> {
    match spec.backend.unwrap_or(BackendKind::Software) {
        BackendKind::Software => Ok(Arc::new(software::SoftwareBackend::new(spec, events)?)),
        BackendKind::Kvm => Ok(Arc::new(
            kvm::KvmBackend::new(spec, events, console)?.with_fault_events(faults),
        )),
    }
}
