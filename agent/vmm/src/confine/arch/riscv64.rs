//! RISC-V: none of the older calls; two of its own, which say what its processors have and make
//! written code visible.

use libc::{c_void, ucontext_t};

/// The two, for which libc has no names.
const RISCV_HWPROBE: i64 = 258;
const RISCV_FLUSH_ICACHE: i64 = 259;

/// Of every thread.
pub(in crate::confine) const EVERY: &[i64] = &[RISCV_HWPROBE, libc::SYS_tkill];

/// Of threads that move pages, besides.
pub(in crate::confine) const STREAM: &[i64] = &[];

/// Of the process, besides.
pub(in crate::confine) const PROCESS: &[i64] = &[RISCV_FLUSH_ICACHE];

/// What makes a process, besides clone.
pub(in crate::confine) const FORKS: &[i64] = &[];

/// Register a0 among those saved, where the program counter comes first.
const A0: usize = 10;

/// Makes `result` that of the system call which a signal has interrupted.
///
/// # Safety
/// `context` is what the kernel passed to the handler of that signal, which has not returned.
pub(in crate::confine) unsafe fn answer(context: *mut c_void, result: i64) {
    // SAFETY: so the caller says.
    let context = unsafe { &mut *context.cast::<ucontext_t>() };
    context.uc_mcontext.__gregs[A0] = result.cast_unsigned();
}
