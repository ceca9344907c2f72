//! Model-specific registers: all of the kernel's list that can be read, and what to do when one
//! cannot be set.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};

use super::calls::Calls;
use crate::backend::{
    BackendError,
    kvm::{
        state::bad,
        vcpu_error::{self, load},
    },
};

/// KVM's paravirtual interrupt for asynchronous page faults.
const KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
/// The timer's deadline counts in the time-stamp counter and so is set after it.
const TSC_DEADLINE: u32 = 0x6e0;

/// Hyper-V's order to reset the VM. It reads as 0 always; setting it asks KVM to end the vCPU's run
/// with a reset, and nothing takes that back.
const HV_RESET: u32 = 0x4000_0003;

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

/// Which they are, for messages: a call of many says no more than that.
fn range(batch: &[kvm_msr_entry]) -> String {
    match batch {
        [one] => format!("MSR {:#x}", one.index),
        [first, .., last] => format!("MSRs {:#x} to {:#x}", first.index, last.index),
        [] => "MSRs".to_owned(),
    }
}

/// Reads those of `indices` that can be read.
pub(super) fn read(vcpu: &impl Calls, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, BackendError> {
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
        let done = vcpu_error::read("KVM_GET_MSRS", range(&batch), || vcpu.get_msrs(&mut msrs))?;
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
/// `State`, naming the first MSR that the kernel refuses and whose value here is another, or one
/// that is an order.
pub(super) fn write(vcpu: &impl Calls, values: &[kvm_msr_entry]) -> Result<(), BackendError> {
    let is_order = |msr: &&kvm_msr_entry| msr.index == HV_RESET && msr.data != 0;
    if let Some(order) = values.iter().find(is_order) {
        return Err(bad(format!(
            "MSR {HV_RESET:#x} = {:#x} is an order to reset the VM and no state",
            order.data
        )));
    }
    let (deadline, values): (Vec<_>, Vec<_>) =
        values.iter().partition(|msr| msr.index == TSC_DEADLINE);
    for values in [values, deadline] {
        let mut rest = &values[..];
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let msrs = list(batch)?;
            let done = load("KVM_SET_MSRS", range(batch), || vcpu.set_msrs(&msrs))?;
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
fn refused(vcpu: &impl Calls, msr: kvm_msr_entry) -> Result<(), BackendError> {
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
