//! CPUID: what a vCPU is told, and whether a vCPU from another host can live here.

use std::collections::HashMap;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::super::{BackendError, state::bad};

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAVES_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const LEAF_ADDRESSES: u32 = 0x8000_0008;

/// Registers of a leaf.
#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }
}

/// Words whose bits each are a feature: (leaf, subleaf, register, bits that the kernel changes on its own).
const FEATURE_WORDS: [(u32, u32, Register, u32); 23] = [
    (LEAF_FEATURES, 0, Ecx, 1 << 27 | 1 << 3), // OSXSAVE follows CR4, MONITOR a quirk
    (LEAF_FEATURES, 0, Edx, 1 << 9),           // APIC follows its base register
    (7, 0, Ebx, 0),
    (7, 0, Ecx, 1 << 4), // OSPKE follows CR4
    (7, 0, Edx, 0),
    (7, 1, Eax, 0),
    (7, 1, Ebx, 0),
    (7, 1, Ecx, 0),
    (7, 1, Edx, 0),
    (7, 2, Edx, 0),
    (0xd, 0, Eax, 0),
    (0xd, 0, Edx, 0),
    (0xd, 1, Eax, 0),
    (0xd, 1, Ecx, 0),
    (0xd, 1, Edx, 0),
    (0x4000_0001, 0, Eax, 0),
    (0x8000_0001, 0, Ecx, 0),
    (0x8000_0001, 0, Edx, 0),
    (0x8000_0007, 0, Edx, 0),
    (LEAF_ADDRESSES, 0, Ebx, 0),
    (0x8000_000a, 0, Edx, 0),
    (0x8000_0021, 0, Eax, 0),
    (0x8000_0021, 0, Ecx, 0),
];

/// What vCPU `index` is told: everything the host supports, with its own number in it.
pub(super) fn for_vcpu(supported: &CpuId, index: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        if entry.function == LEAF_FEATURES {
            entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
        } else if LEAVES_TOPOLOGY.contains(&entry.function) {
            entry.edx = index;
        }
    }
    cpuid
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == leaf && entry.index == subleaf)
}

/// Width of a physical address.
pub(super) fn physical_bits(entries: &[kvm_cpuid_entry2]) -> u32 {
    find(entries, LEAF_ADDRESSES, 0).map_or(36, |entry| entry.eax & 0xff)
}

/// Whether a vCPU that was told `saved` can run where `supported` is all there is.
///
/// # Errors
/// `State`, naming the first leaf that this host cannot honour.
pub(super) fn check(
    saved: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Result<(), BackendError> {
    let word = |entries, leaf, subleaf, register: Register| {
        find(entries, leaf, subleaf).map_or(0, |entry| register.of(entry))
    };
    let vendor = |entries| [Ebx, Edx, Ecx].map(|register| word(entries, LEAF_VENDOR, 0, register));
    if vendor(saved) != vendor(supported) {
        let name = |words: [u32; 3]| {
            words
                .map(u32::to_le_bytes)
                .concat()
                .escape_ascii()
                .to_string()
        };
        return Err(bad(format!(
            "CPUID leaf 0x0: the vCPU is of vendor {}, this host's CPU of {}",
            name(vendor(saved)),
            name(vendor(supported))
        )));
    }
    for (leaf, subleaf, register, volatile) in FEATURE_WORDS {
        let missing = word(saved, leaf, subleaf, register)
            & !word(supported, leaf, subleaf, register)
            & !volatile;
        if missing != 0 {
            return Err(bad(format!(
                "CPUID leaf {leaf:#x}.{subleaf} {register:?}: this host does not support bits {missing:#x}"
            )));
        }
    }
    if physical_bits(saved) > physical_bits(supported) {
        return Err(bad(format!(
            "CPUID leaf {LEAF_ADDRESSES:#x} Eax: {} bits of physical address, this host has {}",
            physical_bits(saved),
            physical_bits(supported)
        )));
    }
    // The kernel takes duplicates and then answers by the first; a list with any is not one it gave.
    let mut seen = HashMap::new();
    for entry in saved {
        if seen.insert((entry.function, entry.index), ()).is_some() {
            return Err(bad(format!(
                "CPUID leaf {:#x}.{} twice",
                entry.function, entry.index
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn what_is_missing_here_is_named() {
        let here = [entry(0, 0, 5), entry(1, 0, 0b0110), entry(7, 0, 0b1)];
        check(&[entry(0, 0, 5), entry(1, 0, 0b0010)], &here).unwrap();
        check(&[entry(0, 0, 5), entry(1, 0, 1 << 27)], &here).unwrap();
        let message = |saved: &[kvm_cpuid_entry2]| check(saved, &here).unwrap_err().to_string();
        let missing = message(&[entry(0, 0, 5), entry(7, 0, 0b101)]);
        assert!(
            missing.contains("leaf 0x7.0 Ecx") && missing.contains("0x4"),
            "{missing}"
        );
        assert!(message(&[entry(0, 0, 6)]).contains("vendor"));
        assert!(message(&[entry(0, 0, 5), entry(0, 0, 5)]).contains("twice"));
        let unknown = message(&[entry(0, 0, 5), entry(0x8000_0001, 0, 1)]);
        assert!(unknown.contains("0x80000001"), "{unknown}");
    }
}
