//! State of one vCPU: read from the kernel, written down, read back, set.
//!
//! # Sections, in this order
//! | tag | what |
//! |---|---|
//! | `TOLD` | what the vCPU was told of its CPU |
//! | `REGS` | its registers, with its timer among them |
//! | `MPST` | multiprocessing state, 4 bytes: it runs, or the guest stopped it |
//!
//! # Order of loading
//! That of the sections. Facts are compared and everything is decoded before the first register is
//! set. Time belongs to all vCPUs of a VM: each one's load sets it, to a moment that is not before
//! the one that a former vCPU was read at, so no guest sees it go back.

use kvm_ioctls::VcpuFd;

use super::{host::HostCpu, registers::Registers, told::Told, transfer};
use crate::backend::{
    BackendError,
    cpu::compare_facts,
    kvm::state::{StateReader, StateWriter, bad},
};

/// State of one vCPU.
#[derive(Clone, Debug)]
pub(in crate::backend::kvm) struct VcpuState {
    told: Told,
    registers: Registers,
    mp_state: u32,
}

impl VcpuState {
    /// Reads a vCPU that does not run, has no call to complete and was `told` that.
    pub(in crate::backend::kvm) fn save(
        _: &HostCpu,
        vcpu: &VcpuFd,
        told: &Told,
    ) -> Result<Self, BackendError> {
        Ok(Self {
            told: told.clone(),
            registers: transfer::save(vcpu, told)?,
            mp_state: transfer::save_mp_state(vcpu)?,
        })
    }

    /// Writes it down.
    pub(in crate::backend::kvm) fn write(&self, to: &mut StateWriter) {
        to.section(*b"TOLD", &self.told.encode());
        to.section(*b"REGS", &self.registers.encode());
        to.section(*b"MPST", &self.mp_state.to_le_bytes());
    }

    /// Reads it back and checks it against this host.
    ///
    /// # Errors
    /// `State` when it is malformed or needs what this host lacks.
    pub(in crate::backend::kvm) fn read(
        from: &mut StateReader<'_>,
        host: &HostCpu,
    ) -> Result<Self, BackendError> {
        let told = Told::decode(from.section(*b"TOLD")?)?;
        let registers = Registers::decode(from.section(*b"REGS")?)?;
        let mp_state = from.section(*b"MPST")?;
        let mp_state = mp_state
            .try_into()
            .map(u32::from_le_bytes)
            .map_err(|_| bad(format!("MP state of {} bytes", mp_state.len())))?;
        if let Some(difference) = compare_facts(told.all(), host.facts()).first() {
            return Err(bad(format!("CPU: {difference}")));
        }
        Ok(Self {
            told,
            registers,
            mp_state,
        })
    }

    /// What the vCPU is told.
    pub(in crate::backend::kvm) fn told(&self) -> Told {
        self.told.clone()
    }

    /// Sets a vCPU that never ran.
    ///
    /// # Errors
    /// `VcpuCall` naming what the kernel refuses.
    pub(in crate::backend::kvm) fn load(
        &self,
        _: &HostCpu,
        vcpu: &VcpuFd,
    ) -> Result<(), BackendError> {
        transfer::load(vcpu, &self.registers)?;
        transfer::load_mp_state(vcpu, self.mp_state)
    }
}
