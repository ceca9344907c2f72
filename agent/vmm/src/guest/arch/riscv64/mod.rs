//! RISC-V: a guest calls out by the SBI, in an extension of the range for experiments.
//!
//! Guests run in VS-mode without page tables of their own (`satp` is 0), so the second stage is all
//! there is between them and memory. There is no triple fault: an exception that nobody handles
//! would trap for ever. So `stvec` of every vCPU points at a handler that reports it by a call.
//!
//! The code is written down in Rust, instruction by instruction, and turned into bytes by
//! `encode`: no assembler is needed, and the tests of any host can read and execute it.

mod calls;
mod encode;
mod handler;
#[cfg(test)]
mod hart;
mod memstress;
#[cfg(test)]
mod tests;

pub(crate) use self::calls::{DOORBELL, EXCEPTION, EXTENSION};
#[cfg(all(test, target_arch = "riscv64"))]
pub(crate) use self::encode::{Assembler, reg};
pub(in crate::guest) use self::{handler::support, memstress::memstress};
