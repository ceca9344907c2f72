//! RISC-V: when what a VM could find out elsewhere is true here.
//!
//! | fact | what | rule |
//! |---|---|---|
//! | `riscv.isa` | as in a device tree: `rv64imafdc_zba_zbb` | all extensions are here |
//! | `riscv.satp_modes` | of the guest's own translation: `sv39 sv48` | equal |
//! | `riscv.asid_bits` | width of an address-space identifier | not wider than here |
//! | `riscv.senvcfg_pmm` | lengths of masked pointers: `7 16`, or `none` | all are here |
//! | `riscv.timebase_hz` | frequency of the time counter, which cannot be scaled | equal |
//! | `riscv.zicbom_bytes`, `riscv.zicboz_bytes` | blocks of the cache instructions | equal |
//!
//! Modes of satp must be equal because nothing hides one from a guest, and a guest takes the
//! widest. Extensions that only this host has do no harm: a guest that looked for them did so at
//! the source.

use super::{
    fact::{CpuDifference, CpuFact, NONE},
    own::Own,
};

/// What is said of an extension that is there.
const PRESENT: &str = "present";

/// What keeps a VM of `source` from living where `own` holds.
pub(super) fn compatible(source: &[CpuFact], own: &[CpuFact]) -> Vec<CpuDifference> {
    let own = Own(own);
    let mut differences = own.missing(source, &["riscv.isa", "riscv.satp_modes"]);
    for fact in source {
        match fact.name.as_str() {
            "riscv.isa" => differences.extend(extensions(fact, own)),
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
        .map(|missing| {
            let name = format!("{}.{missing}", source.name);
            CpuDifference::new(&name, PRESENT, NONE)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::samples::{facts, names},
        *,
    };

    const HOST: [(&str, &str); 6] = [
        ("riscv.isa", "rv64imafdch_zba_zbb_ssnpm"),
        ("riscv.satp_modes", "sv39 sv48"),
        ("riscv.asid_bits", "16"),
        ("riscv.senvcfg_pmm", "7"),
        ("riscv.timebase_hz", "10000000"),
        ("riscv.zicbom_bytes", "64"),
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
        ] {
            assert_eq!(names(&with(name, more)), [names_it], "{more}");
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
