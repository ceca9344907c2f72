//! The few instructions of RV64IM that our guests are made of, as 32-bit words.
//!
//! # Invariants
//! Nothing is placed by address: jumps are relative, and constants are made by instructions, so
//! the bytes run wherever they are put. A label is bound once. A jump that does not reach, and a
//! label that is never bound, are mistakes of the program and panic when it is made, which the
//! tests of every program do.

/// Registers, by the names of the calling convention.
pub(crate) mod reg {
    /// A register's number.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Reg(pub(super) u32);

    macro_rules! registers {
        ($($name:ident = $number:literal)*) => {
            $(
                #[allow(dead_code, reason = "the whole set has its names, whoever uses them")]
                pub(crate) const $name: Reg = Reg($number);
            )*
        };
    }

    registers! {
        ZERO = 0 RA = 1 SP = 2 T0 = 5 T1 = 6 T2 = 7 S0 = 8 S1 = 9
        A0 = 10 A1 = 11 A2 = 12 A3 = 13 A4 = 14 A5 = 15 A6 = 16 A7 = 17
        S2 = 18 S3 = 19 S4 = 20 S5 = 21 S6 = 22 S7 = 23 S8 = 24 S9 = 25 S10 = 26 S11 = 27
        T3 = 28 T4 = 29 T5 = 30 T6 = 31
    }
}

use reg::{Reg, ZERO};

/// A place in the code, bound or yet to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Label(usize);

/// Which instruction refers to a label.
#[derive(Clone, Copy, Debug)]
enum Reach {
    Branch,
    Jump,
}

/// Collects instructions.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    words: Vec<u32>,
    labels: Vec<Option<usize>>,
    references: Vec<(usize, Label, Reach)>,
}

/// Bits `from..from + count` of a number, moved to `to`.
const fn bits(of: u32, from: u32, count: u32, to: u32) -> u32 {
    (of >> from & ((1 << count) - 1)) << to
}

/// An immediate of 12 bits, as the two's complement.
fn imm12(value: i64) -> u32 {
    assert!((-2048..2048).contains(&value), "{value} in 12 bits");
    value as u32 & 0xfff
}

fn i_type(opcode: u32, funct3: u32, rd: Reg, rs1: Reg, imm: i64) -> u32 {
    opcode | rd.0 << 7 | funct3 << 12 | rs1.0 << 15 | imm12(imm) << 20
}

fn r_type(funct7: u32, funct3: u32, rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    0x33 | rd.0 << 7 | funct3 << 12 | rs1.0 << 15 | rs2.0 << 20 | funct7 << 25
}

fn s_type(funct3: u32, rs1: Reg, rs2: Reg, imm: i64) -> u32 {
    let imm = imm12(imm);
    0x23 | bits(imm, 0, 5, 7) | funct3 << 12 | rs1.0 << 15 | rs2.0 << 20 | bits(imm, 5, 7, 25)
}

/// Methods that append one instruction each.
macro_rules! instructions {
    ($($name:ident($($argument:ident: $kind:ty),*) = $word:expr;)*) => {
        $(
            #[allow(dead_code, reason = "tests make programs of their own")]
            pub(crate) fn $name(&mut self, $($argument: $kind),*) -> &mut Self {
                self.push($word)
            }
        )*
    };
}

/// Methods that append a branch.
macro_rules! branches {
    ($($name:ident = $funct3:literal;)*) => {
        $(
            pub(crate) fn $name(&mut self, rs1: Reg, rs2: Reg, to: Label) -> &mut Self {
                self.references.push((self.words.len(), to, Reach::Branch));
                self.push(0x63 | $funct3 << 12 | rs1.0 << 15 | rs2.0 << 20)
            }
        )*
    };
}

