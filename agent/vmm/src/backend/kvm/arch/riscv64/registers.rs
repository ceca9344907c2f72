//! Values of a vCPU's registers, and how they are written down.
//!
//! For each register its number (8 bytes) and its value, as many bytes as the number says. They are
//! in the order of loading, which is strict: what is written down has one form, no register comes
//! twice, and whatever is not known here is refused.

use super::register::Register;
use crate::backend::{BackendError, kvm::state::bad};

/// More than any vCPU has: today's have up to some 300.
const MOST: usize = 2048;

/// Registers and their values, in the order of loading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Registers(Vec<(Register, Vec<u8>)>);

impl Registers {
    /// Puts them in order. Each register once.
    pub(super) fn new(mut values: Vec<(Register, Vec<u8>)>) -> Self {
        values.sort_unstable_by_key(|(register, _)| *register);
        Self(values)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Register, &[u8])> {
        self.0
            .iter()
            .map(|(register, value)| (*register, &value[..]))
    }

    /// Whether it is there and not 0.
    pub(super) fn is_set(&self, register: Register) -> bool {
        self.0
            .binary_search_by_key(&register, |(register, _)| *register)
            .is_ok_and(|at| self.0[at].1.iter().any(|byte| *byte != 0))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (register, value) in &self.0 {
            bytes.extend(register.id().to_le_bytes());
            bytes.extend(value);
        }
        bytes
    }

    /// # Errors
    /// `State` when it is cut, out of order, or has what is not known here.
    pub(super) fn decode(mut rest: &[u8]) -> Result<Self, BackendError> {
        let mut values: Vec<(Register, Vec<u8>)> = Vec::new();
        while !rest.is_empty() {
            let (id, more) = rest
                .split_first_chunk()
                .ok_or_else(|| bad("cut in a register's number"))?;
            let id = u64::from_le_bytes(*id);
            let register = Register::parse(id)
                .ok_or_else(|| bad(format!("register {id:#x} is not known here")))?;
            let (value, more) = more
                .split_at_checked(register.bytes())
                .ok_or_else(|| bad(format!("cut in register {register}")))?;
            if register.is_extension() && (value[0] > 1 || value[1..].iter().any(|b| *b != 0)) {
                return Err(bad(format!("{register} is neither there nor not")));
            }
            if values.last().is_some_and(|(last, _)| *last >= register) {
                return Err(bad(format!("register {register} is out of order")));
            }
            if values.len() == MOST {
                return Err(bad(format!("more than {MOST} registers")));
            }
            values.push((register, value.to_vec()));
            rest = more;
        }
        Ok(Self(values))
    }
}

