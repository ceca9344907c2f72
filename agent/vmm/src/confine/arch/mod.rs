//! What differs between architectures: system calls that only one has, and where a system call's
//! result goes. Architectures without the older calls have nothing in their place: libc makes the
//! newer ones there, which all have.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::{EVERY, FORKS, PROCESS, STREAM, answer};

#[cfg(target_arch = "riscv64")]
mod riscv64;
#[cfg(target_arch = "riscv64")]
pub(super) use riscv64::{EVERY, FORKS, PROCESS, STREAM, answer};

#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
mod other;
#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
pub(super) use other::{EVERY, FORKS, PROCESS, STREAM, answer};
