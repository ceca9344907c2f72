//! memstress as machine code. Step for step what
//! [`run_batch`](crate::guest::memstress::run_batch) does; change both together.
//!
//! No stack, and no memory but the control page, the count table and the working pages. The
//! parameters are read at the start of each batch.
//!
//! | register | what |
//! |---|---|
//! | s0 | control page |
//! | s1 | next owned page (sequential) |
//! | s2 | random number generator |
//! | s3 | visits left in the batch |
//! | s4 | pages written in the batch |
//! | s5 | the generator's multiplier |
//! | s6 - s11, a2 - a5 | parameters: see [`PARAMETERS`] |
//! | t0 | page number |
//! | t1 | address of its table entry |
//! | t2 | address of the page |
//! | t3 | its count |
//! | t6 | address of its second stamp |
//! | t4, t5 | in between |

use super::{
    calls::{DOORBELL, EXTENSION},
    encode::{
        Assembler, Label,
        reg::{
            A0, A1, A2, A3, A4, A5, A6, A7, Reg, S0, S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11,
            T0, T1, T2, T3, T4, T5, T6,
        },
    },
};
use crate::guest::memstress::{
    control::{ALWAYS, NONE, offset, pattern},
    random::MULTIPLIER,
    step::SECOND_STAMP,
};

const PATTERN: Reg = S6;
const WRITE_SHARE: Reg = S7;
const HOT_SHARE: Reg = S8;
const HOT_PAGES: Reg = S9;
const FIRST_PAGE: Reg = S10;
const PAGES: Reg = S11;
const EXPECTED: Reg = A2;
const WORK: Reg = A3;
const LOW_LIMIT: Reg = A4;
const HOLE: Reg = A5;

/// What is read from the control page before a batch.
const PARAMETERS: [(Reg, u64); 13] = [
    (PATTERN, offset::PATTERN),
    (WRITE_SHARE, offset::WRITE_SHARE),
    (HOT_SHARE, offset::HOT_SHARE),
    (HOT_PAGES, offset::HOT_PAGES),
    (FIRST_PAGE, offset::FIRST_PAGE),
    (PAGES, offset::PAGES),
    (EXPECTED, offset::EXPECTED),
    (WORK, offset::WORK),
    (LOW_LIMIT, offset::LOW_LIMIT),
    (HOLE, offset::HOLE),
    (S1, offset::POSITION),
    (S2, offset::RANDOM),
    (S3, offset::BATCH),
];

// The code tests for `ALWAYS` by its one bit, for sequential by 0, and for `NONE` by a -1.
const _: () = assert!(ALWAYS == 1 << 32 && NONE == u64::MAX && pattern::SEQUENTIAL == 0);

/// The code's bytes. Entered with the control page in `a0`.
pub(in crate::guest) fn memstress() -> Vec<u8> {
    let mut code = Assembler::new();
    code.mv(S0, A0).li(S5, MULTIPLIER);
    let ask = code.here();
    doorbell(&mut code, ask);
    for (register, at) in PARAMETERS {
        code.ld(register, S0, at as i64);
    }
    code.li(S4, 0);
    let visit = code.here();
    pick(&mut code);
    locate(&mut code);
    check(&mut code);
    write(&mut code);
    code.addi(S3, S3, -1).bnez(S3, visit);
    end_batch(&mut code);
    code.j(ask);
    code.finish()
}

/// Asks until told to go. A host that does not know the call is an exception, not a busy loop.
fn doorbell(code: &mut Assembler, ask: Label) {
    let known = code.label();
    code.li(A7, EXTENSION).li(A6, DOORBELL).ecall();
    code.beqz(A0, known).ebreak();
    code.bind(known).bnez(A1, ask);
}

/// Next random number, in t4. Uses t5.
fn random(code: &mut Assembler) {
    code.srli(T5, S2, 12).xor(S2, S2, T5);
    code.slli(T5, S2, 25).xor(S2, S2, T5);
    code.srli(T5, S2, 27).xor(S2, S2, T5);
    code.mul(T4, S2, S5);
}

/// Scales the upper half of a random number, in t0, to a number of pages.
fn scale(code: &mut Assembler, pages: Reg) {
    code.mul(T0, T0, pages).srli(T0, T0, 32);
}