/// Damaged registers are refused, or have one form.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) const FUZZED: crate::fuzz::Target = crate::fuzz::Target {
    name: "riscv64-registers",
    rounds: 1000,
    corpus: || {
        // Of 4, 8 and 32 bytes: f32 of F, timer, v6, pc, DBCN, satp_mode.
        let numbers = [0x8020_0000_0500_0020, 0x8050_0000_0900_0006];
        let known = [
            Register::word(super::register::Kind::Timer, 3),
            Register::PC,
            Register::SBI_DBCN,
            Register::SATP_MODE,
        ];
        let all = numbers.into_iter().filter_map(Register::parse).chain(known);
        let value = |register: Register| {
            let mut value = vec![0; register.bytes()];
            value[0] = 1;
            (register, value)
        };
        let few = vec![(Register::PC, vec![2; 8])];
        vec![
            Registers::new(all.map(value).collect()).encode(),
            Registers::new(few).encode(),
        ]
    },
    check: |bytes| {
        let decoded = Registers::decode(bytes);
        if let Ok(registers) = &decoded {
            assert_eq!(&registers.encode(), bytes);
        }
        decoded.is_ok()
    },
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::register::{Kind, tests::register},
        *,
    };

    fn sample() -> Registers {
        Registers::new(vec![
            (Register::word(Kind::Timer, 3), vec![1; 8]),
            (Register::PC, vec![2; 8]),
            (register(Kind::FpF, 0, 32, 4), vec![3; 4]),
            (register(Kind::Vector, 0, 6, 32), vec![4; 32]),
            (Register::SBI_DBCN, vec![1, 0, 0, 0, 0, 0, 0, 0]),
            (Register::SATP_MODE, vec![5; 8]),
        ])
    }

    #[test]
    fn they_come_back_in_the_order_of_loading() {
        let bytes = sample().encode();
        let back = Registers::decode(&bytes).unwrap();
        assert_eq!(back, sample());
        let names: Vec<String> = back.iter().map(|(one, _)| one.to_string()).collect();
        assert_eq!(names[0], "configuration satp_mode");
        assert_eq!(names[1], "SBI extension dbcn");
        assert_eq!(names[5], "timer state");
        assert!(back.is_set(Register::SBI_DBCN) && !back.is_set(Register::STVEC));
    }

    #[test]
    fn damaged_registers_are_refused_or_have_one_form() {
        // All of the corpus's numbers are registers.
        let corpus = (FUZZED.corpus)();
        assert_eq!(Registers::decode(&corpus[0]).unwrap().iter().count(), 6);
        crate::fuzz::bounded(&FUZZED);
    }

    #[test]
    fn every_cut_is_refused_but_between_registers() {
        let bytes = sample().encode();
        let mut whole = vec![0];
        for (register, _) in sample().iter() {
            whole.push(whole.last().unwrap() + 8 + register.bytes());
        }
        for cut in 0..bytes.len() {
            let decoded = Registers::decode(&bytes[..cut]);
            assert_eq!(decoded.is_ok(), whole.contains(&cut), "cut at {cut}");
        }
    }

    #[test]
    fn twins_strangers_and_half_extensions_are_refused_by_name() {
        let says = |bytes: &[u8], word: &str| {
            let error = Registers::decode(bytes).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        let one = Registers::new(vec![(Register::PC, vec![0; 8])]).encode();
        says(&[one.clone(), one].concat(), "core pc is out of order");
        says(&[0x11; 16], "0x1111111111111111 is not known");
        let mut half = Registers::new(vec![(Register::SBI_DBCN, vec![0; 8])]).encode();
        half[8] = 2;
        says(&half, "SBI extension dbcn");
        let many: Vec<_> = (0..=MOST as u16)
            .map(|place| (Register::word(Kind::SbiState, place), vec![0; 8]))
            .collect();
        says(&Registers::new(many).encode(), "more than 2048");
    }

    fn arbitrary() -> impl Strategy<Value = (Register, Vec<u8>)> {
        let kinds = prop_oneof![
            Just(Kind::Config),
            Just(Kind::Core),
            Just(Kind::Csr),
            Just(Kind::Timer),
            Just(Kind::FpF),
            Just(Kind::FpD),
            Just(Kind::Vector),
            Just(Kind::SbiState)
        ];
        (kinds, 0u8..4, 0u16..64, 2u32..=8).prop_flat_map(|(kind, subtype, place, size)| {
            let register = register(kind, subtype, place, 1 << size);
            let value = prop::collection::vec(any::<u8>(), register.bytes());
            (Just(register), value)
        })
    }

    proptest! {
        #[test]
        fn any_registers_come_back(values in prop::collection::vec(arbitrary(), 0..50)) {
            let mut values = values;
            values.sort_by_key(|(register, _)| *register);
            values.dedup_by_key(|(register, _)| *register);
            let registers = Registers::new(values);
            prop_assert_eq!(Registers::decode(&registers.encode()).unwrap(), registers);
        }

        #[test]
        fn what_is_accepted_has_one_form(
            values in prop::collection::vec(arbitrary(), 1..6),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let mut bytes = Registers::new(values).encode();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(registers) = Registers::decode(&bytes) {
                prop_assert_eq!(registers.encode(), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(Registers::decode(&bytes));
        }
    }
}
