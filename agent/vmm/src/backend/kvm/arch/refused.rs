//! For architectures whose vCPUs this program cannot run: the façade's types without values.
//!
//! [`HostCpu::new`] refuses, so there is never a [`HostCpu`], and the compiler knows that whatever
//! takes one is never called. No function here pretends to work, and none can fail at run time.

use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

use super::super::{
    super::{BackendError, cpu::CpuFact},
    exit::{Contract, GuestExit},
    refuse::unsupported,
    state::{StateReader, StateWriter},
    stats::Truth,
    tracepoint::Tracepoint,
};
use crate::guest::BootEntry;

/// Nothing is asked of a KVM that is not used.
pub(in crate::backend::kvm) const NEEDED: [(Cap, &str); 0] = [];

/// Nothing is run, so nothing is counted.
pub(in crate::backend::kvm) const COUNTED: Truth = Truth {
    remote_flushes: false,
    ranges: false,
};

/// As little.
pub(in crate::backend::kvm) const FAULTS: Option<Tracepoint> = None;

fn refusal() -> BackendError {
    unsupported(format!(
        "run vCPUs on {}: this build does not support that",
        std::env::consts::ARCH
    ))
}

/// Never.
pub(in crate::backend::kvm) fn supported() -> Result<(), BackendError> {
    Err(refusal())
}

/// There is none.
#[derive(Debug)]
pub(in crate::backend::kvm) enum HostCpu {}

impl HostCpu {
    pub(in crate::backend::kvm) fn new(_: &Kvm, _: &VmFd) -> Result<Self, BackendError> {
        Err(refusal())
    }

    pub(in crate::backend::kvm) fn end_gfn(&self) -> u64 {
        match *self {}
    }
}

/// No vCPU was told anything.
#[derive(Clone, Debug)]
pub(in crate::backend::kvm) enum Told {}

impl Told {
    pub(in crate::backend::kvm) fn facts(&self, host: &HostCpu) -> Vec<CpuFact> {
        match *host {}
    }
}

pub(in crate::backend::kvm) fn prepare_vm(_: &VmFd) -> Result<(), BackendError> {
    Err(refusal())
}

/// Nothing runs.
pub(in crate::backend::kvm) fn before_run() -> Result<(), BackendError> {
    Err(refusal())
}

pub(in crate::backend::kvm) fn prepare_vcpu(
    host: &HostCpu,
    _: &VcpuFd,
    _: u32,
    _: BootEntry,
) -> Result<Told, BackendError> {
    match *host {}
}

/// State of no vCPU.
#[derive(Debug)]
pub(in crate::backend::kvm) enum VcpuState {}

impl VcpuState {
    pub(in crate::backend::kvm) fn save(
        host: &HostCpu,
        _: &VcpuFd,
        _: &Told,
    ) -> Result<Self, BackendError> {
        match *host {}
    }

    pub(in crate::backend::kvm) fn write(&self, _: &mut StateWriter) {
        match *self {}
    }

    pub(in crate::backend::kvm) fn read(
        _: &mut StateReader<'_>,
        host: &HostCpu,
    ) -> Result<Self, BackendError> {
        match *host {}
    }

    pub(in crate::backend::kvm) fn told(&self) -> Told {
        match *self {}
    }

    pub(in crate::backend::kvm) fn load(
        &self,
        host: &HostCpu,
        _: &VcpuFd,
    ) -> Result<(), BackendError> {
        match *host {}
    }
}

/// Enters the guest; every exit is one that all architectures have, or unknown.
pub(in crate::backend::kvm) fn run(
    vcpu: &mut VcpuFd,
    _: Contract,
) -> Result<GuestExit<'_>, kvm_ioctls::Error> {
    vcpu.run().map(|exit: VcpuExit<'_>| GuestExit::common(exit))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slat_proto::{
        ApiError, Reason,
        model::{BackendKind, GuestSpec, MemoryBacking, MemstressSpec, VmSpec},
    };

    use crate::backend::{self, FaultEvents};

    #[test]
    fn a_vm_is_refused_in_words_and_software_is_offered() {
        let (kinds, why) = backend::available();
        assert_eq!(kinds, [BackendKind::Software]);
        assert!(why.unwrap().contains("does not support that"));
        let spec = VmSpec {
            memory_bytes: 8 << 20,
            vcpus: 1,
            backend: Some(BackendKind::Kvm),
            format: None,
            dirty_engine: None,
            backing: MemoryBacking::Auto,
            numa_node: None,
            prefault: false,
            paging: slat_proto::model::Paging::Kernel,
            guest: GuestSpec::Memstress(MemstressSpec::default()),
        };
        let error =
            backend::create(&spec, Arc::new(|_| ()), None, &FaultEvents::default()).unwrap_err();
        assert_eq!(ApiError::from(error).reason, Reason::CapabilityMissing);
    }
}
