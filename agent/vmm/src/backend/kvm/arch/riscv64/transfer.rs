//! Which registers of a vCPU are saved, and how they are loaded elsewhere.
//!
//! # Rules of loading
//! * Extensions that the guest was not told of, by absence or by 0, are hidden where the kernel can
//!   hide them. That it cannot is no harm: a guest uses what it was told.
//! * Everything else is set in its order. What the kernel refuses is read back: equal is as good as
//!   set. (A timer that is off cannot be set off; a configuration can only be confirmed.)
//! * Anything else is refused by the register's name.
//!
//! # Rules of saving
//! All of the kernel's list, or nothing: a register that is listed and cannot be read, or is not
//! known here, fails the save. Left out are registers of extensions that the guest was not told of,
//! for they do not exist where it may go back to.

use kvm_ioctls::Error;

use super::{
    register::{Kind, Register},
    registers::Registers,
    told::Told,
};
use crate::backend::{
    BackendError,
    kvm::{
        device::uninterrupted,
        state::bad,
        vcpu_error::{self, read},
    },
};

/// The calls that read and set a vCPU's registers. Each is one of the kernel's, and gives back what
/// it said.
pub(super) trait RegisterFile {
    /// KVM_GET_REG_LIST: the numbers of those that it has now.
    fn get_list(&self) -> Result<Vec<u64>, Error>;
    /// KVM_GET_ONE_REG: a register's value, as many bytes as it has.
    fn get(&self, register: Register) -> Result<Vec<u8>, Error>;
    /// KVM_SET_ONE_REG.
    fn set(&self, register: Register, value: &[u8]) -> Result<(), Error>;
    /// KVM_GET_MP_STATE.
    fn get_mp_state(&self) -> Result<u32, Error>;
    /// KVM_SET_MP_STATE.
    fn set_mp_state(&self, state: u32) -> Result<(), Error>;
}

/// The registers that a vCPU has now, by the kernel's list.
///
/// # Errors
/// `VcpuCall`, or `State` for one that is not known here.
pub(super) fn list(vcpu: &impl RegisterFile) -> Result<Vec<Register>, BackendError> {
    let numbers = read("KVM_GET_REG_LIST", "all", || vcpu.get_list())?;
    let known = |id| {
        Register::parse(id)
            .ok_or_else(|| bad(format!("the kernel has a register {id:#x}, not known here")))
    };
    numbers.into_iter().map(known).collect()
}

/// The multiprocessing state.
///
/// # Errors
/// `VcpuCall`.
pub(super) fn save_mp_state(vcpu: &impl RegisterFile) -> Result<u32, BackendError> {
    read("KVM_GET_MP_STATE", MP_STATE, || vcpu.get_mp_state())
}

/// Sets it.
///
/// # Errors
/// `VcpuCall`.
pub(super) fn load_mp_state(vcpu: &impl RegisterFile, state: u32) -> Result<(), BackendError> {
    vcpu_error::load("KVM_SET_MP_STATE", MP_STATE, || vcpu.set_mp_state(state))
}

const MP_STATE: &str = "MP state";

/// What a guest that was `told` that can find out.
///
/// # Errors
/// See the module.
pub(super) fn save(vcpu: &impl RegisterFile, told: &Told) -> Result<Registers, BackendError> {
    let mut values = Vec::new();
    for register in list(vcpu)? {
        if register
            .needs()
            .is_some_and(|extension| !told.has_isa(extension))
        {
            continue;
        }
        let mut value = read("KVM_GET_ONE_REG", register, || vcpu.get(register))?;
        let known = match (register.kind(), register.extension()) {
            (Kind::Isa, Some(extension)) => told.has_isa(&extension),
            (Kind::Sbi, Some(extension)) => told.has_sbi(&extension),
            _ => true,
        };
        if !known {
            value.fill(0);
        }
        values.push((register, value));
    }
    Ok(Registers::new(values))
}

/// Sets a vCPU that never ran.
///
/// # Errors
/// `VcpuCall`, naming the register that the kernel refuses.
pub(super) fn load(vcpu: &impl RegisterFile, registers: &Registers) -> Result<(), BackendError> {
    let has = list(vcpu)?.into_iter().filter(|one| one.is_extension());
    for extra in has.filter(|one| !registers.is_set(*one)) {
        if let Err(error) = uninterrupted(|| vcpu.set(extra, &vec![0; extra.bytes()])) {
            tracing::debug!(%extra, %error, "an extension cannot be hidden");
        }
    }
    for (register, value) in registers.iter() {
        if register.is_extension() && !registers.is_set(register) {
            continue;
        }
        if let Err(error) = uninterrupted(|| vcpu.set(register, value)) {
            refused(register, value, error, uninterrupted(|| vcpu.get(register)))?;
        }
    }
    Ok(())
}

