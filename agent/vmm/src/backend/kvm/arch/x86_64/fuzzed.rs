//! Damaged state of a vCPU, given to its decoder: the container and every section, against a host
//! that has everything. The kernel is not asked; that is `hostile_state_is_refused_or_loads` of the
//! tests that need it.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};

use super::{ARCH, HostCpu, VcpuState};
use crate::{
    backend::kvm::state::{StateReader, StateWriter},
    fuzz::Target,
};

/// What is accepted has one form.
pub(crate) const FUZZED: Target = Target {
    name: "x86_64-vcpu",
    rounds: 200,
    corpus: || vec![sample(2, true), sample(0, false)],
    check,
};

fn host() -> Option<HostCpu> {
    Some(HostCpu {
        supported: CpuId::from_entries(&[kvm_cpuid_entry2::default()]).ok()?,
        msrs: Vec::new(),
        xcrs: true,
        tsc_khz: true,
        tsc_control: true,
        xsave_bytes: size_of::<kvm_xsave>(),
    })
}

fn sample(msrs: usize, optional: bool) -> Vec<u8> {
    let zeros = |bytes: usize| vec![0; bytes];
    let if_there = |bytes: usize| zeros(if optional { bytes } else { 0 });
    let mut writer = StateWriter::new(ARCH, 1);
    for (tag, contents) in [
        (b"CPID", zeros(size_of::<kvm_cpuid_entry2>())),
        (b"TSCK", if_there(4)),
        (b"SREG", zeros(size_of::<kvm_sregs>())),
        (b"REGS", zeros(size_of::<kvm_regs>())),
        (b"XCRS", if_there(size_of::<kvm_xcrs>())),
        (b"XSAV", zeros(size_of::<kvm_xsave>())),
        (b"DREG", zeros(size_of::<kvm_debugregs>())),
        (b"MSRS", zeros(msrs * size_of::<kvm_msr_entry>())),
        (b"EVNT", zeros(size_of::<kvm_vcpu_events>())),
        (b"MPST", zeros(4)),
    ] {
        writer.section(*tag, &contents);
    }
    writer.finish()
}

#[allow(clippy::ptr_arg, reason = "the form of every target: others cut")]
fn check(bytes: &mut Vec<u8>) -> bool {
    // The checksum is right again, or nothing behind it would be reached.
    if let Some(body) = bytes.len().checked_sub(4) {
        let sum = crc32fast::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(&sum.to_le_bytes());
    }
    let Some(host) = host() else {
        return false;
    };
    let read = StateReader::new(bytes, ARCH, 1).and_then(|mut reader| {
        let state = VcpuState::read(&mut reader, &host)?;
        reader.finish()?;
        Ok(state)
    });
    let Ok(state) = read else {
        return false;
    };
    let mut writer = StateWriter::new(ARCH, 1);
    state.write(&mut writer);
    assert_eq!(&writer.finish(), bytes);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_vcpu_state_is_refused_or_has_one_form() {
        assert!(crate::fuzz::bounded(&FUZZED) > 0);
    }
}
