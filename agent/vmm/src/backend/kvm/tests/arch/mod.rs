//! What is of one architecture: machine code of raw images, and registers in saved state.

#[cfg(target_arch = "riscv64")]
mod riscv64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use super::*;
