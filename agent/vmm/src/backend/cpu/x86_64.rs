//! x86-64: when what CPUID told a VM elsewhere is true here.
//!
//! | fact | what | rule |
//! |---|---|---|
//! | `x86.vendor` | CPUID's vendor string | equal: layouts of state differ |
//! | `x86.cpuid.LEAF.SUBLEAF.REG` | a word of feature bits | the source's bits are set here |
//! | `x86.physical_bits` | width of a physical address | not wider than here |
//! | `x86.xsave_bytes` | size of the XSAVE area, all features in use | not larger than here |
//! | `x86.tsc_khz` | of the time-stamp counter | equal within 250 ppm, or this host scales |
//! | `x86.tsc_scaling` | `yes`: a VM may have another frequency | not compared |
//!
//! LEAF and SUBLEAF are hexadecimal, REG is `eax` to `edx`.

use super::{
    fact::{CpuDifference, CpuFact},
    own::Own,
};

/// Frequencies closer than this (1 in 4,000, as the kernel's own tolerance of 250 ppm) are equal.
pub(in crate::backend) const TSC_TOLERANCE: u64 = 4000;

const FEATURES: &str = "x86.cpuid.";
const SCALING: &str = "x86.tsc_scaling";

/// What keeps a VM of `source` from living where `own` holds.
pub(super) fn compatible(source: &[CpuFact], own: &[CpuFact]) -> Vec<CpuDifference> {
    let own = Own(own);
    let scales = own.find(SCALING).is_some_and(|fact| fact.value == "yes");
    let mut differences = own.missing(source, &["x86.vendor", "x86.physical_bits"]);
    differences.extend(source.iter().filter_map(|fact| match fact.name.as_str() {
        SCALING => None,
        "x86.physical_bits" | "x86.xsave_bytes" => own.numbers(fact, |source, own| source <= own),
        "x86.tsc_khz" => own.numbers(fact, |source, own| {
            scales || source.abs_diff(own) <= own / TSC_TOLERANCE
        }),
        name if name.starts_with(FEATURES) => own.numbers(fact, |source, own| source & !own == 0),
        _ => own.same(fact),
    }));
    differences
}

#[cfg(test)]
mod tests {
    use super::{
        super::samples::{facts, names},
        *,
    };

    const HOST: [(&str, &str); 7] = [
        ("x86.vendor", "AuthenticAMD"),
        ("x86.cpuid.1.0.ecx", "0xf0"),
        ("x86.cpuid.80000001.0.edx", "0x1"),
        ("x86.physical_bits", "48"),
        ("x86.xsave_bytes", "2696"),
        ("x86.tsc_khz", "2400000"),
        (SCALING, "no"),
    ];

    /// What differs when the source says `value` of `name`, and this host is [`HOST`].
    fn with(name: &str, value: &str) -> Vec<CpuDifference> {
        let mut source: Vec<_> = HOST.iter().copied().filter(|fact| fact.0 != name).collect();
        source.push((name, value));
        compatible(&facts(&source), &facts(&HOST))
    }

    #[test]
    fn a_host_takes_its_own_vms_and_those_that_were_told_less() {
        assert_eq!(compatible(&facts(&HOST), &facts(&HOST)), []);
        for (name, less) in [
            ("x86.cpuid.1.0.ecx", "0x50"),
            ("x86.cpuid.1.0.ecx", "0"),
            ("x86.physical_bits", "40"),
            ("x86.xsave_bytes", "832"),
            ("x86.tsc_khz", "2400599"),
            ("x86.cpuid.7.0.ebx", "0x0"),
            (SCALING, "yes"),
        ] {
            assert_eq!(with(name, less), [], "{name} {less}");
        }
    }

    #[test]
    fn whatever_the_guest_may_use_and_is_not_here_is_named() {
        for (name, more) in [
            ("x86.vendor", "GenuineIntel"),
            ("x86.cpuid.1.0.ecx", "0x1f0"),
            ("x86.cpuid.7.0.ebx", "0x1"),
            ("x86.physical_bits", "52"),
            ("x86.xsave_bytes", "11008"),
            ("x86.tsc_khz", "2400601"),
            ("x86.tsc_khz", "2399399"),
            ("x86.cpuid.1.0.ecx", "much"),
            ("x86.physical_bits", "-1"),
            ("riscv.isa", "rv64"),
        ] {
            assert_eq!(names(&with(name, more)), [name], "{more}");
        }
    }

    #[test]
    fn a_host_that_scales_takes_every_frequency() {
        let scales: Vec<_> = HOST
            .iter()
            .map(|fact| {
                if fact.0 == SCALING {
                    (SCALING, "yes")
                } else {
                    *fact
                }
            })
            .collect();
        let source = facts(&[
            ("x86.vendor", "AuthenticAMD"),
            ("x86.physical_bits", "48"),
            ("x86.tsc_khz", "1000"),
        ]);
        assert_eq!(compatible(&source, &facts(&scales)), []);
        assert_eq!(names(&compatible(&source, &facts(&HOST))), ["x86.tsc_khz"]);
    }

    #[test]
    fn a_source_that_says_nothing_is_refused() {
        assert_eq!(
            names(&compatible(&[], &facts(&HOST))),
            ["x86.vendor", "x86.physical_bits"]
        );
    }
}
