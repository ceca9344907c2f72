//! Architectures that this program knows nothing of: no vCPUs, no facts. The software backend runs
//! there.

use kvm_ioctls::{Kvm, VcpuFd};

pub(in crate::backend::kvm) use super::refused::{
    COUNTED, FAULTS, HostCpu, NEEDED, Told, VcpuState, before_run, prepare_vcpu, prepare_vm, run,
    supported,
};
use crate::backend::{BackendError, cpu::CpuFact};

/// Of no state that was ever saved.
pub(in crate::backend::kvm) const ARCH: u32 = 0;
/// Of a pager's mirror, whatever the processor walks.
pub(in crate::backend::kvm) const MIRROR: slat_arch::GuestStage = slat_arch::GuestStage::Ept4;

/// Nothing is known.
pub(in crate::backend::kvm) fn host_facts(_: &Kvm) -> Result<Vec<CpuFact>, BackendError> {
    Ok(Vec::new())
}

/// Not known either.
pub(in crate::backend::kvm) fn program_counter(_: &VcpuFd) -> String {
    "an unknown place".to_owned()
}
