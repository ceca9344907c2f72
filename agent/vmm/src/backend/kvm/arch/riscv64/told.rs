//! What a vCPU was told of its CPU: facts, as they go into the preamble, which move with the VM.
//!
//! A VM keeps what it was told where it was made. A host with more extensions hides those that it
//! can; of those that it cannot hide the VM was not told all the same, and so it can go back. Two
//! facts, the width of address-space identifiers and the lengths of masked pointers, are in no
//! register, so all of them are written down.
//!
//! # Layout
//! The number of facts (4 bytes), then for each the length of its name (2 bytes), the name, the
//! length of its value, the value. UTF-8, little-endian.

use crate::backend::{
    BackendError,
    cpu::{CpuFact, riscv64},
    kvm::state::bad,
};

/// Bounds of what is decoded, far above what there is.
const MOST: usize = 256;
const LONGEST: usize = 4096;

/// The facts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::backend::kvm) struct Told(Vec<CpuFact>);

impl Told {
    /// All that the host says, but for the extensions of ISA and SBI, which the vCPU itself has.
    pub(super) fn new(host: &[CpuFact], isa: String, sbi: String) -> Self {
        let mut facts = host.to_vec();
        for (name, value) in [(riscv64::ISA, isa), (riscv64::SBI, sbi)] {
            match facts.iter_mut().find(|fact| fact.name == name) {
                Some(fact) => fact.value = value,
                None => facts.push(CpuFact::new(name, value)),
            }
        }
        Self(facts)
    }

    pub(super) fn all(&self) -> &[CpuFact] {
        &self.0
    }

    /// Whether the guest was told of an extension of the ISA.
    pub(super) fn has_isa(&self, extension: &str) -> bool {
        riscv64::isa_of(&self.0).any(|one| one == extension)
    }

    /// Whether the guest was told of an extension of the SBI.
    pub(super) fn has_sbi(&self, extension: &str) -> bool {
        riscv64::sbi_of(&self.0).any(|one| one == extension)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = (self.0.len() as u32).to_le_bytes().to_vec();
        for text in self.0.iter().flat_map(|fact| [&fact.name, &fact.value]) {
            // Names are ours, and values are lists of some hundred names.
            bytes.extend((text.len() as u16).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    /// # Errors
    /// `State` when it is cut, too long or no text.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BackendError> {
        let cut = || bad("facts of the CPU: cut");
        let (count, mut rest) = bytes.split_first_chunk().ok_or_else(cut)?;
        let count = u32::from_le_bytes(*count) as usize;
        if count > MOST {
            return Err(bad(format!("{count} facts of the CPU; at most {MOST}")));
        }
        let mut text = || {
            let (len, more) = rest.split_first_chunk().ok_or_else(cut)?;
            let len = usize::from(u16::from_le_bytes(*len));
            if len > LONGEST {
                return Err(bad(format!("facts of the CPU: a text of {len} bytes")));
            }
            let (text, more) = more.split_at_checked(len).ok_or_else(cut)?;
            rest = more;
            let text = str::from_utf8(text).map_err(|_| bad("facts of the CPU: no UTF-8"))?;
            Ok(text.to_owned())
        };
        let mut facts = Vec::new();
        for _ in 0..count {
            let (name, value) = (text()?, text()?);
            facts.push(CpuFact { name, value });
        }
        if !rest.is_empty() {
            let more = rest.len();
            return Err(bad(format!("facts of the CPU: {more} bytes too many")));
        }
        Ok(Self(facts))
    }
}

/// Damaged facts are refused, or have one form.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) const FUZZED: crate::fuzz::Target = crate::fuzz::Target {
    name: "riscv64-told",
    rounds: 1000,
    corpus: || {
        let of = |isa: &str, sbi: &str| {
            let host = [CpuFact::new("riscv.satp_modes", "sv39")];
            Told::new(&host, isa.to_owned(), sbi.to_owned()).encode()
        };
        vec![
            of("rv64imac", "time"),
            of("rv64imafdcv_zba_zbb", "time dbcn sta"),
        ]
    },
    check: |bytes| {
        let decoded = Told::decode(bytes);
        if let Ok(told) = &decoded {
            assert_eq!(&told.encode(), bytes);
        }
        decoded.is_ok()
    },
};

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in super::super) fn told(isa: &str, sbi: &str) -> Told {
        let host = [CpuFact::new("riscv.satp_modes", "sv39")];
        Told::new(&host, isa.to_owned(), sbi.to_owned())
    }

    #[test]
    fn a_vcpu_is_told_its_own_extensions_and_the_rest_by_its_host() {
        let host = [
            CpuFact::new("riscv.isa", "rv64imafdcv"),
            CpuFact::new("riscv.asid_bits", 16),
        ];
        let told = Told::new(&host, "rv64imac_zba".to_owned(), "time dbcn".to_owned());
        assert_eq!(
            told.all(),
            [
                CpuFact::new("riscv.isa", "rv64imac_zba"),
                CpuFact::new("riscv.asid_bits", 16),
                CpuFact::new("riscv.sbi", "time dbcn"),
            ]
        );
        assert!(told.has_isa("c") && told.has_isa("zba") && !told.has_isa("v"));
        assert!(told.has_sbi("dbcn") && !told.has_sbi("sta"));
    }

    #[test]
    fn facts_come_back_and_every_cut_is_refused() {
        let bytes = told("rv64imac", "time").encode();
        assert_eq!(Told::decode(&bytes).unwrap(), told("rv64imac", "time"));
        for cut in 0..bytes.len() {
            assert!(Told::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(Told::decode(&[&bytes[..], &[0]].concat()).is_err());
        assert!(Told::decode(&[0xff; 64]).is_err());
        assert!(Told::decode(&[1, 0, 0, 0, 1, 0, 0xff, 0, 0]).is_err());
    }

    #[test]
    fn damaged_facts_are_refused_or_have_one_form() {
        crate::fuzz::bounded(&FUZZED);
    }

    proptest! {
        #[test]
        fn what_is_accepted_has_one_form(bytes in prop::collection::vec(0u8..4, 0..60)) {
            if let Ok(told) = Told::decode(&bytes) {
                prop_assert_eq!(told.encode(), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(Told::decode(&bytes));
        }
    }
}
