//! RISC-V: when what a VM could find out elsewhere is true here.
//!
//! | fact | what | rule |
//! |---|---|---|
//! | `riscv.isa` | as in a device tree: `rv64imafdc_zba_zbb` | all extensions are here |
//! | `riscv.sbi` | extensions of the SBI: `time ipi rfence hsm` | all are here |
//! | `riscv.satp_modes` | of the guest's own translation: `sv39 sv48` | equal |
//! | `riscv.asid_bits` | width of an address-space identifier | not wider than here |
//! | `riscv.senvcfg_pmm` | lengths of masked pointers: `7 16`, or `none` | all are here |
//! | `riscv.timebase_hz` | frequency of the time counter, which cannot be scaled | equal |
//! | `riscv.zicbom_bytes`, `zicboz_bytes`, `zicbop_bytes` | blocks for caches | equal |
//! | `riscv.vlen_bits` | width of a vector register | equal |
//!
//! Modes of satp must be equal because nothing hides one from a guest, and a guest takes the
//! widest. Extensions that only this host has do no harm: a guest that looked for them did so at
//! the source.
//!
//! No facts are the width of a VM's identifier in the second stage, which no guest can find out and
//! the kernel does not tell, and the width of a guest-physical address: slots that do not fit are
//! refused when the VM is built, which is before a page moves.

use super::{
    fact::{CpuDifference, CpuFact, NONE},
    own::Own,
};

/// Extensions of the ISA.
pub(in crate::backend) const ISA: &str = "riscv.isa";
/// Extensions of the SBI.
pub(in crate::backend) const SBI: &str = "riscv.sbi";

/// What is said of an extension that is there.
const PRESENT: &str = "present";

/// What keeps a VM of `source` from living where `own` holds.
pub(super) fn compatible(source: &[CpuFact], own: &[CpuFact]) -> Vec<CpuDifference> {
    let own = Own(own);
    let mut differences = own.missing(source, &[ISA, "riscv.satp_modes"]);
    for fact in source {
        match fact.name.as_str() {
            ISA => differences.extend(extensions(fact, own)),
            SBI => {
                let here = own.find(SBI).map_or("", |own| own.value.as_str());
                let missing = words(&fact.value).filter(|one| !words(here).any(|own| own == *one));
                differences.extend(missing.map(|one| absent(fact, one)));
            }
            "riscv.asid_bits" => {
                differences.extend(own.numbers(fact, |source, own| source <= own));
            }
            "riscv.senvcfg_pmm" => {
                let here = own.find(&fact.name).map_or("", |own| own.value.as_str());
                let has = |length| here.split(' ').any(|own| own == length);
                if !fact.value.split(' ').all(|one| one == NONE || has(one)) {
                    differences.push(own.differs(fact));
                }
            }
            _ => differences.extend(own.same(fact)),
        }
    }
    differences
}

/// Extensions of the ISA that `facts` tell of.
#[cfg_attr(
    not(target_arch = "riscv64"),
    allow(
        dead_code,
        reason = "asked by the KVM backend of that architecture, and by tests"
    )
)]
pub(in crate::backend) fn isa_of(facts: &[CpuFact]) -> impl Iterator<Item = &str> {
    let isa = facts.iter().find(|fact| fact.name == ISA);
    let parsed = isa.and_then(|fact| parse(&fact.value));
    parsed.into_iter().flat_map(|(_, extensions)| extensions)
}

/// Extensions of the SBI that `facts` tell of.
#[cfg_attr(
    not(target_arch = "riscv64"),
    allow(
        dead_code,
        reason = "asked by the KVM backend of that architecture, and by tests"
    )
)]
pub(in crate::backend) fn sbi_of(facts: &[CpuFact]) -> impl Iterator<Item = &str> {
    let sbi = facts.iter().find(|fact| fact.name == SBI);
    sbi.into_iter().flat_map(|fact| words(&fact.value))
}

/// What a list has, without the gaps.
fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(' ').filter(|word| !word.is_empty())
}

/// An extension that is not here.
fn absent(fact: &CpuFact, extension: &str) -> CpuDifference {
    let name = format!("{}.{extension}", fact.name);
    CpuDifference::new(&name, PRESENT, NONE)
}

/// Base and extensions of an ISA string: letters after the width, then names.
fn parse(isa: &str) -> Option<(&str, Vec<&str>)> {
    let mut words = isa.split('_');
    let (base, letters) = words.next()?.split_at_checked("rv64".len())?;
    let mut extensions: Vec<&str> = letters.split_inclusive(|_: char| true).collect();
    extensions.extend(words);
    Some((base, extensions))
}

