//! x86-64: it has kept the calls from before descriptors of directories and masks of signals, and
//! its libcs, musl above all, make them.

use libc::{c_void, ucontext_t};

/// Of every thread.
pub(in crate::confine) const EVERY: &[i64] = &[
    libc::SYS_dup2,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_tkill,
    libc::SYS_unlink,
];

/// Of threads that move pages, besides.
pub(in crate::confine) const STREAM: &[i64] = &[libc::SYS_poll];

/// Of the process, besides.
pub(in crate::confine) const PROCESS: &[i64] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_chmod,
    libc::SYS_epoll_wait,
    libc::SYS_mkdir,
    libc::SYS_pipe,
    libc::SYS_readlink,
];

/// What makes a process, besides clone.
pub(in crate::confine) const FORKS: &[i64] = &[libc::SYS_fork, libc::SYS_vfork];

/// Makes `result` that of the system call which a signal has interrupted.
///
/// # Safety
/// `context` is what the kernel passed to the handler of that signal, which has not returned.
pub(in crate::confine) unsafe fn answer(context: *mut c_void, result: i64) {
    // SAFETY: so the caller says.
    let context = unsafe { &mut *context.cast::<ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_RAX as usize] = result;
}