/// Decides about a register that the kernel refused to set.
fn refused(
    register: Register,
    value: &[u8],
    error: Error,
    here: Result<Vec<u8>, Error>,
) -> Result<(), BackendError> {
    let here = match here {
        Ok(here) if here == value => return Ok(()),
        Ok(here) => format!("here it is {}", number(&here)),
        Err(error) if error.errno() == libc::ENOENT => "there is none here".to_owned(),
        Err(error) => format!("here it cannot be read: {error}"),
    };
    let what = format!("{register} = {}; {here}", number(value));
    Err(vcpu_error::refused("KVM_SET_ONE_REG", what, error))
}

/// A value as a number; little-endian.
fn number(value: &[u8]) -> String {
    let digits: String = value
        .iter()
        .rev()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let digits = digits.trim_start_matches('0');
    format!("0x{}", if digits.is_empty() { "0" } else { digits })
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        collections::BTreeMap,
    };

    use super::{
        super::{register::tests::register, told::tests::told},
        *,
    };
    use crate::backend::kvm::vcpu_error::tests::{EVERY, demand};

    /// A vCPU with the rules that matter here.
    #[derive(Default)]
    struct Fake {
        values: RefCell<BTreeMap<Register, Vec<u8>>>,
        /// Cannot be changed.
        fixed: Vec<Register>,
        set: RefCell<Vec<Register>>,
        /// Which call fails, and by what.
        fails: Cell<Option<(&'static str, i32)>>,
    }

    impl Fake {
        fn with(values: &[(Register, u64)], fixed: &[Register]) -> Self {
            let of = |(register, value): &(Register, u64)| {
                let bytes = value.to_le_bytes()[..register.bytes().min(8)].to_vec();
                (*register, bytes)
            };
            Self {
                values: RefCell::new(values.iter().map(of).collect()),
                fixed: fixed.to_vec(),
                ..Self::default()
            }
        }

        fn word(&self, register: Register) -> u64 {
            u64::from_le_bytes(self.values.borrow()[&register][..].try_into().unwrap())
        }
    }

    impl Fake {
        fn call(&self, op: &str) -> Result<(), Error> {
            match self.fails.get() {
                Some((failing, errno)) if failing == op => Err(Error::new(errno)),
                _ => Ok(()),
            }
        }
    }

    impl RegisterFile for Fake {
        fn get_list(&self) -> Result<Vec<u64>, Error> {
            self.call("KVM_GET_REG_LIST")?;
            let values = self.values.borrow();
            Ok(values.keys().rev().map(|register| register.id()).collect())
        }

        fn get(&self, register: Register) -> Result<Vec<u8>, Error> {
            self.call("KVM_GET_ONE_REG")?;
            let values = self.values.borrow();
            let value = values.get(&register).cloned();
            value.ok_or_else(|| Error::new(libc::ENOENT))
        }

        fn set(&self, register: Register, value: &[u8]) -> Result<(), Error> {
            self.call("KVM_SET_ONE_REG")?;
            self.get(register)?;
            self.set.borrow_mut().push(register);
            if self.fixed.contains(&register) {
                return Err(Error::new(libc::EINVAL));
            }
            self.values.borrow_mut().insert(register, value.to_vec());
            Ok(())
        }

        fn get_mp_state(&self) -> Result<u32, Error> {
            self.call("KVM_GET_MP_STATE")?;
            Ok(0)
        }

        fn set_mp_state(&self, _: u32) -> Result<(), Error> {
            self.call("KVM_SET_MP_STATE")
        }
    }

    const V: Register = Register::word(Kind::Isa, 15);
    const C: Register = Register::word(Kind::Isa, 1);
    const TIMER_STATE: Register = Register::word(Kind::Timer, 3);

    fn refusal(vcpu: &Fake, registers: &Registers) -> String {
        load(vcpu, registers).unwrap_err().to_string()
    }

    #[test]
    fn a_vcpu_is_loaded_in_order() {
        let values = [
            (TIMER_STATE, 1),
            (Register::PC, 0x1000),
            (V, 1),
            (Register::SATP_MODE, 8),
        ];
        let source = Fake::with(&values, &[]);
        let saved = save(&source, &told("rv64imacv", "time")).unwrap();
        let target = Fake::with(&values.map(|(register, _)| (register, 0)), &[]);
        load(&target, &saved).unwrap();
        let order = [Register::SATP_MODE, V, Register::PC, TIMER_STATE];
        assert_eq!(*target.set.borrow(), order);
        assert_eq!(*target.values.borrow(), *source.values.borrow());
    }

    #[test]
    fn a_refused_value_is_fine_when_it_is_there_already_and_else_named() {
        let saved = |mode| {
            let source = Fake::with(&[(Register::SATP_MODE, mode)], &[]);
            save(&source, &told("rv64imac", "")).unwrap()
        };
        let target = Fake::with(&[(Register::SATP_MODE, 8)], &[Register::SATP_MODE]);
        load(&target, &saved(8)).unwrap();
        let words = refusal(&target, &saved(10));
        assert!(words.contains("satp_mode = 0xa"), "{words}");
        assert!(words.contains("here it is 0x8"), "{words}");
        let nothing = Fake::default();
        let words = refusal(&nothing, &saved(8));
        assert!(words.contains("there is none here"), "{words}");
    }

    #[test]
    fn an_extension_of_which_the_guest_was_told_nothing_is_hidden_or_forgotten() {
        let saved = save(
            &Fake::with(&[(Register::PC, 1), (C, 0)], &[]),
            &told("rv64ima", ""),
        )
        .unwrap();
        let vector = register(Kind::Vector, 0, 6, 16);
        // This host has V, which it can hide, and C, which it cannot.
        let richer = Fake::with(&[(Register::PC, 0), (V, 1), (C, 1), (vector, 7)], &[C]);
        load(&richer, &saved).unwrap();
        assert_eq!((richer.word(V), richer.word(C)), (0, 1));
        // Nothing of either goes back.
        let again = save(&richer, &told("rv64ima", "")).unwrap();
        assert!(!again.is_set(V) && !again.is_set(C));
        assert!(again.iter().all(|(register, _)| register != vector));
        load(&Fake::with(&[(Register::PC, 0)], &[]), &again).unwrap();
    }

    #[test]
    fn an_extension_that_the_guest_uses_and_is_not_here_is_refused_by_name() {
        for register in [V, Register::SBI_DBCN] {
            let source = Fake::with(&[(register, 1)], &[]);
            let saved = save(&source, &told("rv64imacv", "dbcn")).unwrap();
            let name = register.to_string();
            assert!(refusal(&Fake::default(), &saved).contains(&name));
            let off = Fake::with(&[(register, 0)], &[register]);
            assert!(refusal(&off, &saved).contains(&name));
        }
    }

    #[test]
    fn every_call_that_fails_is_named_with_its_register() {
        let told = told("rv64imac", "");
        let values = [(Register::SATP_MODE, 8), (Register::PC, 0x1000)];
        let source = Fake::with(&values, &[]);
        let saved = save(&source, &told).unwrap();
        for errno in EVERY {
            let vcpu = Fake::with(&values.map(|(register, _)| (register, 1)), &[]);
            let fail = |op| {
                vcpu.fails.set(Some((op, errno)));
                op
            };
            let op = fail("KVM_GET_REG_LIST");
            demand(save(&vcpu, &told).unwrap_err(), op, errno, false);
            demand(load(&vcpu, &saved).unwrap_err(), op, errno, false);
            let op = fail("KVM_GET_ONE_REG");
            let error = save(&vcpu, &told).unwrap_err();
            assert!(error.to_string().contains("(core pc)"), "{error}");
            demand(error, op, errno, false);
            let op = fail("KVM_SET_ONE_REG");
            let error = load(&vcpu, &saved).unwrap_err();
            assert!(error.to_string().contains("satp_mode = 0x8"), "{error}");
            demand(error, op, errno, true);
            let op = fail("KVM_GET_MP_STATE");
            demand(save_mp_state(&vcpu).unwrap_err(), op, errno, false);
            let op = fail("KVM_SET_MP_STATE");
            demand(load_mp_state(&vcpu, 0).unwrap_err(), op, errno, true);
        }
    }

    #[test]
    fn numbers_read_as_numbers() {
        assert_eq!(number(&[0; 8]), "0x0");
        assert_eq!(number(&[0x10, 0x02]), "0x210");
    }
}