/// One difference for each extension that is not here.
fn extensions(source: &CpuFact, own: Own<'_>) -> Vec<CpuDifference> {
    let here = own.find(&source.name).and_then(|own| parse(&own.value));
    let (Some((base, wanted)), Some((own_base, here))) = (parse(&source.value), here) else {
        return vec![own.differs(source)];
    };
    if base != own_base {
        return vec![own.differs(source)];
    }
    wanted
        .into_iter()
        .filter(|wanted| !here.contains(wanted))
        .map(|missing| absent(source, missing))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::samples::{facts, names},
        *,
    };

    const HOST: [(&str, &str); 8] = [
        ("riscv.isa", "rv64imafdch_zba_zbb_ssnpm"),
        ("riscv.satp_modes", "sv39 sv48"),
        ("riscv.asid_bits", "16"),
        ("riscv.senvcfg_pmm", "7"),
        ("riscv.timebase_hz", "10000000"),
        ("riscv.zicbom_bytes", "64"),
        ("riscv.sbi", "time ipi dbcn"),
        ("riscv.vlen_bits", "128"),
    ];

    fn with(name: &str, value: &str) -> Vec<CpuDifference> {
        let mut source: Vec<_> = HOST.iter().copied().filter(|fact| fact.0 != name).collect();
        source.push((name, value));
        compatible(&facts(&source), &facts(&HOST))
    }

    #[test]
    fn a_host_takes_its_own_vms_and_those_that_were_told_less() {
        assert_eq!(compatible(&facts(&HOST), &facts(&HOST)), []);
        for (name, less) in [
            ("riscv.isa", "rv64imafdc_zbb"),
            ("riscv.isa", "rv64imac"),
            ("riscv.asid_bits", "0"),
            ("riscv.senvcfg_pmm", "none"),
            ("riscv.sbi", "time"),
            ("riscv.sbi", ""),
        ] {
            assert_eq!(with(name, less), [], "{name} {less}");
        }
    }

    #[test]
    fn whatever_the_guest_may_use_and_is_not_here_is_named() {
        for (name, more, names_it) in [
            ("riscv.isa", "rv64imafdcv", "riscv.isa.v"),
            ("riscv.isa", "rv64imafdc_zbc", "riscv.isa.zbc"),
            ("riscv.isa", "rv32imac", "riscv.isa"),
            ("riscv.isa", "", "riscv.isa"),
            ("riscv.isa", "rv64\u{e9}", "riscv.isa.\\u{e9}"),
            ("riscv.satp_modes", "sv39 sv48 sv57", "riscv.satp_modes"),
            ("riscv.satp_modes", "sv39", "riscv.satp_modes"),
            ("riscv.asid_bits", "17", "riscv.asid_bits"),
            ("riscv.senvcfg_pmm", "7 16", "riscv.senvcfg_pmm"),
            ("riscv.timebase_hz", "1000000", "riscv.timebase_hz"),
            ("riscv.zicbom_bytes", "32", "riscv.zicbom_bytes"),
            ("riscv.zicboz_bytes", "64", "riscv.zicboz_bytes"),
            ("riscv.sbi", "time sta", "riscv.sbi.sta"),
            ("riscv.vlen_bits", "256", "riscv.vlen_bits"),
        ] {
            assert_eq!(names(&with(name, more)), [names_it], "{more}");
        }
    }

    /// What KVM of Linux 6.12 says of two CPUs that QEMU 10 emulates: one with Sv57 and without
    /// vectors, and one of the profile RVA23 with Sv39.
    const WIDE: [(&str, &str); 8] = [
        (
            "riscv.isa",
            "rv64imafdc_sstc_zawrs_zba_zbb_zbc_zbs_zca_zcd_zfa_zicbom_zicboz_zicntr_zicsr_zifencei\
             _zihintntl_zihintpause_zihpm",
        ),
        (
            "riscv.sbi",
            "v01 time ipi rfence srst hsm experimental vendor dbcn sta",
        ),
        ("riscv.satp_modes", "sv39 sv48 sv57"),
        ("riscv.timebase_hz", "10000000"),
        ("riscv.zicbom_bytes", "64"),
        ("riscv.zicboz_bytes", "64"),
        ("riscv.asid_bits", "16"),
        ("riscv.senvcfg_pmm", "none"),
    ];
    const RVA23: [(&str, &str); 9] = [
        (
            "riscv.isa",
            "rv64imafdcv_smstateen_sstc_svinval_svnapot_svpbmt_zawrs_zba_zbb_zbs_zca_zcb_zcd_zcmop\
             _zfa_zfhmin_zicbom_zicboz_zicntr_zicond_zicsr_zifencei_zihintntl_zihintpause_zihpm\
             _zimop_zkt_zvbb_zvfhmin_zvkb_zvkt",
        ),
        (
            "riscv.sbi",
            "v01 time ipi rfence srst hsm pmu experimental vendor dbcn sta",
        ),
        ("riscv.satp_modes", "sv39"),
        ("riscv.timebase_hz", "10000000"),
        ("riscv.zicbom_bytes", "64"),
        ("riscv.zicboz_bytes", "64"),
        ("riscv.vlen_bits", "128"),
        ("riscv.asid_bits", "16"),
        ("riscv.senvcfg_pmm", "7 16"),
    ];

    #[test]
    fn unlike_hosts_refuse_each_others_vms_by_name() {
        let refused = |source: &[_], own: &[_]| compatible(&facts(source), &facts(own));
        assert_eq!(
            names(&refused(&WIDE, &RVA23)),
            ["riscv.isa.zbc", "riscv.satp_modes"]
        );
        let differences = refused(&RVA23, &WIDE);
        let named = names(&differences);
        for name in [
            "riscv.isa.v",
            "riscv.isa.zvbb",
            "riscv.sbi.pmu",
            "riscv.satp_modes",
            "riscv.vlen_bits",
            "riscv.senvcfg_pmm",
        ] {
            assert!(named.contains(&name), "{name} of {named:?}");
        }
        for name in ["riscv.isa.zba", "riscv.sbi.sta", "riscv.timebase_hz"] {
            assert!(!named.contains(&name), "{name} of {named:?}");
        }
    }

    #[test]
    fn a_source_that_says_nothing_is_refused() {
        assert_eq!(
            names(&compatible(&[], &facts(&HOST))),
            ["riscv.isa", "riscv.satp_modes"]
        );
    }
}
