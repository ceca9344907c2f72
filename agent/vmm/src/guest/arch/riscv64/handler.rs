//! The exception handler that `stvec` points at: it reports what happened, and never returns.

use slat_proto::model::SlotSpec;

use super::{
    calls::{EXCEPTION, EXTENSION},
    encode::{
        Assembler,
        reg::{A0, A1, A2, A6, A7},
    },
};

const SEPC: u32 = 0x141;
const SCAUSE: u32 = 0x142;
const STVAL: u32 = 0x143;

/// The handler, at the start of the support: `stvec` wants a multiple of 4, and gets a page.
pub(in crate::guest) fn support(_: &[SlotSpec], _: u64) -> Vec<u8> {
    let mut code = Assembler::new();
    code.csrr(A0, SCAUSE).csrr(A1, SEPC).csrr(A2, STVAL);
    code.li(A7, EXTENSION).li(A6, EXCEPTION).ecall();
    // Whoever hears of it stops the vCPU; should it ever be let go, it stays here.
    let stay = code.here();
    code.j(stay);
    code.finish()
}