impl Assembler {
    /// No instructions.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, word: u32) -> &mut Self {
        self.words.push(word);
        self
    }

    /// A label to be bound later.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Binds a label to the next instruction.
    pub(crate) fn bind(&mut self, label: Label) -> &mut Self {
        let here = self.labels[label.0].replace(self.words.len());
        assert!(here.is_none(), "a label bound twice");
        self
    }

    /// A label at the next instruction.
    pub(crate) fn here(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    instructions! {
        addi(rd: Reg, rs1: Reg, imm: i64) = i_type(0x13, 0, rd, rs1, imm);
        addiw(rd: Reg, rs1: Reg, imm: i64) = i_type(0x1b, 0, rd, rs1, imm);
        slli(rd: Reg, rs1: Reg, by: u32) = i_type(0x13, 1, rd, rs1, (by & 63).into());
        srli(rd: Reg, rs1: Reg, by: u32) = i_type(0x13, 5, rd, rs1, (by & 63).into());
        ld(rd: Reg, base: Reg, offset: i64) = i_type(0x03, 3, rd, base, offset);
        lwu(rd: Reg, base: Reg, offset: i64) = i_type(0x03, 6, rd, base, offset);
        lbu(rd: Reg, base: Reg, offset: i64) = i_type(0x03, 4, rd, base, offset);
        sd(value: Reg, base: Reg, offset: i64) = s_type(3, base, value, offset);
        sw(value: Reg, base: Reg, offset: i64) = s_type(2, base, value, offset);
        add(rd: Reg, rs1: Reg, rs2: Reg) = r_type(0, 0, rd, rs1, rs2);
        sub(rd: Reg, rs1: Reg, rs2: Reg) = r_type(0x20, 0, rd, rs1, rs2);
        xor(rd: Reg, rs1: Reg, rs2: Reg) = r_type(0, 4, rd, rs1, rs2);
        mul(rd: Reg, rs1: Reg, rs2: Reg) = r_type(1, 0, rd, rs1, rs2);
        lui(rd: Reg, upper: u32) = 0x37 | rd.0 << 7 | bits(upper, 0, 20, 12);
        auipc(rd: Reg, upper: u32) = 0x17 | rd.0 << 7 | bits(upper, 0, 20, 12);
        csrr(rd: Reg, csr: u32) = 0x73 | rd.0 << 7 | 2 << 12 | bits(csr, 0, 12, 20);
        jr(to: Reg) = i_type(0x67, 0, ZERO, to, 0);
        word(word: u32) = word;
        ecall() = 0x73;
        ebreak() = 0x0010_0073;
    }

    branches! {
        beq = 0;
        bne = 1;
        bltu = 6;
        bgeu = 7;
    }

    /// Copies a register.
    pub(crate) fn mv(&mut self, rd: Reg, rs: Reg) -> &mut Self {
        self.addi(rd, rs, 0)
    }

    /// Branches when a register is 0.
    pub(crate) fn beqz(&mut self, rs: Reg, to: Label) -> &mut Self {
        self.beq(rs, ZERO, to)
    }

    /// Branches when a register is not 0.
    pub(crate) fn bnez(&mut self, rs: Reg, to: Label) -> &mut Self {
        self.bne(rs, ZERO, to)
    }

    /// Jumps.
    pub(crate) fn j(&mut self, to: Label) -> &mut Self {
        self.references.push((self.words.len(), to, Reach::Jump));
        self.push(0x6f)
    }

    /// Makes any constant: 12 bits at a time from the top, without the zeroes between.
    pub(crate) fn li(&mut self, rd: Reg, value: u64) -> &mut Self {
        let value = value as i64;
        if (-2048..2048).contains(&value) {
            return self.addi(rd, ZERO, value);
        }
        // The low 12 bits are added as a signed number.
        let low = value << 52 >> 52;
        let high = value.wrapping_sub(low);
        if let Ok(word) = i32::try_from(value) {
            // At the top end `high` is 2^31, which lui makes negative and addiw wraps back.
            self.lui(rd, (i64::from(word).wrapping_sub(low) >> 12) as u32);
            if low != 0 {
                self.addiw(rd, rd, low);
            }
            return self;
        }
        let zeroes = high.trailing_zeros();
        self.li(rd, (high >> zeroes) as u64);
        self.slli(rd, rd, zeroes);
        if low != 0 {
            self.addi(rd, rd, low);
        }
        self
    }

    /// The code, with all labels in place.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (at, label, reach) in self.references {
            let Some(target) = self.labels[label.0] else {
                panic!("a label that is not bound");
            };
            let offset = (target as i64 - at as i64) * 4;
            let imm = offset as u32;
            let (limit, word) = match reach {
                Reach::Branch => (
                    1 << 12,
                    bits(imm, 11, 1, 7)
                        | bits(imm, 1, 4, 8)
                        | bits(imm, 5, 6, 25)
                        | bits(imm, 12, 1, 31),
                ),
                Reach::Jump => (
                    1 << 20,
                    bits(imm, 12, 8, 12)
                        | bits(imm, 11, 1, 20)
                        | bits(imm, 1, 10, 21)
                        | bits(imm, 20, 1, 31),
                ),
            };
            assert!((-limit..limit).contains(&offset), "a jump of {offset}");
            self.words[at] |= word;
        }
        self.words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }
}
