//! Model-specific registers: all of the kernel's list that can be read, and what to do when one
//! cannot be set.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::backend::{
    BackendError,
    kvm::{refuse::failed, state::bad},
};

/// KVM's paravirtual interrupt for asynchronous page faults.
const KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
/// The timer's deadline counts in the time-stamp counter and so is set after it.
const TSC_DEADLINE: u32 = 0x6e0;

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        reserved: 0,
        data,
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, BackendError> {
    Msrs::from_entries(entries).map_err(|_| bad(format!("{} MSRs are too many", entries.len())))
}

/// Reads those of `indices` that can be read.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, BackendError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch: Vec<_> = rest
            .iter()
            .take(KVM_MAX_MSR_ENTRIES)
            .map(|index| entry(*index, 0))
            .collect();
        let mut msrs = list(&batch)?;
        // The kernel stops at the first it cannot read and says how many it did.
        let done = vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        values.extend_from_slice(&msrs.as_slice()[..done]);
        rest = &rest[done..];
        if done < batch.len() {
            tracing::debug!(
                msr = format_args!("{:#x}", rest[0]),
                "MSR is listed but cannot be read; not saved"
            );
            rest = &rest[1..];
        }
    }
    Ok(values)
}

/// Sets all of `values`.
///
/// # Errors
/// `State`, naming the first MSR that the kernel refuses and whose value here is another.
pub(super) fn write(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), BackendError> {
    let (deadline, values): (Vec<_>, Vec<_>) =
        values.iter().partition(|msr| msr.index == TSC_DEADLINE);
    for values in [values, deadline] {
        let mut rest = &values[..];
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let done = vcpu
                .set_msrs(&list(batch)?)
                .map_err(failed("KVM_SET_MSRS"))?;
            rest = &rest[done..];
            if done < batch.len() {
                refused(vcpu, rest[0])?;
                rest = &rest[1..];
            }
        }
    }
    Ok(())
}

/// Decides about an MSR that the kernel refused to set.
fn refused(vcpu: &VcpuFd, msr: kvm_msr_entry) -> Result<(), BackendError> {
    if msr.index == KVM_ASYNC_PF_INT && msr.data == 0 {
        tracing::debug!(
            "KVM_ASYNC_PF_INT (MSR 0x4b564d06) cannot be set to 0 here; 0 is what a new vCPU has"
        );
        return Ok(());
    }
    let now = read(vcpu, &[msr.index])?.first().map(|now| now.data);
    if now == Some(msr.data) {
        tracing::debug!(
            msr = format_args!("{:#x}", msr.index),
            "MSR cannot be set but has the saved value already"
        );
        return Ok(());
    }
    Err(bad(format!(
        "the kernel refuses MSR {:#x} = {:#x}{}",
        msr.index,
        msr.data,
        now.map_or_else(String::new, |now| format!(" (here it is {now:#x})"))
    )))
}
