//! RISC-V: what a host's KVM gives guests. vCPUs cannot be run yet.

mod regs;

use kvm_ioctls::{Kvm, VcpuFd};

pub(in crate::backend::kvm) use super::refused::{
    HostCpu, NEEDED, Told, VcpuState, prepare_vcpu, prepare_vm, run, supported,
};
use crate::backend::{BackendError, cpu::CpuFact, kvm::refuse::failed};

const SATP_SV39: u64 = 8 << 60;
const SATP_ASID: u64 = 0xffff << 44;
const SENVCFG_PMM_SHIFT: u32 = 32;

/// In saved state.
pub(in crate::backend::kvm) const ARCH: u32 = 2;

/// What this host's KVM gives the vCPUs it makes.
///
/// Two facts have no register that tells them, and a guest finds them out all the same: the width
/// of address-space identifiers and the lengths of masked pointers. For these a vCPU without any
/// memory enters the guest: its first fetch leaves it at once, and on the way the registers went
/// through the hardware, which keeps the bits that it has. A fault of the second stage is never the
/// guest's to handle, so no such entry can last.
///
/// # Errors
/// `Ioctl` when no vCPU can be made to ask.
pub(in crate::backend::kvm) fn host_facts(kvm: &Kvm) -> Result<Vec<CpuFact>, BackendError> {
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let extensions: Vec<&str> = regs::EXTENSIONS
        .iter()
        .enumerate()
        .filter(|(id, _)| read(&vcpu, regs::extension(*id)) == Some(1))
        .map(|(_, name)| *name)
        .collect();
    let mut facts = vec![CpuFact::new("riscv.isa", isa(&extensions))];
    if let Some(mode) = read(&vcpu, regs::SATP_MODE) {
        facts.push(CpuFact::new("riscv.satp_modes", satp_modes(mode)));
    }
    for (name, id) in [
        ("riscv.timebase_hz", regs::TIMER_FREQUENCY),
        ("riscv.zicbom_bytes", regs::ZICBOM_BYTES),
        ("riscv.zicboz_bytes", regs::ZICBOZ_BYTES),
    ] {
        facts.extend(read(&vcpu, id).map(|value| CpuFact::new(name, value)));
    }
    if let Some(satp) = through_hardware(&mut vcpu, regs::SATP, SATP_SV39 | SATP_ASID) {
        let bits = (satp & SATP_ASID).count_ones();
        facts.push(CpuFact::new("riscv.asid_bits", bits));
    }
    if let Some(lengths) = masked_pointers(&mut vcpu) {
        facts.push(CpuFact::new("riscv.senvcfg_pmm", lengths));
    }
    Ok(facts)
}

/// A register's value; `None` when this kernel or this CPU does not have it.
fn read(vcpu: &VcpuFd, id: u64) -> Option<u64> {
    let mut value = [0; 8];
    vcpu.get_one_reg(id, &mut value).ok()?;
    Some(u64::from_ne_bytes(value))
}

/// What the hardware makes of `value`. The register is 0 again afterwards.
fn through_hardware(vcpu: &mut VcpuFd, id: u64, value: u64) -> Option<u64> {
    vcpu.set_one_reg(id, &value.to_ne_bytes()).ok()?;
    let left = vcpu
        .run()
        .is_err_and(|error| error.errno() == libc::EOPNOTSUPP);
    let kept = read(vcpu, id);
    vcpu.set_one_reg(id, &0u64.to_ne_bytes()).ok()?;
    kept.filter(|_| left)
}

/// Lengths of masked pointers that a guest can choose.
fn masked_pointers(vcpu: &mut VcpuFd) -> Option<String> {
    let mut lengths = Vec::new();
    for (pmm, length) in [
        (2 << SENVCFG_PMM_SHIFT, "7"),
        (3 << SENVCFG_PMM_SHIFT, "16"),
    ] {
        if through_hardware(vcpu, regs::SENVCFG, pmm)? & (3 << SENVCFG_PMM_SHIFT) == pmm {
            lengths.push(length);
        }
    }
    if lengths.is_empty() {
        lengths.push("none");
    }
    Some(lengths.join(" "))
}

/// As in a device tree: single letters in their order, then the longer names.
fn isa(extensions: &[&str]) -> String {
    const ORDER: &str = "imafdqcbvh";
    let mut letters: Vec<&str> = extensions
        .iter()
        .copied()
        .filter(|e| e.len() == 1)
        .collect();
    letters.sort_by_key(|letter| ORDER.find(letter).unwrap_or(ORDER.len()));
    let mut names: Vec<&str> = extensions.iter().copied().filter(|e| e.len() > 1).collect();
    names.sort_unstable();
    names.insert(0, "");
    format!("rv64{}{}", letters.concat(), names.join("_"))
}

/// The widest mode and all that are narrower: what a CPU has is always a run from Sv39.
fn satp_modes(widest: u64) -> &'static str {
    match widest {
        0 => "bare",
        8 => "sv39",
        9 => "sv39 sv48",
        10 => "sv39 sv48 sv57",
        _ => "unknown",
    }
}

/// Program counter, for messages.
pub(in crate::backend::kvm) fn program_counter(vcpu: &VcpuFd) -> String {
    read(vcpu, regs::PC).map_or_else(|| "pc unknown".to_owned(), |pc| format!("pc {pc:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_isa_reads_as_in_a_device_tree() {
        assert_eq!(isa(&["zbb", "c", "zba", "h", "i", "m"]), "rv64imch_zba_zbb");
        assert_eq!(isa(&["i"]), "rv64i");
    }
}
