//! Names of extensions, by the numbers that the kernel gives them.

use std::borrow::Cow;

/// Extensions of the ISA, as `KVM_REG_RISCV_ISA_EXT` numbers them.
pub(super) const ISA: [&str; 75] = [
    "a",
    "c",
    "d",
    "f",
    "h",
    "i",
    "m",
    "svpbmt",
    "sstc",
    "svinval",
    "zihintpause",
    "zicbom",
    "zicboz",
    "zbb",
    "ssaia",
    "v",
    "svnapot",
    "zba",
    "zbs",
    "zicntr",
    "zicsr",
    "zifencei",
    "zihpm",
    "smstateen",
    "zicond",
    "zbc",
    "zbkb",
    "zbkc",
    "zbkx",
    "zknd",
    "zkne",
    "zknh",
    "zkr",
    "zksed",
    "zksh",
    "zkt",
    "zvbb",
    "zvbc",
    "zvkb",
    "zvkg",
    "zvkned",
    "zvknha",
    "zvknhb",
    "zvksed",
    "zvksh",
    "zvkt",
    "zfh",
    "zfhmin",
    "zihintntl",
    "zvfh",
    "zvfhmin",
    "zfa",
    "ztso",
    "zacas",
    "sscofpmf",
    "zimop",
    "zca",
    "zcb",
    "zcd",
    "zcf",
    "zcmop",
    "zawrs",
    "smnpm",
    "ssnpm",
    "svade",
    "svadu",
    "svvptc",
    "zabha",
    "ziccrse",
    "zaamo",
    "zalrsc",
    "zicbop",
    "zfbfmin",
    "zvfbfmin",
    "zvfbfwma",
];

/// Extensions of the SBI, as `KVM_REG_RISCV_SBI_EXT` numbers them.
pub(super) const SBI: [&str; 14] = [
    "v01",
    "time",
    "ipi",
    "rfence",
    "srst",
    "hsm",
    "pmu",
    "experimental",
    "vendor",
    "dbcn",
    "sta",
    "susp",
    "fwft",
    "mpxy",
];

// A newer binding that knows more extensions must not build without their names.
#[cfg(target_arch = "riscv64")]
const _: () = {
    use kvm_bindings as kvm;
    assert!(ISA.len() >= kvm::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_MAX as usize);
    assert!(SBI.len() >= kvm::KVM_RISCV_SBI_EXT_ID_KVM_RISCV_SBI_EXT_MAX as usize);
};

/// The name of one. What a newer kernel has is called by its number.
pub(super) fn of(list: &'static [&'static str], number: u16) -> Cow<'static, str> {
    match list.get(usize::from(number)) {
        Some(name) => Cow::Borrowed(*name),
        None => Cow::Owned(format!("ext{number}")),
    }
}

/// An ISA as in a device tree: single letters in their order, then the longer names.
pub(super) fn isa_string(extensions: &[Cow<'_, str>]) -> String {
    const ORDER: &str = "imafdqcbvh";
    let (mut letters, mut names): (Vec<&str>, Vec<&str>) = extensions
        .iter()
        .map(AsRef::as_ref)
        .partition(|extension| extension.len() == 1);
    letters.sort_by_key(|letter| ORDER.find(letter).unwrap_or(ORDER.len()));
    names.sort_unstable();
    names.insert(0, "");
    format!("rv64{}{}", letters.concat(), names.join("_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_isa_reads_as_in_a_device_tree() {
        let isa = |names: &[&'static str]| {
            let names: Vec<_> = names.iter().map(|name| Cow::Borrowed(*name)).collect();
            isa_string(&names)
        };
        assert_eq!(isa(&["zbb", "c", "zba", "h", "i", "m"]), "rv64imch_zba_zbb");
        assert_eq!(isa(&["i"]), "rv64i");
    }

    #[test]
    fn an_extension_of_a_newer_kernel_has_a_name_too() {
        assert_eq!(of(&ISA, 15), "v");
        assert_eq!(of(&SBI, 9), "dbcn");
        assert_eq!(of(&ISA, 74), "zvfbfwma");
        assert_eq!(of(&ISA, 75), "ext75");
    }
}
