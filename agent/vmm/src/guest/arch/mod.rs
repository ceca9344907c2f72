//! Guest code by architecture, and nothing else outside the KVM backend's own façade asks for the
//! architecture.
//!
//! # Contract
//! Each architecture exports exactly these.
//!
//! | name | what |
//! |---|---|
//! | `memstress` | memstress as machine code for [`Layout::CODE`](super::Layout::CODE) |
//! | `support` | what the CPU needs beside code, for [`Layout::support`](super::Layout::support) |
//!
//! The support is guest page tables on x86-64, and an exception handler on RISC-V, whose guests run
//! without page tables of their own; its place is the same on all. Where there is no machine code,
//! memstress and support are empty, and only the software backend runs memstress, which needs
//! neither. How machine code calls out of the guest is the architecture's own: x86-64 has ports,
//! RISC-V calls of the SBI.
//!
//! RISC-V's code is made by an encoder of ours and so compiled for the tests of every host.

#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
mod none;
#[cfg(any(test, feature = "fuzz", target_arch = "riscv64"))]
#[cfg_attr(
    all(feature = "fuzz", not(target_arch = "riscv64")),
    allow(dead_code, unused_imports, reason = "fuzzing needs its numbers alone")
)]
pub(crate) mod riscv64;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
use self::none as this;
#[cfg(target_arch = "riscv64")]
use self::riscv64 as this;
#[cfg(target_arch = "x86_64")]
use self::x86_64 as this;

pub(super) use self::this::{memstress, support};
