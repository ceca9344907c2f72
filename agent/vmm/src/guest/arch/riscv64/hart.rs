//! A hart that executes what `encode` makes, for the tests of hosts that are not RISC-V. Written
//! from the manual and not from the encoder, so that one finds the other's mistakes.

use crate::guest::memstress::{GuestAccess, NoMemory};

/// Why it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Call,
    Breakpoint,
    /// It read or wrote where no memory is.
    NoMemory(NoMemory),
    /// An instruction that no program here has.
    Unknown(u32),
}

/// Registers and program counter.
#[derive(Clone, Debug)]
pub(super) struct Hart {
    pub(super) x: [u64; 32],
    pub(super) pc: u64,
    /// Control and status registers, by number.
    pub(super) csr: fn(u32) -> u64,
}

impl Hart {
    pub(super) fn new(pc: u64) -> Self {
        Self {
            x: [0; 32],
            pc,
            csr: |_| 0,
        }
    }

    /// Executes until it stops, or for `most` instructions. A call or breakpoint is behind it then.
    pub(super) fn run(
        &mut self,
        memory: &mut impl GuestAccess<Error = NoMemory>,
        most: u64,
    ) -> Stop {
        for _ in 0..most {
            match self.step(memory) {
                Ok(None) => {}
                Ok(Some(stop)) => return stop,
                Err(error) => return Stop::NoMemory(error),
            }
        }
        panic!("still running after {most} instructions, pc {:#x}", self.pc);
    }

    fn step(
        &mut self,
        memory: &mut impl GuestAccess<Error = NoMemory>,
    ) -> Result<Option<Stop>, NoMemory> {
        let word = load(memory, self.pc, 4)? as u32;
        let field = |from: u32, count: u32| word >> from & ((1 << count) - 1);
        let (rd, rs1, rs2) = (field(7, 5), field(15, 5), field(20, 5));
        let (a, b) = (self.x[rs1 as usize], self.x[rs2 as usize]);
        let i_imm = i64::from(word as i32 >> 20) as u64;
        let s_imm = i64::from(word as i32 >> 25 << 5 | field(7, 5) as i32) as u64;
        let next = self.pc + 4;
        let mut to = next;
        let value = match (field(0, 7), field(12, 3)) {
            (0x13, 0) => a.wrapping_add(i_imm),
            (0x13, 1) if field(26, 6) == 0 => a << field(20, 6),
            (0x13, 5) if field(26, 6) == 0 => a >> field(20, 6),
            (0x1b, 0) => i64::from(a.wrapping_add(i_imm) as i32) as u64,
            (0x03, 3) => load(memory, a.wrapping_add(i_imm), 8)?,
            (0x03, 4) => load(memory, a.wrapping_add(i_imm), 1)?,
            (0x03, 6) => load(memory, a.wrapping_add(i_imm), 4)?,
            (0x33, 0) if field(25, 7) == 0 => a.wrapping_add(b),
            (0x33, 0) if field(25, 7) == 0x20 => a.wrapping_sub(b),
            (0x33, 0) if field(25, 7) == 1 => a.wrapping_mul(b),
            (0x33, 4) if field(25, 7) == 0 => a ^ b,
            (0x37, _) => i64::from(word as i32 & !0xfff) as u64,
            (0x17, _) => self.pc.wrapping_add(i64::from(word as i32 & !0xfff) as u64),
            (0x73, 2) if rs1 == 0 => (self.csr)(field(20, 12)),
            (0x23, 2 | 3) => {
                let bytes = 1 << field(12, 3);
                store(memory, a.wrapping_add(s_imm), bytes, b)?;
                self.pc = next;
                return Ok(None);
            }
            (0x63, condition) => {
                let taken = match condition {
                    0 => a == b,
                    1 => a != b,
                    6 => a < b,
                    7 => a >= b,
                    _ => return Ok(Some(Stop::Unknown(word))),
                };
                let sign = i64::from(word as i32 >> 31 << 12) as u64;
                let offset = field(7, 1) << 11 | field(25, 6) << 5 | field(8, 4) << 1;
                if taken {
                    to = self.pc.wrapping_add(sign | u64::from(offset));
                }
                self.pc = to;
                return Ok(None);
            }
            (0x6f, _) => {
                let sign = i64::from(word as i32 >> 31 << 20) as u64;
                let offset = field(12, 8) << 12 | field(20, 1) << 11 | field(21, 10) << 1;
                to = self.pc.wrapping_add(sign | u64::from(offset));
                next
            }
            (0x73, 0) => {
                self.pc = next;
                return Ok(Some(match word {
                    0x73 => Stop::Call,
                    0x0010_0073 => Stop::Breakpoint,
                    _ => Stop::Unknown(word),
                }));
            }
            _ => return Ok(Some(Stop::Unknown(word))),
        };
        if rd != 0 {
            self.x[rd as usize] = value;
        }
        self.pc = to;
        Ok(None)
    }
}

/// Reads 1, 4 or 8 bytes that lie in one word.
fn load(
    memory: &mut impl GuestAccess<Error = NoMemory>,
    gpa: u64,
    bytes: u32,
) -> Result<u64, NoMemory> {
    let word = memory.read_u64(gpa & !7)? >> ((gpa & 7) * 8);
    Ok(word & (u64::MAX >> (64 - bytes * 8)))
}

/// Writes 4 or 8 bytes that lie in one word.
fn store(
    memory: &mut impl GuestAccess<Error = NoMemory>,
    gpa: u64,
    bytes: u32,
    value: u64,
) -> Result<(), NoMemory> {
    let (mask, shift) = (u64::MAX >> (64 - bytes * 8), (gpa & 7) * 8);
    let word = memory.read_u64(gpa & !7)?;
    memory.write_u64(gpa & !7, word & !(mask << shift) | (value & mask) << shift)
}