/// Keeps the lower 32 bits.
fn low_half(code: &mut Assembler, register: Reg) {
    code.slli(register, register, 32)
        .srli(register, register, 32);
}

/// Picks a page by the pattern, in t0.
fn pick(code: &mut Assembler) {
    let [drawn, hot_cold, cold, picked] = [(); 4].map(|()| code.label());
    code.bnez(PATTERN, drawn);
    code.mv(T0, S1).addi(S1, S1, 1);
    code.bltu(S1, PAGES, picked);
    code.li(S1, 0).j(picked);

    code.bind(drawn);
    random(code);
    code.srli(T0, T4, 32).li(T5, pattern::HOT_COLD);
    code.beq(PATTERN, T5, hot_cold);
    scale(code, PAGES);
    code.j(picked);

    code.bind(hot_cold);
    low_half(code, T4);
    code.bgeu(T4, HOT_SHARE, cold);
    scale(code, HOT_PAGES);
    code.j(picked);

    code.bind(cold).sub(T5, PAGES, HOT_PAGES);
    scale(code, T5);
    code.add(T0, T0, HOT_PAGES);
    code.bind(picked).add(T0, T0, FIRST_PAGE);
}

/// Where the page, its second stamp and its table entry are.
fn locate(code: &mut Assembler) {
    for (address, shift, base) in [(T1, 2, EXPECTED), (T2, 12, WORK)] {
        let low = code.label();
        code.slli(address, T0, shift).add(address, address, base);
        code.bltu(address, LOW_LIMIT, low);
        code.add(address, address, HOLE).bind(low);
    }
    code.li(T6, SECOND_STAMP).add(T6, T6, T2);
}

/// Looks its count up, in t3, and its stamps; counts an error.
fn check(code: &mut Assembler) {
    let [wrong, checked] = [(); 2].map(|()| code.label());
    code.lwu(T3, T1, 0).beqz(T3, checked);
    code.ld(T4, T2, 0).bne(T4, T0, wrong);
    code.ld(T4, T2, 8).bne(T4, T3, wrong);
    code.ld(T4, T6, 0).bne(T4, T0, wrong);
    code.ld(T4, T6, 8).beq(T4, T3, checked);
    code.bind(wrong);
    add_to(code, offset::ERRORS, |code| code.addi(T4, T4, 1));
    code.ld(T4, S0, offset::FIRST_ERROR_PAGE as i64)
        .li(T5, NONE);
    code.bne(T4, T5, checked);
    code.sd(T0, S0, offset::FIRST_ERROR_PAGE as i64)
        .bind(checked);
}

/// Writes the next count's stamps, or not.
fn write(code: &mut Assembler) {
    let [writes, no_zero, done] = [(); 3].map(|()| code.label());
    code.srli(T4, WRITE_SHARE, 32).bnez(T4, writes);
    random(code);
    code.srli(T4, T4, 32).bgeu(T4, WRITE_SHARE, done);
    code.bind(writes).addi(T3, T3, 1);
    low_half(code, T3);
    code.bnez(T3, no_zero).li(T3, 1).bind(no_zero);
    for stamp in [T2, T6] {
        code.sd(T0, stamp, 0).sd(T3, stamp, 8);
    }
    code.sw(T3, T1, 0).addi(S4, S4, 1).bind(done);
}

/// Brings state and counters to memory.
fn end_batch(code: &mut Assembler) {
    code.sd(S1, S0, offset::POSITION as i64);
    code.sd(S2, S0, offset::RANDOM as i64);
    add_to(code, offset::PAGES_WRITTEN, |code| code.add(T4, T4, S4));
    code.ld(T5, S0, offset::BATCH as i64);
    add_to(code, offset::VISITS, |code| code.add(T4, T4, T5));
}

/// Changes a counter of the control page, in t4 meanwhile.
fn add_to(
    code: &mut Assembler,
    counter: u64,
    change: impl FnOnce(&mut Assembler) -> &mut Assembler,
) {
    code.ld(T4, S0, counter as i64);
    change(code).sd(T4, S0, counter as i64);
}
