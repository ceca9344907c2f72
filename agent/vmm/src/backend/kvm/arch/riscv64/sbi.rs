//! Calls of the SBI that the kernel hands on, and what else ends a guest's turn on RISC-V alone.

use crate::{
    backend::kvm::exit::{Contract, GuestExit},
    guest::arch::riscv64::{DOORBELL, EXCEPTION, EXTENSION},
};

/// The debug console, and its function that prints one byte.
const CONSOLE: u64 = 0x4442_434e;
const WRITE_BYTE: u64 = 2;
/// Of a system event.
const SHUTDOWN: u32 = 1;

/// Every byte, for whoever needs one that lasts.
static BYTES: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = at as u8;
        at += 1;
    }
    bytes
};

/// A call: `a7`, `a6`, `a0` and on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) extension: u64,
    pub(super) function: u64,
    pub(super) arguments: [u64; 6],
}

impl Call {
    /// What it asks for. `answer` becomes its value in `a1`; `a0` is 0.
    pub(super) fn decode(self, answer: &mut [u8], contract: Contract) -> GuestExit<'_> {
        let [first, second, third, ..] = self.arguments;
        match (self.extension, self.function, contract) {
            (EXTENSION, DOORBELL, Contract::Memstress) => GuestExit::Doorbell(answer),
            (EXTENSION, EXCEPTION, _) => GuestExit::Refused(format!(
                "{} (stval {third:#x}) at {second:#x}, which the guest does not handle,",
                exception(first)
            )),
            (CONSOLE, WRITE_BYTE, Contract::Raw) => {
                let byte = usize::from(first as u8);
                GuestExit::Print(&BYTES[byte..=byte])
            }
            (extension, function, _) => GuestExit::Refused(format!(
                "call of function {function:#x} of SBI extension {extension:#x}, which does \
                 nothing here,"
            )),
        }
    }
}

/// An event of the whole machine.
pub(super) fn system_event(kind: u32, contract: Contract) -> GuestExit<'static> {
    match (kind, contract) {
        (SHUTDOWN, Contract::Raw) => GuestExit::End,
        (kind, _) => GuestExit::Refused(format!("system event {kind}, which is not for it,")),
    }
}

/// A cause, by the privileged specification.
fn exception(cause: u64) -> String {
    let name = match cause {
        0 => "instruction address misaligned",
        1 => "instruction access fault",
        2 => "illegal instruction",
        3 => "breakpoint",
        4 => "load address misaligned",
        5 => "load access fault",
        6 => "store address misaligned",
        7 => "store access fault",
        8 => "call from user mode",
        12 => "instruction page fault",
        13 => "load page fault",
        15 => "store page fault",
        interrupt if interrupt >> 63 == 1 => {
            return format!("interrupt {}", interrupt & (u64::MAX >> 1));
        }
        _ => return format!("exception {cause:#x}"),
    };
    format!("exception {cause}, {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(exit: &GuestExit<'_>) -> String {
        let GuestExit::Refused(words) = exit else {
            panic!("{exit:?}");
        };
        words.clone()
    }

    fn call(extension: u64, function: u64, first: u64) -> Call {
        Call {
            extension,
            function,
            arguments: [first, 0x1234, 0x5678, 0, 0, 0],
        }
    }

    #[test]
    fn each_contract_has_its_own_calls_and_no_others() {
        let mut answer = [0; 8];
        let bell = call(EXTENSION, DOORBELL, 0);
        assert!(matches!(
            bell.decode(&mut answer, Contract::Memstress),
            GuestExit::Doorbell([0, ..])
        ));
        let refused = words(&bell.decode(&mut answer, Contract::Raw));
        assert!(refused.contains("0x8000000"), "{refused}");
        let print = call(CONSOLE, WRITE_BYTE, 0x7_0000_0041);
        assert!(matches!(
            print.decode(&mut answer, Contract::Raw),
            GuestExit::Print(b"A")
        ));
        words(&print.decode(&mut answer, Contract::Memstress));
        words(&call(CONSOLE, 0, 1).decode(&mut answer, Contract::Raw));
        assert!(matches!(
            system_event(SHUTDOWN, Contract::Raw),
            GuestExit::End
        ));
        words(&system_event(SHUTDOWN, Contract::Memstress));
        words(&system_event(2, Contract::Raw));
    }

    #[test]
    fn an_exception_is_told_in_words() {
        for (cause, says) in [
            (3, "exception 3, breakpoint (stval 0x5678) at 0x1234"),
            (24, "exception 0x18"),
            (1 << 63 | 5, "interrupt 5"),
        ] {
            for contract in [Contract::Memstress, Contract::Raw] {
                let mut answer = [0; 8];
                let exit = call(EXTENSION, EXCEPTION, cause).decode(&mut answer, contract);
                assert!(words(&exit).contains(says), "{exit:?}");
            }
        }
    }
}
