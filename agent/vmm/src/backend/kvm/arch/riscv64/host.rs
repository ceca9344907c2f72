//! What a host's KVM gives guests.

use std::{borrow::Cow, sync::OnceLock};

use kvm_bindings::KVM_CAP_VM_GPA_BITS;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{
    kernel::word,
    names::isa_string,
    probe::Probe,
    register::{Kind, Register},
    told::Told,
    transfer,
};
use crate::backend::{
    BackendError,
    cpu::{CpuFact, riscv64},
    kvm::{stats::Truth, tracepoint::Tracepoint},
};

/// In saved state.
pub(in crate::backend::kvm) const ARCH: u32 = 2;
/// Of a pager's mirror, whatever the processor walks.
pub(in crate::backend::kvm) const MIRROR: slat_arch::GuestStage = slat_arch::GuestStage::Sv48x4;
/// Beside what every architecture needs.
pub(in crate::backend::kvm) const NEEDED: [(Cap, &str); 1] = [(Cap::OneReg, "KVM_CAP_ONE_REG")];
/// `remote_tlb_flush` stays 0 however many flushes are carried out. Requests are counted, and since
/// Linux 6.17 those for a range are not.
pub(in crate::backend::kvm) const COUNTED: Truth = Truth {
    remote_flushes: false,
    ranges: false,
};

/// Statistics have no page faults. Each exit passes this tracepoint (Linux 6.11), and causes 20, 21
/// and 23 are the guest-page faults of a fetch, a load and a store.
pub(in crate::backend::kvm) const FAULTS: Option<Tracepoint> = Some(Tracepoint {
    system: "kvm",
    name: "kvm_exit",
    filter: "scause == 20 || scause == 21 || scause == 23",
});

/// The narrowest second stage, Sv39x4, and the widest, Sv57x4.
const GPA_BITS: std::ops::RangeInclusive<i32> = 41..=59;
const SATP_SV39: u64 = 8 << 60;
const SATP_ASID: u64 = 0xffff << 44;
const SENVCFG_PMM: u64 = 3 << 32;
/// Lengths of masked pointers, by the field's value.
const PMM_LENGTHS: [(u64, &str); 2] = [(2 << 32, "7"), (3 << 32, "16")];

/// It can, wherever `/dev/kvm` opens.
pub(in crate::backend::kvm) fn supported() -> Result<(), BackendError> {
    Ok(())
}

/// What the host offers to every VM.
#[derive(Debug)]
pub(in crate::backend::kvm) struct HostCpu {
    gpa_bits: u32,
    facts: Vec<CpuFact>,
}

impl HostCpu {
    pub(in crate::backend::kvm) fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, BackendError> {
        let bits = vm.check_extension_raw(KVM_CAP_VM_GPA_BITS.into());
        Ok(Self {
            gpa_bits: bits
                .clamp(*GPA_BITS.start(), *GPA_BITS.end())
                .unsigned_abs(),
            facts: host_facts(kvm)?,
        })
    }

    /// First guest frame that the second stage cannot address.
    pub(in crate::backend::kvm) fn end_gfn(&self) -> u64 {
        1 << (self.gpa_bits - 12)
    }

    pub(super) fn facts(&self) -> &[CpuFact] {
        &self.facts
    }

    /// What a vCPU is told that has all its extensions now.
    pub(super) fn tell(&self, vcpu: &VcpuFd) -> Result<Told, BackendError> {
        let isa = extensions(vcpu, Kind::Isa, false)?;
        let sbi = extensions(vcpu, Kind::Sbi, false)?;
        Ok(Told::new(&self.facts, isa_string(&isa), sbi.join(" ")))
    }
}

impl Told {
    /// All of it, for the handover's preamble.
    pub(in crate::backend::kvm) fn facts(&self, _: &HostCpu) -> Vec<CpuFact> {
        self.all().to_vec()
    }
}

/// What a new VM needs before it has slots: nothing.
pub(in crate::backend::kvm) fn prepare_vm(_: &VmFd) -> Result<(), BackendError> {
    Ok(())
}

/// What this host's KVM gives the vCPUs it makes. Asked once a process: the answer does not change.
///
/// # Errors
/// `Ioctl` when no vCPU can be made to ask.
pub(in crate::backend::kvm) fn host_facts(kvm: &Kvm) -> Result<Vec<CpuFact>, BackendError> {
    static FACTS: OnceLock<Vec<CpuFact>> = OnceLock::new();
    if let Some(facts) = FACTS.get() {
        return Ok(facts.clone());
    }
    let facts = ask(kvm)?;
    Ok(FACTS.get_or_init(|| facts).clone())
}

/// Two facts have no register that tells them, and a guest finds them out all the same: the width
/// of address-space identifiers and the lengths of masked pointers. For these the hardware is
/// asked.
fn ask(kvm: &Kvm) -> Result<Vec<CpuFact>, BackendError> {
    let mut probe = Probe::new(kvm)?;
    let vcpu = probe.vcpu();
    let isa = extensions(vcpu, Kind::Isa, false)?;
    // All that could be switched on.
    let sbi = extensions(vcpu, Kind::Sbi, true)?;
    let mut facts = vec![
        CpuFact::new(riscv64::ISA, isa_string(&isa)),
        CpuFact::new(riscv64::SBI, sbi.join(" ")),
    ];
    if let Some(mode) = word(vcpu, Register::SATP_MODE) {
        facts.push(CpuFact::new("riscv.satp_modes", satp_modes(mode)));
    }
    for (name, register, unit) in [
        ("riscv.timebase_hz", Register::TIMER_FREQUENCY, 1),
        ("riscv.zicbom_bytes", Register::ZICBOM_BYTES, 1),
        ("riscv.zicboz_bytes", Register::ZICBOZ_BYTES, 1),
        ("riscv.zicbop_bytes", Register::ZICBOP_BYTES, 1),
        ("riscv.vlen_bits", Register::VLENB, 8),
    ] {
        let value = word(vcpu, register);
        facts.extend(value.map(|value| CpuFact::new(name, value.saturating_mul(unit))));
    }
    if let Some(satp) = probe.kept(Register::SATP, SATP_SV39 | SATP_ASID) {
        let bits = (satp & SATP_ASID).count_ones();
        facts.push(CpuFact::new("riscv.asid_bits", bits));
    }
    if let Some(lengths) = masked_pointers(&mut probe) {
        facts.push(CpuFact::new("riscv.senvcfg_pmm", lengths));
    }
    Ok(facts)
}

/// Names of the extensions of a kind that a vCPU has; with those that are `off`, if asked for.
fn extensions(
    vcpu: &VcpuFd,
    kind: Kind,
    off: bool,
) -> Result<Vec<Cow<'static, str>>, BackendError> {
    let mut all = transfer::list(vcpu)?;
    all.sort_unstable();
    let has = |register: &Register| {
        register.kind() == kind && (off || word(vcpu, *register).is_some_and(|value| value != 0))
    };
    Ok(all
        .into_iter()
        .filter(has)
        .filter_map(Register::extension)
        .collect())
}

/// Lengths of masked pointers that a guest can choose.
fn masked_pointers(probe: &mut Probe) -> Option<String> {
    let mut lengths = Vec::new();
    for (pmm, length) in PMM_LENGTHS {
        if probe.kept(Register::SENVCFG, pmm)? & SENVCFG_PMM == pmm {
            lengths.push(length);
        }
    }
    if lengths.is_empty() {
        lengths.push("none");
    }
    Some(lengths.join(" "))
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
