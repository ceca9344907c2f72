//! What runs a VM's vCPUs and walks its second stage, behind one trait.
//!
//! `traits` is the contract, `error` what can go wrong, `cpu` what guests are told of their CPU.
//! `kvm` lets the kernel walk, `software` runs the Common MMU. This file knows both backends and
//! chooses.

use std::{path::Path, sync::Arc};

use slat_proto::{
    ApiError,
    model::{BackendKind, VmSpec},
};

mod cpu;
mod error;
mod kvm;
mod software;
mod traits;

pub(crate) use self::{
    cpu::{CpuFact, compare_facts},
    error::BackendError,
    traits::{Backend, EventSink, GuestEvent},
};

/// Backends that work on this host, best first, and why KVM is not among them when it is not.
#[must_use]
pub fn available() -> (Vec<BackendKind>, Option<String>) {
    let why_no_kvm = kvm::probe().err().map(|error| error.to_string());
    let mut kinds = vec![BackendKind::Software];
    if why_no_kvm.is_none() {
        kinds.insert(0, BackendKind::Kvm);
    }
    (kinds, why_no_kvm)
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
/// resolved. What a raw image prints is appended to the file `console`.
///
/// # Errors
/// `Unsupported` when the host lacks it; `Ioctl`.
pub(crate) fn create(
    spec: &VmSpec,
    events: EventSink,
    console: Option<&Path>,
) -> Result<Arc<dyn Backend>, BackendError> {
    match spec.backend.unwrap_or(BackendKind::Software) {
        BackendKind::Software => Ok(Arc::new(software::SoftwareBackend::new(spec, events)?)),
        BackendKind::Kvm => Ok(Arc::new(kvm::KvmBackend::new(spec, events, console)?)),
    }
}
